"""Open object stores by URI with pyarrow's own clients: S3, Google Cloud Storage and Azure.

The clients find credentials as the provider's own tools do: in the environment, a profile, or the machine's
role.
"""

import re
from typing import Any
from urllib.parse import urlsplit

import pyarrow
import pyarrow.fs

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
"""URI schemes of the object stores that need no further package."""

STORE_ERRORS = (OSError, pyarrow.ArrowException)
"""Errors that the client of an object store raises."""

_REMEDIES = {
    "s3": "credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role), "
    "and AWS_REGION or AWS_ENDPOINT_URL where the store is not AWS's own",
    "gs": "credentials (GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account)",
    "abfs": "credentials (AZURE_CLIENT_ID and AZURE_TENANT_ID, or the machine's identity), and that the URI "
    "names the account: abfss://container@account.dfs.core.windows.net/path",
}
_GIVE_UP_AFTER_S = 60


def is_bucket(path: str) -> bool:
    """Whether a path is the URI of an object store that `open_bucket` opens."""
    return path.partition("://")[0] in SCHEMES and "://" in path


def open_bucket(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the object store and the path in it.

    Raises:
        OSError, ArrowException: the URI is malformed, or the bucket's region cannot be found.
    """
    if urlsplit(uri).scheme in ("gs", "gcs") and "retry_limit_seconds" not in uri:
        # The default is 15 minutes, during which a machine without a network reports nothing.
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={_GIVE_UP_AFTER_S}"
    return pyarrow.fs.FileSystem.from_uri(uri)


def join_path(path: str, *names: str) -> str:
    """Return a path below a folder or URI; the URI's options (`?region=...`) stay at its end."""
    base, mark, options = path.partition("?") if "://" in path else (path, "", "")
    return "/".join([base.rstrip("/"), *names]) + mark + options


def redact_uri(uri: str) -> str:
    """Return the URI as it may be shown: without options, key and secret.

    Secrets may contain slashes and other characters that should be escaped and often are not, so everything
    up to the last @ is removed from a bucket's URI.
    """
    secret = r"(?:[^?]*@|.*@)" if is_bucket(uri) else r"[^/]*@"
    return re.sub(rf"://[^/@:?]*:{secret}", "://", uri, count=1).partition("?")[0]


def describe_error(error: BaseException) -> str:
    """Describe a store client's error in one line, without request ids or the secret of a URI in it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    lines[0] = re.sub(r"'(\w+://.*)'", lambda found: f"'{redact_uri(found[1])}'", lines[0])
    return re.sub(r"(; Details: .*| \(Request ID:? .*| Detail: \[errno.*)$", "", lines[0])


def suggest_remedy(uri: str) -> str:
    """Suggest what to check when a store refuses access or does not answer."""
    scheme: Any = urlsplit(uri).scheme
    kind = {"gcs": "gs", "abfss": "abfs"}.get(scheme, scheme)
    return f"check the name, the network, and {_REMEDIES.get(kind, 'credentials')}"
