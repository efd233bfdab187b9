"""Ctrl-C ends a command with exit code 130 and one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """Ctrl-C, under a name that the command-line library does not swallow."""


@contextmanager
def turn_ctrl_c_into_interruption() -> Iterator[None]:
    """Raise `Interrupted` for a Ctrl-C in the block."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted from None
