"""Paths as run files, sweep files and options write them."""

import os
from pathlib import Path

from orchestrator.errors import UsageError


def resolve_path(path: str | os.PathLike[str], *, field: str, base: Path | None = None) -> Path:
    """Return the absolute path, with `~` and links followed; it need not exist.

    Args:
        path: as it was written.
        field: the field or option that names it, for messages.
        base: where a relative path begins; default: the working folder.

    Raises:
        UsageError: it is of the home folder of a user that does not exist.
    """
    home = os.path.expanduser(path)  # noqa: PTH111  # Path's raises where there is no such user
    if str(path).startswith("~") and home == str(path):
        raise UsageError(f"{field}: {path}: there is no such home folder; write the whole path")
    return Path(os.path.realpath((base or Path.cwd()) / home))


def resolve_if_present(name: str, *, field: str, base: Path | None = None) -> str:
    """Return the absolute path if there is a file or folder, else the name as it is: that of a hub's.

    Raises:
        UsageError: as `resolve_path`.
    """
    path = resolve_path(name, field=field, base=base)
    return str(path) if os.path.exists(path) else name  # noqa: PTH110  # Path's raises for a long name
