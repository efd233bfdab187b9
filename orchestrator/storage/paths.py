"""Folders and URIs that runs are stored at."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from orchestrator.config.run import RunConfig
from orchestrator.errors import RunFailed
from orchestrator.files import cache_folder
from preferences import buckets


def is_uri(place: str) -> bool:
    """Whether a `storage_path` is the URI of an object store, not a folder."""
    return "://" in place


def run_location(config: RunConfig) -> str:
    """Return the folder or URI that a run is stored at."""
    return buckets.join_path(config.storage_path, config.name)


@contextlib.contextmanager
def explain_storage_failures(place: str) -> Iterator[None]:
    """Turn a storage failure inside the block into an error that ends the command with one line.

    Raises:
        RunFailed: the storage failed.
    """
    try:
        yield
    except buckets.STORE_ERRORS as error:
        remedy = (
            buckets.suggest_remedy(place) if is_uri(place) else "check the disk, or what is mounted there"
        )
        raise RunFailed(
            f"{redact_location(place)} cannot be read or written ({buckets.describe_error(error)}); "
            f"{remedy}. The same command resumes from what is stored"
        ) from error


def redact_location(place: str) -> str:
    """Return a folder or URI without credentials."""
    return buckets.redact_uri(place) if is_uri(place) else place


def find_working_folder(location: str, worker: int | None = None) -> Path:
    """Return where a process works on a run: its folder, or a local copy of its files on an object store.

    The command and each worker that writes (by its rank) have copies of their own: they may share a machine.
    """
    if not is_uri(location):
        return Path(location)
    place = location.partition("?")[0]
    process = "driver" if worker is None else f"worker-{worker}"
    digest = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
    return cache_folder("runs", f"{place.rpartition('/')[2]}-{digest}", process)
