"""Connecting to Ray: to an existing cluster if there is one, else to a new one on this machine."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import ray
from ray._common.utils import get_ray_address_file
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

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

    An existing connection is used and left open.

    Args:
        wait_minutes: how long Ray Train may wait for workers to start.

    Raises:
        UsageError: RAY_ADDRESS does not answer.
    """
    for name, value in (DRIVER_ENVIRONMENT | _build_start_timeout(wait_minutes)).items():
        os.environ.setdefault(name, value)
    exclude_loopback_from_proxies()
    if ray.is_initialized():
        yield
        return
    address = _find_address()
    local = address == "local"
    if local:
        # Workers of a cluster that this process starts inherit its environment.
        for name, value in (WORKER_ENVIRONMENT | LOCAL_ENVIRONMENT).items():
            os.environ.setdefault(name, value)
    # The hook is given by the variable that Ray itself uses: in a `runtime_env` it would make the workers
    # unusable that a new cluster starts in advance.
    with set_environment(**({WORKER_PROCESS_SETUP_HOOK_ENV_VAR: SETUP_HOOK} if local else {})):
        ray.init(
            address=address,
            namespace=NAMESPACE,
            logging_level=logging.ERROR,
            runtime_env=None if local else build_runtime_env(os.environ),
        )
    try:
        with _convert_sigterm_to_ctrl_c():
            yield
    finally:
        ray.shutdown()


def _find_address() -> str:
    """Return RAY_ADDRESS; else the address of this machine's running cluster; else "local", for a new one.

    The address is tried here first, because Ray itself would retry for minutes, also where a killed cluster
    left its address behind.
    """
    given = os.environ.get("RAY_ADDRESS") or "auto"
    if given == "local":
        return given
    if given != "auto":
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
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


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
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _build_start_timeout(minutes: float) -> dict[str, str]:
    """Return the variable that limits how long workers wait to start while other jobs use the cluster."""
    return {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(60 * minutes)}
