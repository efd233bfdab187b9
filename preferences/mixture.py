"""Choose pairs by what they say: how many of each source, and which prompts are held out."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from preferences.config import SourceConfig
from preferences.pairs import DataError
from preferences.tokens.tables import Rows

Digests = npt.NDArray[np.uint64]
"""(N, 2): digests of 128 bits, as words."""


def draw_mixture(
    sources: Sequence[SourceConfig], pair_digests: Sequence[Digests], *, seed: int
) -> list[Rows]:
    """Draw the pairs of each source: as many as its count, cap or share says.

    A source with none of them gives all of its pairs. Those with shares give as many as possible in these
    proportions without giving a pair twice. Which pairs are drawn depends on the seed and on what they say,
    not on their order.

    Args:
        sources: the sources of the mixture.
        pair_digests: of the pairs of each source that can be used.
        seed: of the draw.

    Returns:
        For each source, sorted places among its pairs.

    Raises:
        DataError: a source has fewer pairs than its count.
    """
    counts = _count_pairs(sources, [len(digests) for digests in pair_digests])
    return [
        np.arange(len(digests)) if count == len(digests) else np.sort(order_by_seed(digests, seed)[:count])
        for digests, count in zip(pair_digests, counts, strict=True)
    ]


def _count_pairs(sources: Sequence[SourceConfig], sizes: Sequence[int]) -> list[int]:
    """Count the pairs that each source gives."""
    available = [min(size, source.cap or size) for source, size in zip(sources, sizes, strict=True)]
    # Floats of equal products may differ in the last bit: a millionth of a pair is none.
    total = min(
        (size / source.share for source, size in zip(sources, available, strict=True) if source.share),
        default=0.0,
    )
    counts = []
    for source, size in zip(sources, available, strict=True):
        if source.count is not None and source.count > size:
            raise DataError(
                f"data.train: {source.name} has {size} pairs that can be used, and count asks for "
                f"{source.count}; no pair is given twice, so lower count, or raise training.epochs"
            )
        if source.share is not None:
            counts.append(max(1, int(total * source.share + 1e-6)))
        else:
            counts.append(size if source.count is None else source.count)
    return counts


def hold_out_prompts(prompt_digests: Digests, fraction: float, *, seed: int) -> npt.NDArray[np.bool_]:
    """Choose whole prompts until `fraction` of the pairs is reached, at least one prompt on each side.

    Args:
        prompt_digests: of each pair's prompt.
        fraction: of the pairs.
        seed: of the choice, which does not depend on the order of pairs.

    Returns:
        (N,) whether each pair is held out.

    Raises:
        DataError: all pairs have the same prompt.
    """
    prompts, number_of_pair, sizes = np.unique(
        prompt_digests, axis=0, return_inverse=True, return_counts=True
    )
    if len(prompts) < 2:
        raise DataError(
            "data.eval_fraction: all pairs have the same prompt, so none can be held out; name held-out "
            "pairs with data.eval"
        )
    order = order_by_seed(prompts, seed)[:-1]  # one prompt must stay
    before = np.cumsum(sizes[order]) - sizes[order]
    held_out = np.zeros(len(prompts), bool)
    held_out[order[(before < fraction * len(prompt_digests)) | (before == 0)]] = True
    return held_out[number_of_pair.reshape(-1)]


def order_by_seed(digests: Digests, seed: int) -> Rows:
    """Return the order of digests after each is mixed with a seed: a shuffle that depends on them alone."""
    state = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    mixed = (digests[:, 0] ^ state[0]) + (digests[:, 1] ^ state[1])
    # The finaliser of splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators")
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
