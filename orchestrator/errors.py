"""Errors that end a command with one message, and the hint that it ends with."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The user's input is wrong; the message says where and what to do. The command exits with 2."""


class RunFailed(RuntimeError):
    """The run itself failed, not its input; the message says why. The command exits with 1."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of the options, or the list of them."""
    options = list(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(map(str, options))}"
