"""Token ids of pairs in columns: rows of unequal length, in memory or mapped from Arrow files."""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow

Ids = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenPair:
    """Token ids of one pair; a response includes its end-of-turn token unless it was truncated.

    Ids of a response that are read and not scored, such as those of a tool's answer, are complements (`~id`).
    """

    prompt: Ids
    chosen: Ids
    rejected: Ids | None


@dataclass(frozen=True)
class RaggedArray:
    """Sequences of unequal length, in chunks of one array of ids each.

    Attributes:
        chunks: arrays `(ids, offsets)`; sequence i of a chunk is `ids[offsets[i] : offsets[i + 1]]`.
        rows: (N,) places, over all chunks, of the sequences that this array has; None if it has all.
    """

    chunks: Sequence[tuple[Ids, npt.NDArray[np.integer]]]
    rows: Rows | None = None

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> "RaggedArray":
        """Build from one list of ids for each row."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum()))
        return cls([(ids, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]))])

    @classmethod
    def from_arrow(cls, columns: Sequence[pyarrow.ListArray]) -> "RaggedArray":
        """View list columns of record batches, without a copy."""
        return cls(
            [
                (column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True))
                for column in columns
            ]
        )

    @classmethod
    def concatenate(cls, parts: Sequence["RaggedArray"]) -> "RaggedArray":
        """Concatenate the sequences of whole arrays, without a copy."""
        return cls([chunk for part in parts for chunk in part.chunks])

    @cached_property
    def _starts(self) -> list[int]:
        """The first place of each chunk, and the number of places."""
        sizes = [len(offsets) - 1 for _, offsets in self.chunks]
        return [0, *np.cumsum(sizes).tolist()]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) number of ids in each row."""
        parts = [np.diff(offsets) for _, offsets in self.chunks]
        lengths = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return (lengths if self.rows is None else lengths[self.rows]).astype(np.int64)

    def __len__(self) -> int:
        return self._starts[-1] if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Ids:
        place = index if self.rows is None else int(self.rows[index])
        number = bisect_right(self._starts, place) - 1
        ids, offsets = self.chunks[number]
        first = place - self._starts[number]
        return ids[offsets[first] : offsets[first + 1]]

    def __iter__(self) -> Iterator[Ids]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Rows) -> "RaggedArray":
        """Return the rows at `indices`, in that order, without a copy of their ids."""
        return RaggedArray(self.chunks, indices if self.rows is None else self.rows[indices])


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Token ids of N pairs by column. `rejected` is None for completions only."""

    prompts: RaggedArray
    chosen: RaggedArray
    rejected: RaggedArray | None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> TokenPair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        rejected = None if self.rejected is None else self.rejected[index]
        return TokenPair(self.prompts[index], self.chosen[index], rejected)

    @property
    def prompt_lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of the prompts."""
        return self.prompts.lengths

    @property
    def chosen_lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of the chosen responses, end-of-turn tokens included."""
        return self.chosen.lengths

    @property
    def rejected_lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of the rejected responses; zeros if there are none."""
        return np.zeros(len(self), np.int64) if self.rejected is None else self.rejected.lengths

    @property
    def pair_lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of a pair with its prompt counted once, for `batches.split_over_ranks`."""
        return self.prompt_lengths + self.chosen_lengths + self.rejected_lengths

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of the prompt with the longer response."""
        return self.prompt_lengths + np.maximum(self.chosen_lengths, self.rejected_lengths)

    @property
    def _columns(self) -> tuple[RaggedArray, ...]:
        columns = (self.prompts, self.chosen, self.rejected)
        return tuple(column for column in columns if column is not None)

    def has_same_ids(self, other: "TokenTable") -> bool:
        """Return whether another table of the same pairs has the same ids."""
        if self is other:
            return True
        pairs = zip(self._columns, other._columns, strict=True)
        return all(
            np.array_equal(mine, theirs) for one, two in pairs for mine, theirs in zip(one, two, strict=True)
        )

    def take(self, indices: Rows) -> "TokenTable":
        """Return the pairs at `indices`, in that order."""
        rejected = None if self.rejected is None else self.rejected.take(indices)
        return TokenTable(self.prompts.take(indices), self.chosen.take(indices), rejected)


