"""Batches for scoring a whole table: they depend on the table alone, and so does every bit of its scores."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.references.batching import WaitingGroups, split_into_batches
from orchestrator.references.client import TokenTableLike, group_pairs
from orchestrator.references.messages import KEY_BYTES, Keys, ScoreRequest

PLANNED_ROWS = 1024
"""Rows whose responses are grouped by prompt and sorted by length at once."""


def digest_table(table: TokenTableLike) -> Keys:
    """Return the keys (S, 16) of a table's responses, row by row."""
    parts = [ScoreRequest.pack(group_pairs(table, rows)).keys for rows in _split_rows(len(table))]
    return np.concatenate(parts) if parts else np.zeros((0, KEY_BYTES), dtype=np.uint8)


class BulkPlan:
    """The batches that score a table, each response once.

    A log-prob's last bits depend on the rows that share its batch. These batches depend on the table and the
    budget, and not on what is in the store, how many replicas there are or when they answer.

    Args:
        table: the rows.
        budget: tokens of a batch.
    """

    def __init__(self, table: TokenTableLike, budget: int) -> None:
        self._table, self._budget = table, budget
        self.keys = digest_table(table)
        """(S, 16): of the table's responses, row by row."""
        self._is_first = _mark_first(self.keys)

    def __len__(self) -> int:
        """Return the number of different responses."""
        return int(self._is_first.sum())

    def __iter__(self) -> Iterator[list[ScoreRequest]]:
        """Yield the batches of some rows after the other."""
        start = 0
        for rows in _split_rows(len(self._table)):
            waiting = WaitingGroups(self._budget)
            for group in group_pairs(self._table, rows):
                for response, key in zip(group.responses, group.keys, strict=True):
                    if self._is_first[start]:
                        waiting.add(group.prompt, response, key)
                    start += 1
            groups = waiting.drain(math.inf)
            batches = split_into_batches([group.tokens for group in groups], self._budget)
            yield [ScoreRequest.pack([groups[i] for i in batch]) for batch in batches]


@dataclass
class BulkCounts:
    """How far a table is scored, in different responses.

    Attributes:
        total: responses in all.
        stored: those that the store had before.
        scored: those that replicas have answered since.
        queued: those that replicas were asked for and have not answered.
    """

    total: int
    stored: int
    scored: int = 0
    queued: int = 0

    @property
    def done(self) -> int:
        """Responses that have a score."""
        return min(self.stored + self.scored, self.total)

    def note_answer(self, responses: int) -> None:
        """Move responses from the queue to those that are scored."""
        self.queued -= responses
        self.scored += responses

    def complete(self) -> None:
        """Count what other requests have brought meanwhile: all is done."""
        self.scored = self.total - self.stored

    def describe(self) -> list[str]:
        """Return which share came from the store, and how many responses wait while not all are done."""
        share = int(100 * self.stored / self.total) if self.total else 100
        queue = [f"queue {self.queued:,}"] if self.done < self.total else []
        return [f"{share} % from store", *queue]


def _split_rows(count: int) -> list[range]:
    return [range(start, min(start + PLANNED_ROWS, count)) for start in range(0, count, PLANNED_ROWS)]


def _mark_first(keys: Keys) -> NDArray[np.bool_]:
    """(S,): whether no earlier key equals each one."""
    is_first = np.zeros(len(keys), dtype=np.bool_)
    is_first[np.unique(keys, axis=0, return_index=True)[1]] = True
    return is_first
