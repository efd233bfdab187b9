"""A preference after it is read, `Pair`, and the errors that reading one can raise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, Any]
"""One turn: `role`, `content` (text), and other keys that the chat template reads, such as `tool_calls`."""


_LONGEST_DETAIL = 600
"""Characters of what is said of a row, which may quote it."""


class DataError(ValueError):
    """The data cannot be used. The message names the place (`train.jsonl:17`) and the remedy."""


class BadRow(DataError):
    """One row cannot be used: it stops loading, or is counted under `reason` if `on_bad_row` is `skip`."""

    def __init__(self, place: str, reason: str, detail: str) -> None:
        detail = detail if len(detail) <= _LONGEST_DETAIL else f"{detail[:_LONGEST_DETAIL]}..."
        super().__init__(place, reason, detail)  # all in args, because an exception is pickled by its args
        self.place, self.reason, self.detail = place, reason, detail

    def __str__(self) -> str:
        return (
            f"{self.place}: {self.detail}; fix the row, or set data.on_bad_row: skip to leave such rows out"
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, of which `chosen` was preferred by the share `soft_label` of people.

    A pair is either all plain text or all messages: then `prompt` is the conversation up to the response, and
    each response is a list of one assistant message. `rejected` is None where only completions are trained
    on. `soft_label` is in [1/2, 1] (the responses of a row below 1/2 are exchanged: `swapped`).
    `source` is the place to name in an error; `tools` are JSON schemas for the chat template; `weight` is the
    pair's in the loss.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message] | None
    soft_label: float = 1.0
    source: str = ""
    tools: list[dict[str, Any]] | None = None
    swapped: bool = False
    weight: float = 1.0

    @property
    def is_chat(self) -> bool:
        """Whether the chat template applies: messages, not plain text."""
        return not isinstance(self.prompt, str)

    def put_majority_first(self) -> "Pair":
        """Return the same preference with the response that most people preferred as `chosen`."""
        if self.soft_label >= 0.5 or self.rejected is None:
            return self
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            soft_label=1.0 - self.soft_label,
            swapped=True,
        )


def find_implicit_prompt_end(chosen: str, rejected: str) -> int:
    """Find where the implicit prompt of two texts ends: their longest common prefix of whole words.

    As in TRL's `extract_prompt`, one space before the responses belongs to the responses, a newline to the
    prompt. Unlike in TRL, words that merely begin alike (`blue`, `black`) are not cut in two.
    """
    end = count_common_prefix(chosen, rejected)
    next_letters = (chosen[end : end + 1], rejected[end : end + 1])
    if end and not chosen[end - 1].isspace() and not all(letter.isspace() for letter in next_letters):
        while end and not chosen[end - 1].isspace():
            end -= 1
    return end - 1 if end and chosen[end - 1] == " " else end


def count_common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Count the leading characters or messages that are the same."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # bisection compares slices, which is far faster than a loop over characters
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
