"""SIGTERM ends training after a checkpoint: the command puts up a sign that the first worker looks for.

The others learn of it with the sums of a step (`StepTable`), so that all of them stop after the same one.
"""

import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from rich.console import Console

from orchestrator.cluster.connection import NAMESPACE

LOOK_EVERY_S = 0.5


class StopSign:
    """An actor of which only the name matters; Ray knows that before the actor runs anywhere."""


class StopListener:
    """Looks for a stop sign now and then.

    Args:
        name: the sign's name; None if nothing can ask this training to stop.
    """

    def __init__(self, name: str | None) -> None:
        self._name, self._is_up, self._looked_at = name, False, 0.0

    def is_stop_requested(self) -> bool:
        """Return whether the sign is up, as far as this process has seen."""
        now = time.monotonic()
        if self._name is not None and not self._is_up and now - self._looked_at > LOOK_EVERY_S:
            self._looked_at = now
            try:
                ray.get_actor(self._name, namespace=NAMESPACE)
                self._is_up = True
            except ValueError:
                pass
        return self._is_up


@contextmanager
def stop_on_sigterm(console: Console) -> Iterator[str]:
    """Yield the name of the sign that the first SIGTERM in the block puts up; a second one interrupts.

    Outside the main thread SIGTERM is left alone.
    """
    name = f"stop-{uuid.uuid4().hex}"
    asked, ended = threading.Event(), threading.Event()

    def put_up_sign() -> None:
        asked.wait()
        if ended.is_set():
            return
        console.print("SIGTERM: training stops after this step and a checkpoint; again to stop at once")
        sign = ray.remote(StopSign).options(name=name, namespace=NAMESPACE, num_cpus=0).remote()
        ended.wait()
        ray.kill(sign)

    # A signal's handler must not call Ray itself: it may have interrupted a call of Ray.
    thread = threading.Thread(target=put_up_sign, name="stop-on-sigterm", daemon=True)
    thread.start()
    try:
        with _handle_first_sigterm(asked):
            yield name
    finally:
        ended.set()
        asked.set()
        thread.join()


@contextmanager
def _handle_first_sigterm(asked: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
