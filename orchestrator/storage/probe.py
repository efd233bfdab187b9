"""Check that a storage can be written, and that other processes see what was written."""

import contextlib
import errno
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from orchestrator.config.paths import resolve_path
from orchestrator.errors import UsageError
from orchestrator.files import CACHE_VARIABLE, DEFAULT_CACHE
from orchestrator.storage.paths import is_uri
from preferences import buckets

PROBE_PREFIX = ".seen-"
_VISIBLE_WITHIN_S = 5.0
_LONGEST_NAME = 255  # bytes, of every file system in use


def refuse_unwritable(storage_path: str) -> None:
    """Check that a storage can be written by writing a file and deleting it; a missing folder is not made.

    Raises:
        UsageError: nothing can be written there, or to this machine's cache; the message says why and what to
            do.
    """
    _refuse_unusable_cache()
    if not is_uri(storage_path):
        problem = find_write_problem(Path(storage_path))
        if problem is not None:
            raise UsageError(
                f"storage_path {storage_path} cannot be written ({problem}); name a folder that can"
            )
        return
    shown = buckets.redact_uri(storage_path)
    if not buckets.is_bucket(storage_path):
        schemes = ", ".join(f"{scheme}://" for scheme in buckets.SCHEMES)
        raise UsageError(
            f"storage_path {shown} is a URI that runs cannot be kept at; give a folder that all nodes share, "
            f"or one of {schemes}"
        )
    try:
        with write_probe(storage_path):
            pass
    except buckets.STORE_ERRORS as error:
        raise UsageError(
            f"storage_path {shown} cannot be written ({buckets.describe_error(error)}); "
            f"{buckets.suggest_remedy(storage_path)}"
        ) from None


def _refuse_unusable_cache() -> None:
    root = os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE
    problem = find_write_problem(resolve_path(root, field=CACHE_VARIABLE))
    if problem is not None:
        raise UsageError(
            f"{CACHE_VARIABLE} {root} cannot be written ({problem}); set the variable to a folder that "
            f"can, or unset it for {DEFAULT_CACHE}"
        )


def find_write_problem(folder: Path) -> str | None:
    """Say why a folder cannot be written, or made where it is missing; None if it can. Nothing is left."""
    try:
        present = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        tempfile.TemporaryFile(dir=present).close()
        too_long = [part for part in folder.parts if len(os.fsencode(part)) > _LONGEST_NAME]
        return os.strerror(errno.ENAMETOOLONG) if too_long else None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)


def refuse_unwritable_file(path: Path, option: str) -> None:
    """Check that a file can be written, or replaced; nothing is left.

    Raises:
        UsageError: it cannot; the message names the option and says why.
    """
    problem = find_write_problem(path.parent)
    if problem is None and len(os.fsencode(path.name)) > _LONGEST_NAME - 10:  # of a temporary file beside it
        problem = os.strerror(errno.ENAMETOOLONG)
    if problem is not None:
        raise UsageError(f"{option} {path}: cannot be written ({problem}); name a file in a folder that can")


def why_invisible(place: str) -> str | None:
    """Return why this process does not see a probe that another one wrote; None if it sees it.

    A mount may lag behind, so a file is looked for during some seconds.

    Args:
        place: the probe's path or URI, as `write_probe` yields it.
    """
    try:
        if is_uri(place):
            store, path = buckets.open_bucket(place)
            exists = store.get_file_info(path).type == pafs.FileType.File
            return None if exists else "the store has no such object there"
        deadline = time.monotonic() + _VISIBLE_WITHIN_S
        while not Path(place).exists():
            if time.monotonic() >= deadline:
                folder = Path(place).parent
                return "the folder there is another one" if folder.is_dir() else "no such folder there"
            time.sleep(0.2)
    except buckets.STORE_ERRORS as error:
        return buckets.describe_error(error)
    return None


@contextlib.contextmanager
def write_probe(storage_path: str) -> Iterator[str]:
    """Write a small file of a unique name to the storage, yield its path or URI, and delete it at the end."""
    place = buckets.join_path(storage_path, f"{PROBE_PREFIX}{uuid.uuid4().hex}")
    if is_uri(place):
        store, path = buckets.open_bucket(place)
        with store.open_output_stream(path) as stream:
            stream.write(b"polyref")
        try:
            yield place
        finally:
            with contextlib.suppress(*buckets.STORE_ERRORS):
                store.delete_file(path)
    else:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_bytes(b"polyref")
        try:
            yield place
        finally:
            Path(place).unlink(missing_ok=True)
