"""Folders and URIs that runs are kept at."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from orchestrator.config.run import RunConfig
from orchestrator.errors import RunFailed
from orchestrator.files import cache_folder
from preferences import buckets


def is_uri(place: str) -> bool:
    """Whether a `storage_path` is an object store's URI, not a folder."""
    return "://" in place


def run_location(config: RunConfig) -> str:
    """The folder or URI that a run is kept at."""
    return buckets.join_path(config.storage_path, config.name)


@contextlib.contextmanager
def explain_storage_failures(place: str) -> Iterator[None]:
    """Inside, a storage that fails ends the command with one line.

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
            f"{redact_location(place)} cannot be read or written ({buckets.describe_error(error)}); {remedy}. "
            "The same command goes on from what is kept"
        ) from error


def redact_location(place: str) -> str:
    """Return a storage's folder or URI without credentials."""
    return buckets.redact_uri(place) if is_uri(place) else place


def find_working_folder(kept_at: str, worker: int | None = None) -> Path:
    """Where a run is worked on: its folder itself, or on this machine a copy of what an object store keeps.

    The command has one, and each worker that writes, by its rank: they may be on one machine.
    """
    if not is_uri(kept_at):
        return Path(kept_at)
    place = kept_at.partition("?")[0]
    whose = "driver" if worker is None else f"worker-{worker}"
    digest = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
    return cache_folder("runs", f"{place.rpartition('/')[2]}-{digest}", whose)
