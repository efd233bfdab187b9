"""Tokenise pairs in memory as a run's files are made."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preferences.config import DataConfig
from preferences.pairs import Pair
from preferences.split import digest_rows
from preferences.tokens.fitting import POLICY_NAME, Readers
from preferences.tokens.pair_files import build_batch
from preferences.tokens.rendering import Rendering
from preferences.tokens.tables import PairFile, TokenTable
from preferences.tokens.tokenize import tokenize_pairs


@dataclass(frozen=True)
class Tokenized:
    """The pairs that all models read: a table for each of them, and what was left out."""

    tables: dict[str, TokenTable]
    kept_indices: np.ndarray
    skipped: Counter[str]
    truncated: int
    boundary_merges: dict[str, list[str]]
    digests: dict[str, str]


def tokenize(pairs: Sequence[Pair], renderings: Mapping[str, Rendering], config: DataConfig) -> Tokenized:
    """Tokenise pairs under every rendering, of which the first is the policy's."""
    policy, *references = renderings
    readers = Readers(config, renderings[policy], {name: renderings[name] for name in references})
    done = tokenize_pairs(pairs, readers.tokenization, examined=range(len(pairs)))
    only = pairs[0].rejected is None
    file = PairFile([build_batch(pairs, done, completions_only=only)], only)
    kept, skipped = readers.find_fitting_pairs(file, "t")
    numbers = {policy: readers.numbers[POLICY_NAME], **readers.reference_numbers}
    tables = {number: file.read_tokens(number).take(kept) for number in set(numbers.values())}
    merges = list(done.boundary_merges.values())
    return Tokenized(
        tables={name: tables[number] for name, number in numbers.items()},
        kept_indices=kept,
        skipped=skipped,
        truncated=int(file.read_column("truncated")[kept].sum()),
        boundary_merges={name: merges[number] for name, number in numbers.items()},
        digests={name: digest_rows(file.read_digests(f"digest_{n}")) for name, n in numbers.items()},
    )
