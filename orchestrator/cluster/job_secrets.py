"""Sending secrets from `polyref submit` to the job: through no command line, job description or log.

What Ray's job API takes (entrypoint, runtime environment, metadata) is stored by the cluster, shown by the
dashboard and partly logged. So secrets are sent separately, into the memory of the cluster's head under a
random name. The job reads them once, at its start, which deletes them; those of a job that never starts stay
until the head drops them, ten minutes later by default. Like all of Ray's job API they travel over HTTP and
are protected by the cluster's token: use https or a tunnel, as for the token itself.
"""

import json
import os
import secrets as random
from collections.abc import Mapping

from orchestrator.errors import RunFailed, UsageError

SECRETS_LOCATION = "POLYREF_MAILBOX"
"""Set for a job with secrets: the name that they are stored under."""
SECRET_NAMES = "POLYREF_SECRETS"
"""Set in such a job once it has loaded them: their names, separated by commas."""
_TIMEOUT_S = 60


def upload_secrets(secrets: Mapping[str, str], *, server: str, headers: Mapping[str, str]) -> str:
    """Upload secrets to the job server at `server`.

    Returns:
        The value that SECRETS_LOCATION must have for the job to find them.

    Raises:
        RunFailed: the server did not accept them.
    """
    import requests

    name = f"polyref-{random.token_hex(16)}.zip"  # the server accepts names of packages only
    url = f"{server}/api/packages/gcs/{name}"
    try:
        # Requesting a package first makes Ray delete it in time when nobody fetches it.
        requests.get(url, headers=headers, timeout=_TIMEOUT_S)
        response = requests.put(url, data=json.dumps(dict(secrets)), headers=headers, timeout=_TIMEOUT_S)
        response.raise_for_status()
    except requests.RequestException as error:
        raise RunFailed(
            f"the cluster did not take the secrets: {type(error).__name__}; nothing was submitted"
        ) from error
    return f"gcs://{name}"


def load_secrets() -> None:
    """Move a job's secrets into the environment, once. Does nothing where the job has none.

    Raises:
        UsageError: the variable is set outside a job.
        RunFailed: the secrets are gone.
    """
    name = os.environ.pop(SECRETS_LOCATION, None)
    if name is None:
        return
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    if "RAY_ADDRESS" not in os.environ:
        raise UsageError(
            f"{SECRETS_LOCATION} is set, which only a job of `polyref submit` has, and RAY_ADDRESS is not: "
            "unset it"
        )
    head = GcsClient(address=os.environ["RAY_ADDRESS"])
    content = head.internal_kv_get(name.encode(), None)
    head.internal_kv_del(name.encode(), False, None)
    if not content:
        raise RunFailed(
            "the secrets of this job are gone: they are kept for some minutes and can be read once; "
            "submit the job again"
        )
    secrets = json.loads(content)
    os.environ.update(secrets)
    os.environ[SECRET_NAMES] = ",".join(secrets)
