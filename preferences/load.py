"""A source of rows becomes validated pairs, counted and fingerprinted, and is split into train and eval."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preferences.config import DataConfig
from preferences.pairs import BadRow, DataError, Pair
from preferences.rows import pairs_of
from preferences.sources import read_rows


@dataclass(frozen=True, slots=True)
class LoadedPairs:
    """Pairs in the order of their source, and what happened to the rows on the way.

    `skipped` counts the rows left out, by reason. `digest` is of the content of the pairs in order (not of
    their places), so that a run can refuse to go on with other data than it began with.
    """

    pairs: Sequence[Pair]
    skipped: Counter[str]
    digest: str

    @property
    def turned_round(self) -> int:
        """How many pairs stood the other way in the source, most people preferring its `rejected`."""
        return sum(pair.turned_round for pair in self.pairs)

    @property
    def has_soft_labels(self) -> bool:
        """Whether people were of two minds about any pair."""
        return any(pair.soft_label < 1.0 for pair in self.pairs)


def load_pairs(
    source: str, config: DataConfig, *, completions_only: bool, split: str | None = None
) -> LoadedPairs:
    """Read and check every row of a file, folder, URI or hub id.

    `completions_only` reads prompts with one good response each, for `sft`; of a pair that is its `chosen`.
    `split` overrides `config.split`. Raises `DataError` for a source that cannot be used, and for the first
    bad row unless `on_bad_row` is `skip`.
    """
    pairs: list[Pair] = []
    skipped: Counter[str] = Counter()
    for place, row in read_rows(source, config, split=split or config.split):
        try:
            if isinstance(row, BadRow):
                raise row
            pairs += pairs_of(row, place, config, completions_only=completions_only)
        except BadRow as bad:
            if config.on_bad_row == "stop":
                raise
            skipped[bad.reason] += 1
    if not pairs:
        raise DataError(
            f"{source}: " + (_all_skipped(skipped) or "holds no rows; check data.train and data.eval")
        )
    return LoadedPairs(pairs, skipped, digest(pairs))


def load_splits(
    config: DataConfig, *, completions_only: bool, seed: int
) -> tuple[LoadedPairs, LoadedPairs | None]:
    """The training pairs, and the held-out pairs if the settings name any.

    With `eval_fraction`, whole prompts are held out: no prompt stands on both sides. Which ones depends on
    the seed and the prompts alone, not on the order of the rows. Rows skipped are counted with the training
    pairs.
    """
    train = load_pairs(config.train, config, completions_only=completions_only)
    if config.eval_fraction is not None:
        return hold_out(train, config.eval_fraction, seed=seed)
    if config.eval is None and config.eval_split is None:
        return train, None
    source = config.eval or config.train
    return train, load_pairs(source, config, completions_only=completions_only, split=config.eval_split)


def hold_out(loaded: LoadedPairs, fraction: float, *, seed: int) -> tuple[LoadedPairs, LoadedPairs]:
    """Split off whole prompts until `fraction` of the pairs is reached, at least one prompt on each side."""
    prompts = [_key(pair.prompt, seed) for pair in loaded.pairs]
    sizes = Counter(prompts)
    if len(sizes) < 2:
        raise DataError(
            f"data.eval_fraction: {loaded.pairs[0].source}: all pairs have the same prompt, so none can be "
            "held out; name held-out pairs with data.eval"
        )
    held: set[bytes] = set()
    count = 0
    for prompt in sorted(sizes)[:-1]:  # keys are digests: their order is a shuffle; one prompt must stay
        if held and count >= fraction * len(prompts):
            break
        held.add(prompt)
        count += sizes[prompt]
    train = [pair for pair, prompt in zip(loaded.pairs, prompts, strict=True) if prompt not in held]
    evaluation = [pair for pair, prompt in zip(loaded.pairs, prompts, strict=True) if prompt in held]
    return (
        LoadedPairs(train, loaded.skipped, digest(train)),
        LoadedPairs(evaluation, Counter(), digest(evaluation)),
    )


def digest(pairs: Sequence[Pair]) -> str:
    """Hex digest of what the pairs say, in order: texts, labels and tools."""
    hashed = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        hashed.update(_json([pair.prompt, pair.chosen, pair.rejected, pair.soft_label, pair.tools]))
        hashed.update(b"\n")
    return hashed.hexdigest()


def _key(prompt: Any, seed: int) -> bytes:
    return hashlib.blake2b(_json([seed, prompt]), digest_size=16).digest()


def _json(value: Any) -> bytes:
    # ASCII: a lone surrogate, which JSON input may hold, has no UTF-8
    return json.dumps(value, separators=(",", ":")).encode()


def _all_skipped(skipped: Counter[str]) -> str | None:
    if not skipped:
        return None
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    return f"no row is left, all were skipped ({reasons}); data.on_bad_row: stop shows the first one in full"
