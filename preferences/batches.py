"""Choose the pairs of each optimizer step, and split a step over ranks and micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The order of training: every pair once per epoch, in steps of `pairs_per_step`, the last one smaller.

    A step is a function of (seed, epoch, step) alone. It does not depend on ranks, so a run with any world
    size, or resumed at any step, takes the same steps.
    """

    count: int
    pairs_per_step: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("count", "pairs_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps that see every pair once."""
        return -(-self.count // self.pairs_per_step)

    def get_step_indices(self, epoch: int, step: int) -> Indices:
        """Return the indices of the pairs of one global step; `step` counts from 0 within the epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step must be from 0 to {self.steps_per_epoch - 1}, got {step}")
        order = _compute_epoch_order(self.count, self.seed, epoch)
        return order[step * self.pairs_per_step : (step + 1) * self.pairs_per_step].copy()


@lru_cache(maxsize=4)
def _compute_epoch_order(count: int, seed: int, epoch: int) -> Indices:
    # sorts raw bits: numpy keeps the bits of a generator the same over its versions, but not its shuffles
    order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(count), kind="stable")
    order.setflags(write=False)
    return order


def split_over_ranks(
    indices: Indices, lengths: npt.NDArray[np.integer], *, world_size: int, tokens_per_microbatch: int
) -> list[list[Indices]]:
    """Split one step into micro-batches: `[rank][micro-batch]` -> indices of pairs.

    `lengths` (N,) are the tokens of every pair of the table (`TokenTable.pair_lengths`: the prompt once and
    both responses), looked up by `indices`. A micro-batch of n pairs takes n x its longest pair, padding
    included, and stays within `tokens_per_microbatch`; a longer pair is a micro-batch of its own. Every rank
    gets the same number of micro-batches, because a forward pass may contain collectives. The k-th
    micro-batches of all ranks have similar sizes, and all ranks similar totals. A micro-batch is empty only
    if there are fewer pairs than micro-batches.
    """
    if world_size < 1 or tokens_per_microbatch < 1:
        raise ValueError(
            f"world_size and tokens_per_microbatch must be >= 1, got {world_size} and {tokens_per_microbatch}"
        )
    order = indices[np.lexsort((indices, -lengths[indices].astype(np.int64)))]
    sizes = lengths[order].tolist()
    bounds = _split_to_multiple(
        _pack_with_smallest_maximum(sizes, tokens_per_microbatch, world_size), sizes, world_size
    )
    bounds.sort(key=lambda bound: (-_count_padded_tokens(bound, sizes), bound))
    ranks: list[list[Indices]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for first in range(0, len(bounds), world_size):
        lightest_first = sorted(range(world_size), key=lambda rank: (totals[rank], rank))
        for rank, bound in zip(lightest_first, bounds[first : first + world_size], strict=True):
            ranks[rank].append(order[slice(*bound)])
            totals[rank] += _count_padded_tokens(bound, sizes)
    return ranks


Bound = tuple[int, int]
"""First position and end of a micro-batch in the pairs sorted by descending length."""


def _count_padded_tokens(bound: Bound, sizes: Sequence[int]) -> int:
    """Count the tokens of a micro-batch with padding; its first pair is the longest (`sizes` descend)."""
    first, last = bound
    return (last - first) * sizes[first] if last > first else 0


def _pack_within_budget(sizes: Sequence[int], budget: int) -> list[Bound]:
    """Fill micro-batches in order, each up to `budget` tokens."""
    bounds = []
    first = 0
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or (i + 1 - first) * sizes[first] > budget:
            bounds.append((first, i))
            first = i
    return bounds


def _pack_with_smallest_maximum(sizes: Sequence[int], budget: int, world_size: int) -> list[Bound]:
    """Make as many micro-batches as the budget needs, rounded up to the ranks, with the smallest maximum."""
    places = -(-len(_pack_within_budget(sizes, budget)) // world_size) * world_size
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_pack_within_budget(sizes, middle)) <= places:
            high = middle
        else:
            low = middle + 1
    return _pack_within_budget(sizes, low)


def _split_to_multiple(bounds: list[Bound], sizes: Sequence[int], world_size: int) -> list[Bound]:
    """Halve the largest micro-batches until their number is a multiple of `world_size`."""
    bounds = list(bounds)
    while len(bounds) % world_size or not bounds:
        divisible = [bound for bound in bounds if bound[1] - bound[0] > 1]
        if not divisible:
            bounds.append((len(sizes), len(sizes)))
            continue
        largest = max(divisible, key=lambda bound: (_count_padded_tokens(bound, sizes), bound))
        bounds.remove(largest)
        middle = (largest[0] + largest[1]) // 2
        bounds += [(largest[0], middle), (middle, largest[1])]
    return bounds
