"""Errors that end a command with one message, and the spelling hint in such messages."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The user's input is wrong; the message says where and what to do. The command exits with 2."""


class RunFailed(RuntimeError):
    """The run itself failed, not its input; the message says why. The command exits with 1."""


class RunStopped(RunFailed):
    """The run ended after a checkpoint because SIGTERM asked it to. The command exits with 143."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` with the closest option, or the list of options if none is close."""
    options = list(options)
    closest = difflib.get_close_matches(word[:100], options, n=1, cutoff=0.6)
    return f"; did you mean {closest[0]!r}?" if closest else f"; known are {', '.join(map(str, options))}"
