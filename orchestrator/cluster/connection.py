"""Connecting to Ray: to an existing cluster if there is one, else to a new one on this machine."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_ray_address_file
from ray._private import ray_constants

from orchestrator.cluster.ray_token import check_token, protect_local_ray, use_machine_token
from orchestrator.cluster.worker_environment import (
    DRIVER_ENVIRONMENT,
    LOCAL_ENVIRONMENT,
    SETUP_HOOK,
    WORKER_ENVIRONMENT,
    build_runtime_env,
)
from orchestrator.environment import exclude_loopback_from_proxies, set_environment
from orchestrator.errors import UsageError

NAMESPACE = "polyref"


@contextlib.contextmanager
def connect_to_ray(*, wait_minutes: float = 10) -> Iterator[None]:
    """Connect `ray` in the block: to RAY_ADDRESS, this machine's running cluster, or a new local one.

    An existing connection is used and left open. A new Ray is this process's own
    (`orchestrator.cluster.ray_token`).

    Args:
        wait_minutes: how long Ray Train may wait for workers to start.

    Raises:
        UsageError: RAY_ADDRESS does not answer, or Ray refuses this process's token.
    """
    for name, value in (DRIVER_ENVIRONMENT | _build_start_timeout(wait_minutes)).items():
        os.environ.setdefault(name, value)
    exclude_loopback_from_proxies()
    if ray.is_initialized():
        yield
        return
    address = _find_address()
    if address == "local":
        with start_local_ray(), _convert_sigterm_to_ctrl_c():  # in this order: Ray sets a handler too
            yield
        return
    with _authenticate(address):
        runtime_env = build_runtime_env(os.environ)
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR, runtime_env=runtime_env)
        try:
            with _convert_sigterm_to_ctrl_c():
                yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def start_local_ray(**options: Any) -> Iterator[None]:
    """Start a Ray on this machine that serves this process alone, and end it after the block.

    Ray Train needs its dashboard: there it learns that a trial has failed, and frees what the trial held.

    Args:
        options: of `ray.init`.
    """
    for name, value in (WORKER_ENVIRONMENT | LOCAL_ENVIRONMENT).items():
        os.environ.setdefault(name, value)  # the processes of the new Ray inherit them
    with protect_local_ray():
        with set_environment(**_build_local_settings()):
            ray.init(address="local", namespace=NAMESPACE, logging_level=logging.ERROR, **options)
        try:
            yield
        finally:
            ray.shutdown()


def _build_local_settings() -> dict[str, str]:
    """Return the variables that a new Ray is started with, and its processes have.

    Processes of Ray's libraries look for its address, and fail where they find several: they get their own.
    The hook is given by the variable that Ray itself uses: in a `runtime_env` it would make the workers
    unusable that a new cluster starts in advance.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        ray_constants.GCS_PORT_ENVIRONMENT_VARIABLE: str(port),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: SETUP_HOOK,
    }


@contextlib.contextmanager
def _authenticate(address: str) -> Iterator[None]:
    """Send the token that a running Ray asks for in the block, and check that it accepts this process.

    As Ray itself does, the machine's token is sent unasked only to a Ray that was found on the machine.
    """
    with use_machine_token() if not _read_ray_address() else contextlib.nullcontext():
        if not address.startswith("ray://"):
            check_token(address)
        yield


def _read_ray_address() -> str | None:
    """Return what RAY_ADDRESS names, and None where Ray is to be looked for on this machine."""
    given = os.environ.get("RAY_ADDRESS")
    return None if given == "auto" else given or None


def _find_address() -> str:
    """Return RAY_ADDRESS; else the address of this machine's running cluster; else "local", for a new one.

    The address is tried here first, because Ray itself would retry for minutes, also where a killed cluster
    left its address behind.
    """
    given = _read_ray_address()
    if given == "local":
        return given
    if given:
        if not _is_reachable(given):
            raise UsageError(
                f"no Ray answers at {given}, which RAY_ADDRESS names: start it (`ray up`, `ray start "
                "--head`), correct the address, or unset it to start Ray on this machine"
            )
        return given
    address_file = Path(get_ray_address_file(None))
    running = address_file.read_text().strip() if address_file.exists() else ""
    return running if running and _is_reachable(running) else "local"


def _is_reachable(address: str) -> bool:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
            return _answers_grpc(connection)
    except (OSError, ValueError, OverflowError):  # of a port beyond ports
        return False


def _answers_grpc(connection: socket.socket) -> bool:
    """Whether an HTTP/2 server is there, as Ray's are: with another, Ray would wait for two minutes and exit.

    The port of Ray's dashboard is such another.
    """
    if os.environ.get("RAY_USE_TLS", "0") == "1":
        return True
    # RFC 9113, section 3.4: each side begins with a SETTINGS frame, whose fourth byte is 4.
    connection.settimeout(15)
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    return connection.recv(4)[3:] == b"\x04"


@contextlib.contextmanager
def keep_ctrl_c_handler() -> Iterator[None]:
    """Restore our Ctrl-C handler after the block: Ray Train and Tune leave theirs in place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _convert_sigterm_to_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM, which a stopped job gets, as Ctrl-C in the block: it ends and leaves nothing behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's script starts commands with `&`
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _build_start_timeout(minutes: float) -> dict[str, str]:
    """Return the variable that limits how long workers wait to start while other jobs use the cluster."""
    return {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(60 * minutes)}
