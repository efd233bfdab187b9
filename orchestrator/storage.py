"""Where runs are kept: a folder that all nodes share, or an object store by URI.

Of a run on an object store every process has a working copy in a local folder, which stands for nothing: it
is made from the store when the process starts, and what is worth keeping is put there as whole objects.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
from filelock import FileLock, Timeout

from orchestrator.config import RunConfig, UsageError
from preferences import buckets

log = logging.getLogger(__name__)

FAILURES = (OSError, pa.ArrowException)
"""What the client of an object store raises."""
_CHUNK = 64 * 2**20
_HOLD, _BEAT_S, _SILENT_S = ".held.json", 5.0, 20.0
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
    except FAILURES as error:
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


# ---- one storage for all nodes ----


def refuse_unshared(storage_path: str) -> None:
    """Nothing with one node; else every node looks for a file that is written here.

    Raises:
        UsageError: a node does not see it, which names the node and the remedy.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from orchestrator.cluster import secrets

    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(alive) < 2:
        return
    look, environment = ray.remote(num_cpus=0, max_retries=0)(_look), ray.put(secrets(os.environ))
    with beacon(storage_path) as written:
        asked = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                written, environment
            ): address
            for node, address in alive.items()
        }
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_WITHIN_S)
        for answer in answered:
            with contextlib.suppress(ray.exceptions.RayError):  # a node that has just gone says nothing
                why = ray.get(answer)
                if why is not None:
                    raise UsageError(unshared(storage_path, asked[answer], why))


def _look(written: str, environment: dict[str, str]) -> str | None:
    os.environ.update(environment)
    return visible(written)


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
    except FAILURES as error:
        return buckets.reason(error)
    return None


@contextlib.contextmanager
def beacon(storage_path: str) -> Iterator[str]:
    """Inside, a small file of a name that never was lies in the storage; yields its place."""
    place = buckets.join(storage_path, f".seen-{uuid.uuid4().hex}")
    if is_uri(place):
        store, path = buckets.opened(place)
        with store.open_output_stream(path) as stream:
            stream.write(b"polyref")
        try:
            yield place
        finally:
            with contextlib.suppress(*FAILURES):
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
        self._store: pafs.FileSystem | None = None
        if is_uri(kept_at):
            self._store, self._root = buckets.opened(kept_at)
            self.folder.mkdir(parents=True, exist_ok=True)
        self._busy = threading.Lock()

    @property
    def remote(self) -> bool:
        """Whether files are kept elsewhere than they are worked on."""
        return self._store is not None

    def __str__(self) -> str:
        return buckets.without_options(self.home) if self.remote else self.home

    def place(self, *names: str) -> str:
        """Where something of the run is kept, as a person is told."""
        return buckets.join(str(self), *names)

    def pull(self, *names: str) -> None:
        """Make files and folders here what is kept; what is not kept goes."""
        if self._store is None:
            return
        with self._busy:
            for name in names:
                _fetch(self._store, f"{self._root}/{name}", self.folder / name)

    def push(self, *names: str) -> None:
        """Keep files and folders as they are here; each file appears whole or not at all.

        Raises:
            OSError, ArrowException: the store does not take them.
        """
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
        found = self._store.get_file_info(pafs.FileSelector(f"{self._root}/{under}", allow_not_found=True))
        return sorted(entry.base_name for entry in found if entry.type == pafs.FileType.Directory)

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A folder that is kept, for reading: itself, or a copy that goes afterwards."""
        if self._store is None:
            yield self.folder / name
            return
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".fetched-") as room:
            copy = Path(room) / Path(name).name
            _fetch(self._store, f"{self._root}/{name}", copy)
            yield copy

    def remove(self) -> None:
        """Forget the run: all that is kept of it, and the working copy."""
        if self._store is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            if self._store.get_file_info(self._root).type == pafs.FileType.Directory:
                self._store.delete_dir_contents(self._root)
            return
        if self.folder.exists():
            doomed = self.folder.with_name(f".{self.folder.name}.removed")
            shutil.rmtree(doomed, ignore_errors=True)
            self.folder.rename(doomed)
            shutil.rmtree(doomed)

    def discard(self) -> None:
        """The working copy goes, where there is one, with whatever was not pushed."""
        if self.remote:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def pushing(self, *names: str, every_s: float = 15.0) -> Iterator[None]:
        """Inside, files are kept again and again while they grow; a store that is away only delays that."""
        with self._every(every_s, lambda: self.push(*names)):
            yield

    @contextlib.contextmanager
    def pulling(self, *names: str, every_s: float = 10.0) -> Iterator[None]:
        """Inside, files here follow what is kept; at the end they are as it is."""
        with self._every(every_s, lambda: self.pull(*names)):
            yield
        self.pull(*names)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run for this process; the hold goes with the process, however it ends.

        On an object store, which knows no locks, the process shows that it is alive: who finds another's
        sign waits whether it changes, for up to 20 seconds after a process was killed.

        Raises:
            UsageError: another process is training this run.
        """
        if self._store is None:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder.with_name(f".{self.folder.name}.lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise UsageError(self._taken("another process")) from None
            try:
                yield
            finally:
                lock.release()
            return
        self._refuse_held()
        me = {"id": uuid.uuid4().hex, "where": _machine(), "pid": os.getpid()}
        self._sign(me)
        try:
            with self._every(_BEAT_S, lambda: self._sign(me)):
                yield
        finally:
            with contextlib.suppress(*FAILURES):
                self._store.delete_file(f"{self._root}/{_HOLD}")

    def _taken(self, by: str) -> str:
        name = Path(self.home.partition("?")[0]).name
        return f"run {name!r} in {self} is being trained by {by}; wait for it, or give this run another name"

    def _refuse_held(self) -> None:
        """Wait until another's sign of life is old, unless its process is known to be gone."""
        seen = self._signed()
        if seen is None or _is_gone(seen):
            return
        give_up = time.monotonic() + _SILENT_S
        while time.monotonic() < give_up:
            time.sleep(1)
            now = self._signed()
            if now is None:
                return
            if now != seen:
                raise UsageError(self._taken(f"process {now['pid']} on {now['where'][0]}"))

    def _signed(self) -> dict[str, Any] | None:
        assert self._store is not None
        try:
            with self._store.open_input_file(f"{self._root}/{_HOLD}") as file:
                return dict(json.loads(file.read()))
        except FileNotFoundError:
            return None

    def _sign(self, me: dict[str, Any]) -> None:
        assert self._store is not None
        with self._store.open_output_stream(f"{self._root}/{_HOLD}") as stream:
            stream.write(json.dumps(me | {"beat": time.time()}).encode())

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
        except FAILURES as error:
            if not away:
                log.warning("%s does not answer (%s); it is tried again", place, buckets.reason(error))
            away = True
        pause = max(seconds, _AT_MOST_ONE_IN * (time.monotonic() - began))  # files grow, and so does the time


def _machine() -> list[str]:
    """What a process id is unique in: the machine, and the container on it."""
    container = Path("/proc/self/ns/pid")
    return [socket.gethostname(), os.readlink(container) if container.is_symlink() else ""]


def _is_gone(signed: dict[str, Any]) -> bool:
    """Whether a sign is of a process of this very machine that has ended."""
    if signed["where"] != _machine():
        return False
    try:
        os.kill(signed["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


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
