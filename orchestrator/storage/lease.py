"""One process at a time trains a run: a lock file beside its folder, or a lease on an object store.

The operating system releases a lock when its process ends. Object stores have no locks, so the owner of a
run writes a lease file there and renews it periodically. A process that finds another's lease waits to see
whether it is renewed; a process that has written its own reads it back to check that no other replaced it.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from filelock import FileLock, Timeout

from orchestrator.errors import RunFailed, UsageError
from preferences import buckets

log = logging.getLogger(__name__)

LEASE_FILE = ".held.json"
"""The lease's file name in the run's folder on an object store."""
_RENEW_S = 5.0
_EXPIRY_S = 120.0  # clients retry for up to a minute before they report that a store does not answer
_SETTLE_S = 2.0  # within which another process that saw no lease either has written its own
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process inside the block; the lock ends with the process in any case.

    Raises:
        UsageError: another process has locked it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(_format_refusal(str(folder), "another process")) from None
    except OSError as error:
        raise UsageError(
            f"{lock.lock_file} cannot be locked ({error.strerror}); move away what is there"
        ) from None
    try:
        yield
    finally:
        lock.release()


class RunLease:
    """This process's lease of a run on an object store.

    Args:
        store: the object store.
        folder: the run's folder there.
        place: the run's location as messages show it, without credentials.
    """

    def __init__(self, store: pafs.FileSystem, folder: str, place: str) -> None:
        self._store, self._path, self._place = store, f"{folder}/{LEASE_FILE}", place
        self._owner = {"id": uuid.uuid4().hex, "where": _identify_machine(), "pid": os.getpid()}
        self._loss_message: str | None = None

    def acquire(self) -> None:
        """Write the lease, unless another process renews one.

        Where the lease of a process that was killed on another machine is left, this waits for two minutes.

        Raises:
            UsageError: another process is training the run.
            OSError, ArrowException: the store does not answer.
        """
        self._wait_for_expiry()
        began = time.monotonic()
        self._write_lease()
        time.sleep(max(_SETTLE_S, 3 * (time.monotonic() - began)))
        self._refuse_other_owner()

    def _refuse_other_owner(self) -> None:
        lease = self._read_lease()
        if lease is None or lease["id"] != self._owner["id"]:
            raise UsageError(_format_refusal(self._place, _describe_owner(lease)))

    def _wait_for_expiry(self) -> None:
        """Wait until another's lease has expired, unless its process is known to have ended."""
        found = self._read_lease()
        if found is None or _is_owner_gone(found):
            return
        expires_at, warn_at = time.monotonic() + _EXPIRY_S, time.monotonic() + 2 * _RENEW_S
        while time.monotonic() < expires_at:
            time.sleep(1)
            current = self._read_lease()
            if current is None:
                return
            if current != found:
                raise UsageError(_format_refusal(self._place, _describe_owner(current)))
            if time.monotonic() >= warn_at:
                warn_at = expires_at
                log.warning(
                    "%s was being trained by %s, which has not renewed its lease since; after "
                    "%.0f s it counts as gone",
                    self._place,
                    _describe_owner(found),
                    _EXPIRY_S,
                )

    @contextlib.contextmanager
    def keep_renewed(self) -> Iterator[None]:
        """Renew the lease inside the block and delete it at the end.

        Raises:
            RunFailed: another process has taken the run meanwhile. Entered in the main thread, the block is
                interrupted at once.
        """
        stop = threading.Event()
        try:
            with _accept_interruption() as interruption:
                thread = threading.Thread(
                    target=self._renew_until, args=(stop, interruption), name="lease", daemon=True
                )
                thread.start()
                try:
                    yield
                finally:
                    stop.set()
                    thread.join()
        except KeyboardInterrupt:
            if self._loss_message is None:
                raise
            raise RunFailed(self._loss_message) from None
        finally:
            with contextlib.suppress(*buckets.STORE_ERRORS):
                self._release()

    def _renew_until(self, stop: threading.Event, interruption: signal.Signals | None) -> None:
        unreachable = False
        while not stop.wait(_RENEW_S):
            try:
                lease = self._read_lease()
                if lease is not None and lease["id"] == self._owner["id"]:
                    self._write_lease()
                    unreachable = False
                    continue
            except buckets.STORE_ERRORS as error:
                if not unreachable:
                    log.warning("%s does not answer (%s)", self._place, buckets.describe_error(error))
                unreachable = True
                continue
            self._loss_message = (
                f"{self._place} was taken by {_describe_owner(lease)} while this process was training it, "
                "so this one stops"
            )
            log.error(self._loss_message)
            if interruption is not None and not stop.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, interruption)
            return

    def _release(self) -> None:
        lease = self._read_lease()
        if lease is not None and lease["id"] == self._owner["id"]:
            self._store.delete_file(self._path)

    def _read_lease(self) -> dict[str, Any] | None:
        try:
            with self._store.open_input_file(self._path) as file:
                content = file.read()
        except FileNotFoundError:
            return None
        try:
            return dict(json.loads(content))
        except ValueError:  # polyref did not write it
            return None

    def _write_lease(self) -> None:
        with self._store.open_output_stream(self._path) as stream:
            stream.write(json.dumps(self._owner | {"beat": time.time()}).encode())


@contextlib.contextmanager
def _accept_interruption() -> Iterator[signal.Signals | None]:
    """Yield the signal that raises KeyboardInterrupt in the block; None outside the main thread.

    Where Ctrl-C is ignored, as in what a shell's script starts with `&`, it is another one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield None
    elif signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield signal.SIGINT
    else:
        before = signal.signal(signal.SIGUSR2, signal.default_int_handler)
        try:
            yield signal.SIGUSR2
        finally:
            signal.signal(signal.SIGUSR2, before)


def _format_refusal(place: str, owner: str) -> str:
    name = place.rpartition("/")[2]
    return f"run {name!r} in {place} is being trained by {owner}; wait for it, or give this run another name"


def _describe_owner(lease: dict[str, Any] | None) -> str:
    return "another process" if lease is None else f"process {lease['pid']} on {lease['where'][0]}"


def _identify_machine() -> list[str]:
    """Return what a process id is unique in: a machine's host name, its container and its last boot."""
    namespace = Path("/proc/self/ns/pid")
    return [
        socket.gethostname(),
        str(namespace.readlink()) if namespace.is_symlink() else "",
        _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "",
    ]


def _is_owner_gone(lease: dict[str, Any]) -> bool:
    """Whether a lease belongs to a process of this same machine that has ended."""
    if lease["where"] != _identify_machine():
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
