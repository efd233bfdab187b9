"""Temporary folders of this machine that have an owner and an end, also where the owner was killed."""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

_PREFIX, _LOCK = "polyref-scratch-", "owner.lock"


@contextlib.contextmanager
def make_scratch_folder() -> Iterator[Path]:
    """Yield an empty folder that is deleted after the block, or by another process once this one is dead."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder, FileLock(Path(folder) / _LOCK):
        content = Path(folder) / "content"
        content.mkdir()
        yield content


def remove_abandoned_scratch() -> int:
    """Delete the scratch folders of processes that were killed; return how many.

    The operating system releases an owner's lock when its process ends.
    """
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/"):
        try:
            if not (folder / _LOCK).exists():  # just made
                continue
            with FileLock(folder / _LOCK, timeout=0):
                shutil.rmtree(folder)
        except (Timeout, OSError):  # it has an owner, or is another user's
            continue
        log.warning("%s, which a killed process left, is deleted", folder)
        removed += 1
    return removed
