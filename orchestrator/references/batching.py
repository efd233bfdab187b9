"""Batches that fill a replica: grouped by prompt, with rows of similar length."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.references.messages import Ids, PromptGroup


@dataclass
class Batch:
    """Groups for one call of a replica.

    Attributes:
        groups: the prompts and responses.
        attempts: replicas that died, or gave impossible scores, while scoring it.
        copies: replicas that are scoring it now.
        is_done: whether a replica has answered.
    """

    groups: list[PromptGroup]
    attempts: int = 0
    copies: int = 0
    is_done: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return sum(group.tokens for group in self.groups)

    @property
    def keys(self) -> list[bytes]:
        """Keys in the order of the scores that the replica returns."""
        return [key for group in self.groups for key in group.keys]

    @property
    def scored_lengths(self) -> list[int]:
        """Number of scored tokens of each response, in the order of the scores."""
        return [length for group in self.groups for length in group.scored_lengths]


class WaitingGroups:
    """Responses waiting for a replica, oldest first; those of one prompt are grouped across requests.

    A group takes no further responses once it fills the token budget alone.

    Args:
        budget: tokens of a batch.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._groups: deque[PromptGroup] = deque()
        self._open_groups: dict[bytes, PromptGroup] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, prompt: Ids, response: Ids, key: bytes) -> None:
        """Add a response to its prompt's group."""
        prompt_bytes = prompt.tobytes()
        group = self._open_groups.get(prompt_bytes)
        if group is None or group.tokens + len(response) > self._budget:
            group = self._open_groups[prompt_bytes] = PromptGroup(prompt, [], [])
            self._groups.append(group)
        group.responses.append(response)
        group.keys.append(key)

    def drain(self, tokens: float) -> list[PromptGroup]:
        """Remove and return the oldest groups, at least one, until they have `tokens` tokens."""
        drained: list[PromptGroup] = []
        total = 0
        while self._groups and (not drained or total < tokens):
            group = self._groups.popleft()
            drained.append(group)
            total += group.tokens
            prompt_bytes = group.prompt.tobytes()
            if self._open_groups.get(prompt_bytes) is group:
                del self._open_groups[prompt_bytes]
        return drained


def split_into_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split row indices into batches of at most `budget` tokens, padding included; longest rows first.

    A row longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room == 0:
            batches.append([])
            room = max(1, budget // max(1, lengths[index]))
        batches[-1].append(index)
        room -= 1
    return batches
