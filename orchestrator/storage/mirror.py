"""Where runs are kept: a folder that all nodes share, or an object store by URI.

Of a run on an object store every process has a working copy in a local folder, which stands for nothing: it
is made from the store when the process starts, and what is worth keeping is put there as whole objects.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pyarrow.fs as pafs

from orchestrator.config.run import RunConfig, RunFailed, UsageError
from orchestrator.storage import lease as hold
from preferences import buckets

log = logging.getLogger(__name__)

_SEEN = ".seen-"
_CHUNK = 64 * 2**20
_SEEN_WITHIN_S, _ANSWER_WITHIN_S = 5.0, 60.0
_AT_MOST_ONE_IN = 20  # seconds of copying, of a thread that copies now and then
_LOCAL = pafs.LocalFileSystem()


def is_uri(place: str) -> bool:
    """Whether a `storage_path` is an object store's URI, not a folder."""
    return "://" in place


def home(config: RunConfig) -> str:
    """The folder or URI that a run is kept at."""
    return buckets.join(config.storage_path, config.name)


def refuse_unwritable(storage_path: str) -> None:
    """Try it: write a file and remove it.

    Raises:
        UsageError: nothing can be written there; says why and what to do.
    """
    if not is_uri(storage_path):
        folder = Path(storage_path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UsageError(
                f"storage_path {storage_path} cannot be written ({error.strerror}); name a folder that can"
            ) from None
        return
    shown = buckets.without_options(storage_path)
    if not buckets.is_bucket(storage_path):
        schemes = ", ".join(f"{scheme}://" for scheme in buckets.SCHEMES)
        raise UsageError(
            f"storage_path {shown} is a URI that runs cannot be kept at; give a folder that all nodes share, "
            f"or one of {schemes}"
        )
    try:
        with beacon(storage_path):
            pass
    except buckets.FAILURES as error:
        raise UsageError(
            f"storage_path {shown} cannot be written ({buckets.reason(error)}); "
            f"{buckets.remedy(storage_path)}"
        ) from None


def for_ray(kept_at: str) -> tuple[pafs.FileSystem | None, str]:
    """Ray Train's `storage_filesystem` and `storage_path` of a run's checkpoints.

    Ray's own processes do not get the keys that the command has in its environment, so the filesystem takes
    them along; it crosses processes in memory and is never written.
    """
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    where = urlsplit(kept_at)
    if where.scheme != "s3" or "@" in where.netloc or not key or not secret:
        return None, kept_at
    store, path = buckets.opened(kept_at)
    named = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    options = {"endpoint_override": named.netloc, "scheme": named.scheme} if named.netloc else {}
    options |= {k: v for k, v in parse_qsl(where.query) if k in ("endpoint_override", "scheme")}
    session = os.environ.get("AWS_SESSION_TOKEN")
    return (
        pafs.S3FileSystem(
            access_key=key, secret_key=secret, session_token=session, region=store.region, **options
        ),
        path,
    )


@contextlib.contextmanager
def answering(place: str) -> Iterator[None]:
    """Inside, a storage that fails ends the command with one line.

    Raises:
        RunFailed: the storage failed.
    """
    try:
        yield
    except buckets.FAILURES as error:
        remedy = buckets.remedy(place) if is_uri(place) else "check the disk, or what is mounted there"
        raise RunFailed(
            f"{_shown(place)} cannot be read or written ({buckets.reason(error)}); {remedy}. "
            "The same command goes on from what is kept"
        ) from error


def _shown(place: str) -> str:
    return buckets.without_options(place) if is_uri(place) else place


# ---- one storage for all nodes ----


def refuse_unshared(storage_path: str) -> None:
    """Nothing with one node; else every node looks for a file that is written here.

    Raises:
        UsageError: a node does not see it, which names the node and the remedy.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from orchestrator.cluster.connection import secrets

    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(alive) < 2:
        return
    gone = (  # a node that has just gone says nothing
        ray.exceptions.NodeDiedError,
        ray.exceptions.LocalRayletDiedError,
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.ObjectLostError,
        ray.exceptions.TaskUnschedulableError,
    )
    look, environment = ray.remote(num_cpus=0, max_retries=0)(_look), ray.put(secrets(os.environ))
    with contextlib.ExitStack() as stack:
        with answering(storage_path):
            written = stack.enter_context(beacon(storage_path))
        asked = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                written, environment
            ): address
            for node, address in alive.items()
        }
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_WITHIN_S)
        for answer in answered:
            try:
                why = ray.get(answer)
            except gone:
                continue
            except ray.exceptions.RayError as error:
                raise UsageError(_unable(asked[answer], error)) from error
            if why is not None:
                raise UsageError(unshared(storage_path, asked[answer], why))
    if silent:
        log.warning(
            "whether storage_path %s is shared was not answered within %.0f s by: %s",
            _shown(storage_path),
            _ANSWER_WITHIN_S,
            ", ".join(sorted(asked[answer] for answer in silent)),
        )


def _look(written: str, environment: dict[str, str]) -> str | None:
    os.environ.update(environment)
    return visible(written)


def _unable(node: str, error: BaseException) -> str:
    lines = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
    return (
        f"node {node} could not look for storage_path ({lines[-1].strip()}); "
        "polyref must be installed there as it is here"
    )


def unshared(storage_path: str, node: str, why: str) -> str:
    """The refusal of a storage that a node does not reach, `why` being what `visible` said there."""
    if is_uri(storage_path):
        return (
            f"storage_path {buckets.without_options(storage_path)}: node {node} cannot read it ({why}); "
            f"{buckets.remedy(storage_path)}, on all nodes"
        )
    return (
        f"storage_path {storage_path} is not shared: node {node} does not see it ({why}); mount it on all "
        "nodes (NFS, EFS, Filestore), or give the URI of an object store, as in s3://bucket/runs"
    )


def visible(written: str) -> str | None:
    """Why this process does not see a file that another one wrote; None if it does.

    A mount may lag behind: it is looked for during some seconds.
    """
    try:
        if is_uri(written):
            store, path = buckets.opened(written)
            found = store.get_file_info(path).type == pafs.FileType.File
            return None if found else "the store has no such object there"
        give_up = time.monotonic() + _SEEN_WITHIN_S
        while not Path(written).exists():
            if time.monotonic() >= give_up:
                above = Path(written).parent
                return "the folder there is another one" if above.is_dir() else "no such folder there"
            time.sleep(0.2)
    except buckets.FAILURES as error:
        return buckets.reason(error)
    return None


@contextlib.contextmanager
def beacon(storage_path: str) -> Iterator[str]:
    """Inside, a small file of a name that never was lies in the storage; yields its place."""
    place = buckets.join(storage_path, f"{_SEEN}{uuid.uuid4().hex}")
    if is_uri(place):
        store, path = buckets.opened(place)
        with store.open_output_stream(path) as stream:
            stream.write(b"polyref")
        try:
            yield place
        finally:
            with contextlib.suppress(*buckets.FAILURES):
                store.delete_file(path)
    else:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_bytes(b"polyref")
        try:
            yield place
        finally:
            Path(place).unlink(missing_ok=True)


# ---- a run's files ----


def working_folder(kept_at: str, worker: int | None = None) -> Path:
    """Where a run is worked on: its folder itself, or on this machine a copy of what an object store keeps.

    The command has one, and each worker that writes, by its rank: they may be on one machine.
    """
    if not is_uri(kept_at):
        return Path(kept_at)
    place = kept_at.partition("?")[0]
    whose = "driver" if worker is None else f"worker-{worker}"
    cache = Path(os.environ.get("POLYREF_CACHE") or Path.home() / ".cache" / "polyref").expanduser()
    digest = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
    return cache.absolute() / "runs" / f"{place.rpartition('/')[2]}-{digest}" / whose


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
                    elif entry.base_name != hold.NAME:
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
                    stack.enter_context(hold.of_folder(self.folder))
                else:
                    mine = hold.Hold(self._store, self._root, str(self))
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


def _fetch(store: pafs.FileSystem, path: str, target: Path) -> None:
    """Replace `target` with a copy of the file or folder kept at `path`; without one it goes."""
    kind = store.get_file_info(path).type
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if kind == pafs.FileType.NotFound:
            _discard(target)
            return
        if kind == pafs.FileType.Directory:
            part.mkdir()
        pafs.copy_files(
            path, str(part), source_filesystem=store, destination_filesystem=_LOCAL, chunk_size=_CHUNK
        )
        if kind == pafs.FileType.Directory:
            _discard(target)
        os.replace(part, target)
    finally:
        _discard(part)


def _put(source: Path, store: pafs.FileSystem, path: str) -> None:
    """Keep a file or a folder; what a folder held before and no longer holds goes after the rest is there."""
    pafs.copy_files(  # one thread: Arrow's parallel uploads may block each other
        str(source), path, source_filesystem=_LOCAL, destination_filesystem=store, use_threads=False
    )
    if source.is_dir():
        here = {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}
        for entry in store.get_file_info(pafs.FileSelector(path, recursive=True)):
            if entry.is_file and os.path.relpath(entry.path, path) not in here:
                store.delete_file(entry.path)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
