"""Reduction of per-pair losses by global counts: a step must not depend on how the pairs are split."""

from torch import Tensor

from losses.settings import LossError


def reduce_to_global_mean(losses: Tensor, *, global_count: int, world_size: int) -> Tensor:
    """Compute this micro-batch's part of the global batch's mean, for ranks whose gradients are averaged.

    Summed over a rank's micro-batches and averaged over ranks, the parts are the mean over all pairs,
    however the pairs are split.

    Args:
        losses: (B,) of this micro-batch; B may be 0.
        global_count: number of pairs in the step, over all ranks and micro-batches.
        world_size: number of ranks.

    Raises:
        LossError: a count is not positive.
    """
    if global_count < 1 or world_size < 1:
        raise LossError(
            f"global_count and world_size must be >= 1, got {global_count} and {world_size}; "
            "count the pairs of all ranks"
        )
    return losses.sum() / global_count * world_size
