"""Batches that fill a replica: responses of one prompt together, rows of similar length together."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.references.messages import Ids, PromptGroup


@dataclass
class Batch:
    """Groups for one call of a replica; `attempts` counts the replicas that died over it."""

    groups: list[PromptGroup]
    attempts: int = 0

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(group.tokens for group in self.groups)

    @property
    def keys(self) -> list[bytes]:
        """Keys in the order of the scores that come back."""
        return [key for group in self.groups for key in group.keys]


class WaitingGroups:
    """Responses waiting for a replica, oldest first; those of one prompt wait together, whoever asked.

    A group stops taking responses when it fills the token budget by itself.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._groups: deque[PromptGroup] = deque()
        self._open_groups: dict[bytes, PromptGroup] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, prompt: Ids, response: Ids, key: bytes) -> None:
        """Let a response wait behind its prompt."""
        name = prompt.tobytes()
        group = self._open_groups.get(name)
        if group is None or group.tokens + len(response) > self._budget:
            group = self._open_groups[name] = PromptGroup(prompt, [], [])
            self._groups.append(group)
        group.responses.append(response)
        group.keys.append(key)

    def drain(self, tokens: int) -> list[PromptGroup]:
        """Take the oldest groups, at least one, until they hold `tokens`."""
        taken: list[PromptGroup] = []
        held = 0
        while self._groups and (not taken or held < tokens):
            group = self._groups.popleft()
            taken.append(group)
            held += group.tokens
            name = group.prompt.tobytes()
            if self._open_groups.get(name) is group:
                del self._open_groups[name]
        return taken


def split_into_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows cut into batches of at most `budget` tokens, padding included; longest rows first.

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
