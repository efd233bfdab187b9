"""The tokenised rows of one split, and what another process needs to open it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from preferences.tokens.pair_files import open_pairs
from preferences.tokens.tables import PairFile, RaggedArray, Rows, TextColumn, TokenTable


@dataclass(frozen=True)
class SplitFiles:
    """The rows of a split by their places in files, small enough to send to every worker.

    Attributes:
        paths: files of tokenised pairs, whose rows count through.
        checksums: of the files' content.
        rows: (N,) those of the split.
        policy: the rendering that the policy reads.
        references: the renderings that the references read.
        soft_labels: (N,) probability that chosen beats rejected.
        source_names: names of the sources of a mixture, or of the held-out sets.
        source_index: (N,) which of them each row is from.
        weights: (N,) of each pair in the loss and in metrics; None if all are equal.
    """

    paths: tuple[Path, ...]
    checksums: tuple[str, ...]
    rows: Rows
    policy: int
    references: Mapping[str, int]
    soft_labels: npt.NDArray[np.float64]
    source_names: tuple[str, ...]
    source_index: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float64] | None

    def open(self, find_file: Callable[[Path], Path] = lambda path: path) -> "TokenizedSplit":
        """Map the files into memory; `find_file` returns where a file is on this machine."""
        files = [open_pairs(find_file(path)) for path in self.paths]
        tables: dict[int, TokenTable] = {}
        for rendering in {self.policy, *self.references.values()}:
            tables[rendering] = _view_tokens(files, rendering, self.rows)
        return TokenizedSplit(
            policy=tables[self.policy],
            references={name: tables[rendering] for name, rendering in self.references.items()},
            soft_labels=self.soft_labels,
            places=TextColumn([batch.column("place") for f in files for batch in f.batches], self.rows),
            has_pairs=not files[0].completions_only,
            has_soft_labels=bool((self.soft_labels < 1).any()),
            source_names=self.source_names,
            source_index=self.source_index,
            weights=self.weights,
            files=self,
        )


def _view_tokens(files: Sequence[PairFile], rendering: int, rows: Rows) -> TokenTable:
    parts = [file.read_tokens(rendering) for file in files]
    rejected = [part.rejected for part in parts if part.rejected is not None]
    return TokenTable(
        RaggedArray.concatenate([part.prompts for part in parts]),
        RaggedArray.concatenate([part.chosen for part in parts]),
        RaggedArray.concatenate(rejected) if rejected else None,
    ).take(rows)


@dataclass(frozen=True)
class TokenizedSplit:
    """The rows of one split, as every worker holds them.

    Attributes:
        policy: token ids under the policy's tokenizer and template, N rows.
        references: the same rows under each served reference's own.
        soft_labels: (N,) probability that chosen beats rejected.
        places: (N,) file and line of each row, to name it in a message.
        has_pairs: whether rows have a rejected response.
        has_soft_labels: whether the data has labels other than 1.
        source_names: names of the sources of a mixture, or of the held-out sets.
        source_index: (N,) which of them each row is from.
        weights: (N,) of each pair in the loss and in metrics; None if all are equal.
        files: what opens the split in another process; None if it is in memory only.
    """

    policy: TokenTable
    references: dict[str, TokenTable]
    soft_labels: npt.NDArray[np.float64]
    places: Sequence[str]
    has_pairs: bool
    has_soft_labels: bool
    source_names: tuple[str, ...] = ("",)
    source_index: npt.NDArray[np.int16] | None = None
    weights: npt.NDArray[np.float64] | None = None
    files: SplitFiles | None = None

    def __len__(self) -> int:
        return len(self.soft_labels)


def digest_rows(digests: npt.NDArray[Any]) -> str:
    """Return one digest of the digests of rows, in their order."""
    return hashlib.blake2b(np.ascontiguousarray(digests).tobytes(), digest_size=16).hexdigest()
