"""Secrets on their way from `polyref submit` to the job: in no command line, no job's description and no log.

What Ray's job API takes (entrypoint, runtime environment, metadata) is kept by the cluster, shown by the
dashboard and partly logged. So secrets go beside it, into the memory of the cluster's head under a random
name. The job takes them out once, at its start, and they are gone; a job that never starts leaves them until
the head forgets them, ten minutes later by default. As all of Ray's job API they travel over HTTP and are
kept from others by the cluster's token: use https or a tunnel, as for the token itself.
"""

import json
import os
import secrets as random
from collections.abc import Mapping

from orchestrator.errors import RunFailed

SECRETS_LOCATION = "POLYREF_MAILBOX"
"""Set for a job that was given secrets: the name they are kept under."""
SECRET_NAMES = "POLYREF_SECRETS"
"""Set in such a job once it has them: their names, with commas between."""
_TIMEOUT_S = 60


def upload_secrets(secrets: Mapping[str, str], *, server: str, headers: Mapping[str, str]) -> str:
    """Leave secrets with the job server at `server`; what `BOX` must be for the job to find them.

    Raises:
        RunFailed: the server would not take them.
    """
    import requests

    name = f"polyref-{random.token_hex(16)}.zip"  # the server takes what is named as packages are
    url = f"{server}/api/packages/gcs/{name}"
    try:
        # Asking for a package first is what makes Ray forget it in time when nobody fetches it.
        requests.get(url, headers=headers, timeout=_TIMEOUT_S)
        sent = requests.put(url, data=json.dumps(dict(secrets)), headers=headers, timeout=_TIMEOUT_S)
        sent.raise_for_status()
    except requests.RequestException as error:
        raise RunFailed(
            f"the cluster did not take the secrets: {type(error).__name__}; nothing was submitted"
        ) from error
    return f"gcs://{name}"


def load_secrets() -> None:
    """In a job: move what was left for it into the environment, once. Does nothing where nothing was.

    Raises:
        RunFailed: it is gone.
    """
    name = os.environ.pop(SECRETS_LOCATION, None)
    if name is None:
        return
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    head = GcsClient(address=os.environ["RAY_ADDRESS"])
    content = head.internal_kv_get(name.encode(), None)
    head.internal_kv_del(name.encode(), False, None)
    if not content:
        raise RunFailed(
            "the secrets of this job are gone: they are kept for some minutes and handed out once; "
            "submit the job again"
        )
    secrets = json.loads(content)
    os.environ.update(secrets)
    os.environ[SECRET_NAMES] = ",".join(secrets)