def digest_tokens(prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> bytes:
    """Return a digest of the token ids of one pair, and of where each text begins."""
    parts = [np.asarray(part, "<i4") for part in (prompt, *responses)]
    digest = hashlib.blake2b(np.array([len(part) for part in parts], "<i8").tobytes(), digest_size=16)
    for part in parts:
        digest.update(part.tobytes())
    return digest.digest()


DIGEST = pyarrow.binary(16)
IDS = pyarrow.list_(pyarrow.int32())


@dataclass(frozen=True)
class PairFile:
    """Tokenised pairs of one source: an Arrow file that is mapped into memory, or its batches.

    Columns: `place`, `pair_digest`, `prompt_digest`, `soft_label`, `weight`, `swapped`, `truncated`,
    `problem` (why a pair cannot be used, or null), and for each rendering k `prompt_k`, `chosen_k`,
    `rejected_k` (absent for completions only) and `digest_k`.
    """

    batches: Sequence[pyarrow.RecordBatch]
    completions_only: bool

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self.batches)

    def read_column(self, name: str) -> np.ndarray[Any, Any]:
        """Return a column of numbers or flags: (N,)."""
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self.batches]
        return np.concatenate(parts) if parts else np.zeros(0)

    def read_digests(self, name: str) -> npt.NDArray[np.uint64]:
        """Return a column of digests: (N, 2) words of 64 bits."""
        parts = [
            np.frombuffer(column.buffers()[1], "<u8").reshape(-1, 2)[column.offset :][: len(column)]
            for column in (batch.column(name) for batch in self.batches)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, 2), "<u8")

    def read_tokens(self, rendering: int) -> TokenTable:
        """View the token ids of a rendering."""

        def view_column(name: str) -> RaggedArray:
            return RaggedArray.from_arrow([batch.column(f"{name}_{rendering}") for batch in self.batches])

        rejected = None if self.completions_only else view_column("rejected")
        return TokenTable(view_column("prompt"), view_column("chosen"), rejected)

    @property
    def places(self) -> "TextColumn":
        """The file and line of each pair."""
        return TextColumn([batch.column("place") for batch in self.batches])

    @property
    def has_problem(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each pair cannot be used."""
        parts = [batch.column("problem").is_valid().to_numpy(zero_copy_only=False) for batch in self.batches]
        return np.concatenate(parts)

    def find_first_problems(self) -> dict[str, str]:
        """Return the place of the first pair that cannot be used, by reason."""
        first: dict[str, str] = {}
        places = self.places
        for index in np.flatnonzero(self.has_problem).tolist():
            first.setdefault(self._problems[index], places[index])
        return first

    @property
    def _problems(self) -> "TextColumn":
        return TextColumn([batch.column("problem") for batch in self.batches])

    def count_problems(self) -> Counter[str]:
        """Count the pairs that cannot be used, by reason."""
        problems: Counter[str] = Counter()
        for batch in self.batches:
            problems.update(batch.column("problem").drop_null().to_pylist())
        return problems


@dataclass(frozen=True)
class TextColumn(Sequence[Any]):
    """Texts in columns of record batches, read one at a time; `rows` are those that it has, None for all."""

    columns: Sequence[pyarrow.Array]
    rows: Rows | None = None

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum([len(column) for column in self.columns]).tolist()]

    def __len__(self) -> int:
        return self._starts[-1] if self.rows is None else len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        place = int(index if self.rows is None else self.rows[index])
        number = bisect_right(self._starts, place) - 1
        if not 0 <= place < self._starts[-1]:
            raise IndexError(index)
        return self.columns[number][place - self._starts[number]].as_py()
