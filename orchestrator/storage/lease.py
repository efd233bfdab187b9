"""One process at a time trains a run: a lock beside its folder, or a sign of life on an object store.

A lock goes with its process. An object store knows no locks, so there the process signs again and again:
who finds another's sign waits whether it changes, and who has signed looks whether the sign stayed its own.
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
"""The sign's name in the run's folder on an object store."""
_RENEW_S = 5.0
_EXPIRY_S = 120.0  # clients try for up to a minute before they say that a store does not answer
_SETTLE_S = 2.0  # within which another who saw no sign either has signed
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Inside, this process has the run; the lock goes with the process, however it ends.

    Raises:
        UsageError: another process has it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(_format_refusal(str(folder), "another process")) from None
    try:
        yield
    finally:
        lock.release()


class RunLease:
    """This process's claim to a run on an object store.

    Args:
        store: the object store.
        folder: the run's folder there.
        shown: the run's place, as a person is told.
    """

    def __init__(self, store: pafs.FileSystem, folder: str, shown: str) -> None:
        self._store, self._path, self._place = store, f"{folder}/{LEASE_FILE}", shown
        self._owner = {"id": uuid.uuid4().hex, "where": _identify_machine(), "pid": os.getpid()}
        self._loss_message: str | None = None

    def acquire(self) -> None:
        """Sign, unless another does; after a process that was killed elsewhere this waits for two minutes.

        Raises:
            UsageError: another process trains the run.
            OSError, ArrowException: the store does not answer.
        """
        self._wait_for_expiry()
        began = time.monotonic()
        self._write_lease()
        time.sleep(max(_SETTLE_S, 3 * (time.monotonic() - began)))
        self._refuse_other_owner()

    def _refuse_other_owner(self) -> None:
        seen = self._read_lease()
        if seen is None or seen["id"] != self._owner["id"]:
            raise UsageError(_format_refusal(self._place, _describe_owner(seen)))

    def _wait_for_expiry(self) -> None:
        """Wait until another's sign of life is old, unless its process is known to be gone."""
        seen = self._read_lease()
        if seen is None or _is_owner_gone(seen):
            return
        give_up, told = time.monotonic() + _EXPIRY_S, time.monotonic() + 2 * _RENEW_S
        while time.monotonic() < give_up:
            time.sleep(1)
            now = self._read_lease()
            if now is None:
                return
            if now != seen:
                raise UsageError(_format_refusal(self._place, _describe_owner(now)))
            if time.monotonic() >= told:
                told = give_up
                log.warning(
                    "%s was being trained by %s, which has not signed since; after %.0f s it counts as gone",
                    self._place,
                    _describe_owner(seen),
                    _EXPIRY_S,
                )

    @contextlib.contextmanager
    def keep_renewed(self) -> Iterator[None]:
        """Inside, the sign is renewed; at the end it goes.

        Raises:
            RunFailed: another process has taken the run meanwhile; entered in the main thread, this ends
                what runs inside at once.
        """
        stop = threading.Event()
        interrupts = threading.current_thread() is threading.main_thread()
        thread = threading.Thread(target=self._renew_until, args=(stop, interrupts), name="hold", daemon=True)
        thread.start()
        try:
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

    def _renew_until(self, stop: threading.Event, interrupts: bool) -> None:
        away = False
        while not stop.wait(_RENEW_S):
            try:
                seen = self._read_lease()
                if seen is not None and seen["id"] == self._owner["id"]:
                    self._write_lease()
                    away = False
                    continue
            except buckets.STORE_ERRORS as error:
                if not away:
                    log.warning("%s does not answer (%s)", self._place, buckets.describe_error(error))
                away = True
                continue
            self._loss_message = (
                f"{self._place} was taken by {_describe_owner(seen)} while this process was training it, "
                "so this one stops"
            )
            log.error(self._loss_message)
            if interrupts and not stop.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            return

    def _release(self) -> None:
        seen = self._read_lease()
        if seen is not None and seen["id"] == self._owner["id"]:
            self._store.delete_file(self._path)

    def _read_lease(self) -> dict[str, Any] | None:
        try:
            with self._store.open_input_file(self._path) as file:
                signed = file.read()
        except FileNotFoundError:
            return None
        try:
            return dict(json.loads(signed))
        except ValueError:  # no process of ours wrote that
            return None

    def _write_lease(self) -> None:
        with self._store.open_output_stream(self._path) as stream:
            stream.write(json.dumps(self._owner | {"beat": time.time()}).encode())


def _format_refusal(place: str, by: str) -> str:
    name = place.rpartition("/")[2]
    return f"run {name!r} in {place} is being trained by {by}; wait for it, or give this run another name"


def _describe_owner(signed: dict[str, Any] | None) -> str:
    return "another process" if signed is None else f"process {signed['pid']} on {signed['where'][0]}"


def _identify_machine() -> list[str]:
    """What a process id is unique in: the machine since it was started, and the container on it."""
    container = Path("/proc/self/ns/pid")
    return [
        socket.gethostname(),
        os.readlink(container) if container.is_symlink() else "",
        _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "",
    ]


def _is_owner_gone(signed: dict[str, Any]) -> bool:
    """Whether a sign is of a process of this very machine that has ended."""
    if signed["where"] != _identify_machine():
        return False
    try:
        os.kill(signed["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
