"""Connecting to Ray: an existing cluster when there is one, else one on this machine."""

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
from orchestrator.environment import exclude_loopback_from_proxies
from orchestrator.errors import UsageError

NAMESPACE = "polyref"


@contextlib.contextmanager
def connect_to_ray(*, wait_minutes: float = 10) -> Iterator[None]:
    """Inside, `ray` is connected to RAY_ADDRESS, to this machine's running cluster, or to a new local one.

    A connection that was there before is left as it is. Raises UsageError where RAY_ADDRESS does not answer.
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
        # Workers of a cluster of our own inherit this process's environment. The variable does what `ray.init`
        # makes of `worker_process_setup_hook`, without which Ray's prestarted workers would be of no use.
        hook = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: SETUP_HOOK}
        for name, value in (WORKER_ENVIRONMENT | LOCAL_ENVIRONMENT | hook).items():
            os.environ.setdefault(name, value)
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
    """RAY_ADDRESS; else the cluster that runs on this machine; else "local", a new one.

    Tried first: Ray itself would try for minutes, also where a killed cluster left its address behind.
    """
    given = os.environ.get("RAY_ADDRESS") or "auto"
    if given == "local":
        return given
    if given != "auto":
        if not _is_reachable(given):
            raise UsageError(
                f"no Ray answers at {given}, which RAY_ADDRESS names: start it (`ray up`, `ray start "
                "--head`), correct the address, or unset it for a Ray of this machine's own"
            )
        return given
    noted = get_ray_address_file(None)
    started = Path(noted).read_text().strip() if os.path.exists(noted) else ""
    return started if started and _is_reachable(started) else "local"


def _is_reachable(address: str) -> bool:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def keep_ctrl_c_handler() -> Iterator[None]:
    """Around a run of Ray Train or Tune, which leave their handler of Ctrl-C in place: puts ours back."""
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
    """A job that is stopped gets SIGTERM: it ends as by Ctrl-C and leaves nothing behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _build_start_timeout(minutes: float) -> dict[str, str]:
    """A finite wait for workers that other jobs keep from starting."""
    return {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(60 * minutes)}
