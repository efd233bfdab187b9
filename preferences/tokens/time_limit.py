"""A bound on the time that a chat template, a program by the model's author, may compute."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_REPEAT_S = 1.0
_is_limited = False


@contextmanager
def limit_computing(seconds: float, build_error: Callable[[], Exception]) -> Iterator[None]:
    """Raise an error inside the block once this process has computed for `seconds` of CPU time in it.

    Computing time, so that a machine that is busy with other things or was asleep does not count. Within
    another limit this one does nothing. Outside of a process's main thread, where Python handles no signals,
    there is no bound.
    """
    global _is_limited  # a timer takes system calls, so an outer one saves those of the inner ones
    if _is_limited or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise build_error()

    handler = signal.signal(signal.SIGVTALRM, stop)
    # Repeated, because code that handles errors of its own may swallow one.
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _REPEAT_S)
    _is_limited = True
    try:
        yield
    finally:
        _is_limited = False
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, handler)
