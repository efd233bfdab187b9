"""Where runs are kept: a folder that all nodes share, or an object store by URI.

Of a run on an object store every process has a working copy in a local folder, which stands for nothing: it
is made from the store when the process starts, and what is worth keeping is put there as whole objects.
"""

import contextlib
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.fs as pafs

from orchestrator.storage.lease import LEASE_FILE, RunLease, lock_folder
from orchestrator.storage.object_store import download_path, upload_path
from orchestrator.storage.paths import explain_storage_failures, find_working_folder, is_uri, redact_location
from orchestrator.storage.probe import PROBE_PREFIX, write_probe
from preferences import buckets

log = logging.getLogger(__name__)

_PAUSE_FACTOR = 20  # seconds of copying, of a thread that copies now and then


# ---- one storage for all nodes ----


# ---- a run's files ----


class Mirror:
    """A run's own files: worked on in `folder`, kept at `home`.

    Where `home` is a folder both are the same and nothing is copied, so that callers need not tell.

    Args:
        kept_at: the run's folder, or its URI on an object store; see `home`.
        worker: the rank of a worker, None for the command.
    """

    def __init__(self, kept_at: str, *, worker: int | None = None) -> None:
        self.location, self.folder = kept_at, find_working_folder(kept_at, worker)
        self._is_worker, self._copy_lock = worker is not None, threading.Lock()
        self._store: pafs.FileSystem | None = None
        if is_uri(kept_at):
            with self.explain_failures():
                self._store, self._root = buckets.open_bucket(kept_at)
                self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def remote(self) -> bool:
        """Whether files are kept elsewhere than they are worked on."""
        return self._store is not None

    def __str__(self) -> str:
        return redact_location(self.location)

    @contextlib.contextmanager
    def explain_failures(self) -> Iterator[None]:
        """`answering`, but for a worker: it sees the error itself, upon which Ray starts it again."""
        with contextlib.nullcontext() if self._is_worker else explain_storage_failures(self.location):
            yield

    def describe_path(self, *names: str) -> str:
        """Where something of the run is kept, as a person is told."""
        return buckets.join_path(str(self), *names)

    def pull(self, *names: str) -> None:
        """Make files and folders here what is kept; what is not kept goes.

        Raises:
            RunFailed: the store does not give them; OSError or ArrowException for a worker.
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
        """Keep files and folders as they are here; each file appears whole or not at all.

        Raises:
            RunFailed: the store does not take them; OSError or ArrowException for a worker.
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
        """Names of the folders that are kept under a folder, sorted."""
        if self._store is None:
            return sorted(path.name for path in (self.folder / under).glob("*/"))
        with self.explain_failures():
            found = self._store.get_file_info(
                pafs.FileSelector(f"{self._root}/{under}", allow_not_found=True)
            )
        return sorted(entry.base_name for entry in found if entry.type == pafs.FileType.Directory)

    @contextlib.contextmanager
    def fetch_folder(self, name: str) -> Iterator[Path]:
        """A folder that is kept, for reading: itself, or a copy that goes afterwards."""
        if self._store is None:
            yield self.folder / name
            return
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".fetched-") as room:
            copy = Path(room) / Path(name).name
            with self.explain_failures():
                download_path(self._store, f"{self._root}/{name}", copy)
            yield copy

    def remove_run(self) -> None:
        """Forget the run: all that is kept of it, and the working copy. It stays held by who holds it."""
        with self.explain_failures():
            if self._store is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                for entry in self._store.get_file_info(pafs.FileSelector(self._root, allow_not_found=True)):
                    if entry.type == pafs.FileType.Directory:
                        self._store.delete_dir(entry.path)
                    elif entry.base_name != LEASE_FILE:
                        self._store.delete_file(entry.path)
            elif self.folder.exists():
                doomed = self.folder.with_name(f".{self.folder.name}.removed")
                shutil.rmtree(doomed, ignore_errors=True)
                self.folder.rename(doomed)
                shutil.rmtree(doomed)

    @contextlib.contextmanager
    def write_probe(self) -> Iterator[str]:
        """`beacon` in the run's folder; those go that a command left there when it was killed."""
        with self.explain_failures():
            if self._store is None:
                for old in self.folder.glob(f"{PROBE_PREFIX}*"):
                    old.unlink(missing_ok=True)
            else:
                for entry in self._store.get_file_info(pafs.FileSelector(self._root, allow_not_found=True)):
                    if entry.base_name.startswith(PROBE_PREFIX):
                        self._store.delete_file(entry.path)
        with contextlib.ExitStack() as stack:
            with self.explain_failures():
                seen = stack.enter_context(write_probe(self.location))
            yield seen

    def discard_copy(self) -> None:
        """The working copy goes, where there is one, with whatever was not pushed."""
        if self.remote:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def push_periodically(self, *names: str, every_s: float = 15.0) -> Iterator[None]:
        """Inside, files are kept again and again while they grow; a store that is away only delays that."""
        with self._run_periodically(every_s, lambda: self._push_names(*names)):
            yield

    @contextlib.contextmanager
    def pull_periodically(self, *names: str, every_s: float = 10.0) -> Iterator[None]:
        """Inside, files here follow what is kept; at the end they are as it is."""
        with self._run_periodically(every_s, lambda: self._pull_names(*names)):
            yield
        self.pull(*names)

    @contextlib.contextmanager
    def hold_lease(self) -> Iterator[None]:
        """Hold the run for this process; see `hold`.

        Raises:
            UsageError: another process is training this run.
            RunFailed: the storage failed, or another process has taken the run meanwhile.
        """
        with contextlib.ExitStack() as stack:
            with self.explain_failures():
                if self._store is None:
                    stack.enter_context(lock_folder(self.folder))
                else:
                    mine = RunLease(self._store, self._root, str(self))
                    mine.acquire()
                    stack.enter_context(mine.keep_renewed())
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
    away, pause = False, seconds
    while not stop.wait(pause):
        began = time.monotonic()
        try:
            action()
            away = False
        except buckets.STORE_ERRORS as error:
            if not away:
                log.warning(
                    "%s does not answer (%s); it is tried again", place, buckets.describe_error(error)
                )
            away = True
        pause = max(seconds, _PAUSE_FACTOR * (time.monotonic() - began))  # files grow, and so does the time
