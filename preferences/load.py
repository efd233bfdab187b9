"""Load a source as validated pairs, counted and fingerprinted, and split them into train and eval."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preferences.config import DataConfig
from preferences.pairs import BadRow, DataError, Pair
from preferences.rows import build_pairs
from preferences.sources import read_rows


@dataclass(frozen=True, slots=True)
class LoadedPairs:
    """Pairs in the order of their source, and counts of the rows that were skipped or swapped.

    `skipped` counts the rows left out, by reason. `digest` covers the content of the pairs in order (not
    their `source`), so that a run can refuse to resume with other data than it began with.
    """

    pairs: Sequence[Pair]
    skipped: Counter[str]
    digest: str

    @property
    def swapped(self) -> int:
        """Number of pairs whose responses were swapped: most people preferred the source's `rejected`."""
        return sum(pair.swapped for pair in self.pairs)

    @property
    def has_soft_labels(self) -> bool:
        """Whether people disagreed about any pair."""
        return any(pair.soft_label < 1.0 for pair in self.pairs)


def load_pairs(
    source: str, config: DataConfig, *, completions_only: bool, split: str | None = None
) -> LoadedPairs:
    """Read and check every row of a file, folder, URI or hub id.

    `completions_only` reads prompts with one good response each, for `sft`: the `chosen` one of a pair.
    `split` overrides `config.split`. Raises `DataError` for a source that cannot be used, and for the first
    bad row unless `on_bad_row` is `skip`.
    """
    pairs: list[Pair] = []
    skipped: Counter[str] = Counter()
    for place, row in read_rows(source, config, split=split or config.split):
        try:
            if isinstance(row, BadRow):
                raise row
            pairs += build_pairs(row, place, config, completions_only=completions_only)
        except BadRow as bad:
            if config.on_bad_row == "stop":
                raise
            skipped[bad.reason] += 1
    if not pairs:
        raise DataError(
            f"{source}: " + (_describe_skipped(skipped) or "holds no rows; check data.train and data.eval")
        )
    return LoadedPairs(pairs, skipped, hash_pairs(pairs))


def load_splits(
    config: DataConfig, *, completions_only: bool, seed: int
) -> tuple[LoadedPairs, LoadedPairs | None]:
    """Load the training pairs, and the held-out pairs if the settings name any.

    With `eval_fraction`, whole prompts are held out: no prompt is in both splits. The choice depends on the
    seed and the prompts alone, not on the order of the rows. Skipped rows are counted with the training
    pairs.
    """
    train = load_pairs(config.train, config, completions_only=completions_only)
    if config.eval_fraction is not None:
        return hold_out_prompts(train, config.eval_fraction, seed=seed)
    if config.eval is None and config.eval_split is None:
        return train, None
    source = config.eval or config.train
    return train, load_pairs(source, config, completions_only=completions_only, split=config.eval_split)


def hold_out_prompts(loaded: LoadedPairs, fraction: float, *, seed: int) -> tuple[LoadedPairs, LoadedPairs]:
    """Split off whole prompts until `fraction` of the pairs is reached, at least one prompt on each side."""
    prompts = [_hash_prompt(pair.prompt, seed) for pair in loaded.pairs]
    sizes = Counter(prompts)
    if len(sizes) < 2:
        raise DataError(
            f"data.eval_fraction: {loaded.pairs[0].source}: all pairs have the same prompt, so none can be "
            "held out; name held-out pairs with data.eval"
        )
    eval_prompts: set[bytes] = set()
    count = 0
    for prompt in sorted(sizes)[:-1]:  # keys are digests, so their order is random; one prompt must stay
        if eval_prompts and count >= fraction * len(prompts):
            break
        eval_prompts.add(prompt)
        count += sizes[prompt]
    train_pairs = [
        pair for pair, prompt in zip(loaded.pairs, prompts, strict=True) if prompt not in eval_prompts
    ]
    eval_pairs = [pair for pair, prompt in zip(loaded.pairs, prompts, strict=True) if prompt in eval_prompts]
    return (
        LoadedPairs(train_pairs, loaded.skipped, hash_pairs(train_pairs)),
        LoadedPairs(eval_pairs, Counter(), hash_pairs(eval_pairs)),
    )


def hash_pairs(pairs: Sequence[Pair]) -> str:
    """Return a hex digest of the content of the pairs in order: texts, labels and tools."""
    hashed = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        hashed.update(_encode_json([pair.prompt, pair.chosen, pair.rejected, pair.soft_label, pair.tools]))
        hashed.update(b"\n")
    return hashed.hexdigest()


def _hash_prompt(prompt: Any, seed: int) -> bytes:
    return hashlib.blake2b(_encode_json([seed, prompt]), digest_size=16).digest()


def _encode_json(value: Any) -> bytes:
    # ASCII, because a lone surrogate, which JSON input may contain, has no UTF-8 encoding
    return json.dumps(value, separators=(",", ":")).encode()


def _describe_skipped(skipped: Counter[str]) -> str | None:
    if not skipped:
        return None
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    return f"no row is left, all were skipped ({reasons}); data.on_bad_row: stop shows the first one in full"
