"""The files of one run: in a folder that all nodes share, or on an object store by URI.

For a run on an object store every process has a working copy in a local folder. The store alone is
authoritative: the copy is made from it when the process starts, and files worth keeping are uploaded to it as
whole objects.
"""

import contextlib
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow.fs as pafs

from orchestrator.storage.lease import LEASE_FILE, RunLease, lock_folder
from orchestrator.storage.object_store import download_path, remove_path, upload_path
from orchestrator.storage.paths import explain_storage_failures, find_working_folder, is_uri, redact_location
from orchestrator.storage.probe import PROBE_PREFIX, write_probe
from preferences import buckets

log = logging.getLogger(__name__)

_PAUSE_FACTOR = 20  # a periodic copy pauses for at least this many times as long as it took


class Mirror:
    """A run's own files: read and written in `folder`, stored at `location`.

    Where `location` is a folder both are the same and nothing is copied: callers need not distinguish.

    Args:
        location: the run's folder, or its URI on an object store.
        worker: the rank of a worker, None for the command.
    """

    def __init__(self, location: str, *, worker: int | None = None) -> None:
        self.location, self.folder = location, find_working_folder(location, worker)
        self._is_worker, self._copy_lock = worker is not None, threading.Lock()
        self._store: pafs.FileSystem | None = None
        if is_uri(location):
            with self.explain_failures():
                self._store, self._root = buckets.open_bucket(location)
                self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def remote(self) -> bool:
        """Whether files are stored on an object store, apart from the working folder."""
        return self._store is not None

    def __str__(self) -> str:
        return redact_location(self.location)

    @contextlib.contextmanager
    def explain_failures(self) -> Iterator[None]:
        """Do as `explain_storage_failures`, but not in a worker: Ray restarts it upon the error itself."""
        with contextlib.nullcontext() if self._is_worker else explain_storage_failures(self.location):
            yield

    def describe_path(self, *names: str) -> str:
        """Return where a file of the run is stored, without credentials, for messages."""
        return buckets.join_path(str(self), *names)

    def pull(self, *names: str) -> None:
        """Make files and folders in the working folder equal to the stored ones; delete those not stored.

        Raises:
            RunFailed: they cannot be downloaded; OSError or ArrowException for a worker.
        """
        with self.explain_failures():
            self._pull_names(*names)

    def _pull_names(self, *names: str) -> None:
        if self._store is None:
            return
        with self._copy_lock:
            for name in names:
                download_path(self._store, f"{self._root}/{name}", self.folder / name)

    def push(self, *names: str) -> None:
        """Store files and folders as they are in the working folder; each file appears whole or not at all.

        Raises:
            RunFailed: they cannot be uploaded; OSError or ArrowException for a worker.
        """
        with self.explain_failures():
            self._push_names(*names)

    def _push_names(self, *names: str) -> None:
        if self._store is None:
            return
        with self._copy_lock:
            for name in names:
                if (self.folder / name).exists():
                    upload_path(self.folder / name, self._store, f"{self._root}/{name}")

    def list_folders(self, under: str) -> list[str]:
        """Return the names of the stored folders inside a folder, sorted."""
        if self._store is None:
            return sorted(path.name for path in (self.folder / under).glob("*/"))
        with self.explain_failures():
            entries = self._store.get_file_info(
                pafs.FileSelector(f"{self._root}/{under}", allow_not_found=True)
            )
        return sorted(entry.base_name for entry in entries if entry.type == pafs.FileType.Directory)

    @contextlib.contextmanager
    def fetch_folder(self, name: str) -> Iterator[Path]:
        """Yield a stored folder for reading: itself, or a copy that is deleted afterwards."""
        if self._store is None:
            yield self.folder / name
            return
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".fetched-") as parent:
            copy = Path(parent) / Path(name).name
            with self.explain_failures():
                download_path(self._store, f"{self._root}/{name}", copy)
            yield copy

    def list_entries(self) -> list[str]:
        """Return the names of the files and folders that are stored, but for the lease and probes."""
        if self._store is None:
            names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        else:
            with self.explain_failures():
                names = [entry.base_name for entry in self._list_stored_entries()]
        return sorted(name for name in names if name != LEASE_FILE and not name.startswith(PROBE_PREFIX))

    def remove_entries(self, names: Sequence[str]) -> None:
        """Delete files and folders, in this order, where they are stored and in the working copy."""
        with self.explain_failures():
            stored = {} if self._store is None else {e.base_name: e for e in self._list_stored_entries()}
            for name in names:
                remove_path(self.folder / name)
                if self._store is not None and name in stored:
                    is_folder = stored[name].type == pafs.FileType.Directory
                    (self._store.delete_dir if is_folder else self._store.delete_file)(stored[name].path)

    def _list_stored_entries(self) -> list[pafs.FileInfo]:
        assert self._store is not None
        return self._store.get_file_info(pafs.FileSelector(self._root, allow_not_found=True))

    @contextlib.contextmanager
    def write_probe(self) -> Iterator[str]:
        """Delete probes that killed commands left in the run's folder, and write one (see `probe`)."""
        with self.explain_failures():
            if self._store is None:
                for old in self.folder.glob(f"{PROBE_PREFIX}*"):
                    old.unlink(missing_ok=True)
            else:
                for entry in self._list_stored_entries():
                    if entry.base_name.startswith(PROBE_PREFIX):
                        self._store.delete_file(entry.path)
        with contextlib.ExitStack() as stack:
            with self.explain_failures():
                probe = stack.enter_context(write_probe(self.location))
            yield probe

    def discard_copy(self) -> None:
        """Delete the working copy, where there is one, with whatever was not pushed."""
        if self.remote:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def push_periodically(self, *names: str, every_s: float = 15.0) -> Iterator[None]:
        """Push growing files periodically inside the block; an unreachable store only delays that."""
        with self._run_periodically(every_s, lambda: self._push_names(*names)):
            yield

    @contextlib.contextmanager
    def pull_periodically(self, *names: str, every_s: float = 10.0) -> Iterator[None]:
        """Pull files periodically inside the block, and once more at its end."""
        with self._run_periodically(every_s, lambda: self._pull_names(*names)):
            yield
        self.pull(*names)

    @contextlib.contextmanager
    def hold_lease(self) -> Iterator[None]:
        """Reserve the run for this process inside the block; see `lease`.

        Raises:
            UsageError: another process is training this run.
            RunFailed: the storage failed, or another process has taken the run meanwhile.
        """
        with contextlib.ExitStack() as stack:
            with self.explain_failures():
                if self._store is None:
                    stack.enter_context(lock_folder(self.folder))
                else:
                    lease = RunLease(self._store, self._root, str(self))
                    lease.acquire()
                    stack.enter_context(lease.keep_renewed())
            yield

    @contextlib.contextmanager
    def _run_periodically(self, seconds: float, action: Callable[[], None]) -> Iterator[None]:
        if self._store is None:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=_repeat_action, args=(action, seconds, stop, str(self)), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _repeat_action(action: Callable[[], None], seconds: float, stop: threading.Event, place: str) -> None:
    unreachable, pause = False, seconds
    while not stop.wait(pause):
        began = time.monotonic()
        try:
            action()
            unreachable = False
        except buckets.STORE_ERRORS as error:
            if not unreachable:
                log.warning("%s does not answer (%s); retrying", place, buckets.describe_error(error))
            unreachable = True
        pause = max(
            seconds, _PAUSE_FACTOR * (time.monotonic() - began)
        )  # files grow, and so does the time a copy takes
