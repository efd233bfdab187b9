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

from orchestrator.storage.lease import NAME, Hold, of_folder
from orchestrator.storage.object_store import _fetch, _put
from orchestrator.storage.paths import _shown, answering, is_uri, working_folder
from orchestrator.storage.probe import _SEEN, beacon
from preferences import buckets

log = logging.getLogger(__name__)

_AT_MOST_ONE_IN = 20  # seconds of copying, of a thread that copies now and then


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
        self.home, self.folder = kept_at, working_folder(kept_at, worker)
        self._is_worker, self._busy = worker is not None, threading.Lock()
        self._store: pafs.FileSystem | None = None
        if is_uri(kept_at):
            with self.answering():
                self._store, self._root = buckets.opened(kept_at)
                self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def remote(self) -> bool:
        """Whether files are kept elsewhere than they are worked on."""
        return self._store is not None

    def __str__(self) -> str:
        return _shown(self.home)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """`answering`, but for a worker: it sees the error itself, upon which Ray starts it again."""
        with contextlib.nullcontext() if self._is_worker else answering(self.home):
            yield

    def place(self, *names: str) -> str:
        """Where something of the run is kept, as a person is told."""
        return buckets.join(str(self), *names)

    def pull(self, *names: str) -> None:
        """Make files and folders here what is kept; what is not kept goes.

        Raises:
            RunFailed: the store does not give them; OSError or ArrowException for a worker.
        """
        with self.answering():
            self._pull(*names)

    def _pull(self, *names: str) -> None:
        if self._store is None:
            return
        with self._busy:
            for name in names:
                _fetch(self._store, f"{self._root}/{name}", self.folder / name)

    def push(self, *names: str) -> None:
        """Keep files and folders as they are here; each file appears whole or not at all.

        Raises:
            RunFailed: the store does not take them; OSError or ArrowException for a worker.
        """
        with self.answering():
            self._push(*names)

    def _push(self, *names: str) -> None:
        if self._store is None:
            return
        with self._busy:
            for name in names:
                if (self.folder / name).exists():
                    _put(self.folder / name, self._store, f"{self._root}/{name}")

    def folders(self, under: str) -> list[str]:
        """Names of the folders that are kept under a folder, sorted."""
        if self._store is None:
            return sorted(path.name for path in (self.folder / under).glob("*/"))
        with self.answering():
            found = self._store.get_file_info(
                pafs.FileSelector(f"{self._root}/{under}", allow_not_found=True)
            )
        return sorted(entry.base_name for entry in found if entry.type == pafs.FileType.Directory)

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A folder that is kept, for reading: itself, or a copy that goes afterwards."""
        if self._store is None:
            yield self.folder / name
            return
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".fetched-") as room:
            copy = Path(room) / Path(name).name
            with self.answering():
                _fetch(self._store, f"{self._root}/{name}", copy)
            yield copy

    def remove(self) -> None:
        """Forget the run: all that is kept of it, and the working copy. It stays held by who holds it."""
        with self.answering():
            if self._store is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                for entry in self._store.get_file_info(pafs.FileSelector(self._root, allow_not_found=True)):
                    if entry.type == pafs.FileType.Directory:
                        self._store.delete_dir(entry.path)
                    elif entry.base_name != NAME:
                        self._store.delete_file(entry.path)
            elif self.folder.exists():
                doomed = self.folder.with_name(f".{self.folder.name}.removed")
                shutil.rmtree(doomed, ignore_errors=True)
                self.folder.rename(doomed)
                shutil.rmtree(doomed)

    @contextlib.contextmanager
    def beacon(self) -> Iterator[str]:
        """`beacon` in the run's folder; those go that a command left there when it was killed."""
        with self.answering():
            if self._store is None:
                for old in self.folder.glob(f"{_SEEN}*"):
                    old.unlink(missing_ok=True)
            else:
                for entry in self._store.get_file_info(pafs.FileSelector(self._root, allow_not_found=True)):
                    if entry.base_name.startswith(_SEEN):
                        self._store.delete_file(entry.path)
        with contextlib.ExitStack() as stack:
            with self.answering():
                seen = stack.enter_context(beacon(self.home))
            yield seen

    def discard(self) -> None:
        """The working copy goes, where there is one, with whatever was not pushed."""
        if self.remote:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def pushing(self, *names: str, every_s: float = 15.0) -> Iterator[None]:
        """Inside, files are kept again and again while they grow; a store that is away only delays that."""
        with self._every(every_s, lambda: self._push(*names)):
            yield

    @contextlib.contextmanager
    def pulling(self, *names: str, every_s: float = 10.0) -> Iterator[None]:
        """Inside, files here follow what is kept; at the end they are as it is."""
        with self._every(every_s, lambda: self._pull(*names)):
            yield
        self.pull(*names)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run for this process; see `hold`.

        Raises:
            UsageError: another process is training this run.
            RunFailed: the storage failed, or another process has taken the run meanwhile.
        """
        with contextlib.ExitStack() as stack:
            with self.answering():
                if self._store is None:
                    stack.enter_context(of_folder(self.folder))
                else:
                    mine = Hold(self._store, self._root, str(self))
                    mine.take()
                    stack.enter_context(mine.kept())
            yield

    @contextlib.contextmanager
    def _every(self, seconds: float, action: Callable[[], None]) -> Iterator[None]:
        if self._store is None:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=_repeat, args=(action, seconds, stop, str(self)), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _repeat(action: Callable[[], None], seconds: float, stop: threading.Event, place: str) -> None:
    away, pause = False, seconds
    while not stop.wait(pause):
        began = time.monotonic()
        try:
            action()
            away = False
        except buckets.FAILURES as error:
            if not away:
                log.warning("%s does not answer (%s); it is tried again", place, buckets.reason(error))
            away = True
        pause = max(seconds, _AT_MOST_ONE_IN * (time.monotonic() - began))  # files grow, and so does the time
