"""Who started a run and how, and its description, in the tags that MLflow's page of a run shows."""

import getpass
import os
import shlex
import sys
from pathlib import PurePath

from orchestrator.redaction import redact

NOTE_TAG = "mlflow.note.content"
_USER_TAG, _SOURCE_TAG, _SOURCE_TYPE_TAG = "mlflow.user", "mlflow.source.name", "mlflow.source.type"
_NOTE_LENGTH, _COMMAND_LENGTH = 8000, 500
_OWN_PROGRAMS = ("polyref", "__main__.py")


def read_origin_tags() -> dict[str, str]:
    """Return the tags of the user and the command, without secrets."""
    # Of a source of type LOCAL MLflow's page shows only what is behind the command's last slash.
    tags = {_SOURCE_TAG: _read_command(), _SOURCE_TYPE_TAG: "JOB"}
    user = _read_user()
    return tags | ({_USER_TAG: user} if user else {})


def cut_note(text: str) -> str:
    """Return a description without secrets, cut at the end of a line where MLflow takes no more."""
    text = redact(text).strip()
    if len(text) <= _NOTE_LENGTH:
        return text
    return text[: _NOTE_LENGTH - 4].rpartition("\n")[0].rstrip() + "\n\n…"


def _read_user() -> str | None:
    """Return the name that the MLflow server knows, else the one that this machine does; None without any."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container's user may have a number alone
        return None


def _read_command() -> str:
    program = PurePath(sys.argv[0]).name
    name = "polyref" if program in _OWN_PROGRAMS else program or "python"
    command = " ".join([name, *(shlex.quote(redact(argument)) for argument in sys.argv[1:])])
    return redact(command)[:_COMMAND_LENGTH]
