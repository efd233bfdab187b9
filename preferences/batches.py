"""Which pairs make an optimizer step, and how a step is shared out over ranks and micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The order of training: every pair once per epoch, in steps of `pairs_per_step`, the last one smaller.

    A step is a function of (seed, epoch, step) alone. It knows nothing of ranks, so any world size, and a run
    resumed anywhere, takes the same steps.
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
        """Optimizer steps that see every pair once."""
        return -(-self.count // self.pairs_per_step)

    def indices(self, epoch: int, step: int) -> Indices:
        """Indices of the pairs of one global step; `step` counts from 0 within the epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step must be from 0 to {self.steps_per_epoch - 1}, got {step}")
        order = _order(self.count, self.seed, epoch)
        return order[step * self.pairs_per_step : (step + 1) * self.pairs_per_step].copy()


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Indices:
    # raw bits, sorted: numpy keeps the bits of a generator the same over its versions, but not its shuffles
    order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(count), kind="stable")
    order.setflags(write=False)
    return order


def split(
    indices: Indices, lengths: npt.NDArray[np.integer], *, world_size: int, tokens_per_microbatch: int
) -> list[list[Indices]]:
    """Share one step out: `[rank][micro-batch]` -> indices of pairs.

    `lengths` (N,) are the tokens of every pair of the table (`TokenTable.pair_lengths`: the prompt once and
    both responses), looked up by `indices`. A micro-batch of n pairs takes n x its longest pair, padding
    included, and stays within `tokens_per_microbatch`; a pair longer than that goes alone. Every rank gets
    the same number of micro-batches, because a forward pass may hold collectives; the k-th ones of all ranks
    are of similar size, and ranks carry similar sums. A micro-batch is empty only where there are fewer
    pairs than places.
    """
    if world_size < 1 or tokens_per_microbatch < 1:
        raise ValueError(
            f"world_size and tokens_per_microbatch must be >= 1, got {world_size} and {tokens_per_microbatch}"
        )
    order = indices[np.lexsort((indices, -lengths[indices].astype(np.int64)))]
    sizes = lengths[order].tolist()
    bounds = _even(_levelled(sizes, tokens_per_microbatch, world_size), sizes, world_size)
    bounds.sort(key=lambda bound: (-_cost(bound, sizes), bound))
    ranks: list[list[Indices]] = [[] for _ in range(world_size)]
    carried = [0] * world_size
    for first in range(0, len(bounds), world_size):
        lightest_first = sorted(range(world_size), key=lambda rank: (carried[rank], rank))
        for rank, bound in zip(lightest_first, bounds[first : first + world_size], strict=True):
            ranks[rank].append(order[slice(*bound)])
            carried[rank] += _cost(bound, sizes)
    return ranks


Bound = tuple[int, int]


def _cost(bound: Bound, sizes: Sequence[int]) -> int:
    """Tokens with padding; `sizes` falls, so the first is the longest."""
    first, last = bound
    return (last - first) * sizes[first] if last > first else 0


def _within_budget(sizes: Sequence[int], budget: int) -> list[Bound]:
    bounds = []
    first = 0
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or (i + 1 - first) * sizes[first] > budget:
            bounds.append((first, i))
            first = i
    return bounds


def _levelled(sizes: Sequence[int], budget: int, world_size: int) -> list[Bound]:
    """As many micro-batches as the budget asks for, rounded up to the ranks, the largest made small."""
    places = -(-len(_within_budget(sizes, budget)) // world_size) * world_size
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_within_budget(sizes, middle)) <= places:
            high = middle
        else:
            low = middle + 1
    return _within_budget(sizes, low)


def _even(bounds: list[Bound], sizes: Sequence[int], world_size: int) -> list[Bound]:
    """Halve the largest micro-batches until their number is a multiple of `world_size`."""
    bounds = list(bounds)
    while len(bounds) % world_size or not bounds:
        divisible = [bound for bound in bounds if bound[1] - bound[0] > 1]
        if not divisible:
            bounds.append((len(sizes), len(sizes)))
            continue
        largest = max(divisible, key=lambda bound: (_cost(bound, sizes), bound))
        bounds.remove(largest)
        middle = (largest[0] + largest[1]) // 2
        bounds += [(largest[0], middle), (middle, largest[1])]
    return bounds
