"""One optimizer step on plain tensors.

No Ray in here, so that tests, benchmarks and a bare GPU machine run exactly what a cluster runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.config import LossConfig
from losses.preference import preference_loss
from losses.reduction import reduce_to_global_mean
from losses.scores import PairScores, ReferenceScores
from models.logprobs import SequenceScores
from models.parallel import Parallel
from models.rows import Rows
from orchestrator.worker.metrics import StepCost, StepTable


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite; `slots` are the pairs' places in the global batch."""

    def __init__(self, message: str, slots: Sequence[int]) -> None:
        super().__init__(message)
        self.slots = tuple(slots)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Pairs that go through the policy in one forward and backward pass.

    Attributes:
        rows: the policy's rows, chosen before rejected for each pair.
        slots: (B,) each pair's place in the step's global batch. A rank without pairs left runs micro-batches
            of no pairs, so that it joins the other ranks' collectives.
        soft_labels: (B,) probability that chosen beats rejected.
        references: scores of the same pairs under every reference, the primary first.
        paired: whether pairs have a rejected response (false for supervised rows).
        flops: FLOPs of the policy's forward and backward pass over the rows.
        weights: (B,) of the pairs in the loss and in metrics, with mean 1 over the step's global batch; None
            if all are 1.
    """

    rows: Rows
    slots: Tensor
    soft_labels: Tensor
    references: tuple[ReferenceScores, ...]
    paired: bool = True
    flops: float = 0.0
    weights: Tensor | None = None


def run_training_step(
    parallel: Parallel,
    microbatches: Sequence[MicroBatch],
    *,
    loss: LossConfig,
    table: StepTable,
    clip_norm: float,
) -> tuple[StepTable, float]:
    """Accumulate gradients over this rank's micro-batches and take one optimizer step.

    Weighted losses are divided by the number of pairs in the *global* batch, so the step does not depend on
    how pairs are split over ranks and micro-batches.

    Args:
        parallel: the policy and its optimizer.
        microbatches: this rank's share; every rank passes equally many.
        loss: resolved settings (`phi_star` is a number).
        table: empty, one row per pair of the global batch.
        clip_norm: largest norm of the whole gradient.

    Returns:
        The table summed over ranks, and the norm of the whole gradient before clipping.

    Raises:
        NonFiniteLoss: the loss or the gradient is not finite; no weight has changed.
    """
    pairs = len(table["loss"])
    for index, batch in enumerate(microbatches):
        with parallel.accumulate(index == len(microbatches) - 1):
            scores = parallel.module(batch.rows, entropy=True)
            losses = _score_batch(scores, batch, loss=loss, table=table)
            parallel.backward(
                reduce_to_global_mean(losses, global_count=pairs, world_size=parallel.world_size)
            )
    table.sum_over_ranks(parallel)
    if slots := table.find_non_finite():
        parallel.zero_grad()
        raise NonFiniteLoss("the loss is not finite", slots)
    grad_norm = float(parallel.clip_gradients(clip_norm))
    if not torch.isfinite(torch.tensor(grad_norm)):
        parallel.zero_grad()
        raise NonFiniteLoss("the gradient is not finite", range(pairs))
    parallel.step()
    parallel.zero_grad()
    return table, grad_norm


@torch.no_grad()
def run_evaluation_pass(
    parallel: Parallel,
    microbatches: Iterator[MicroBatch] | Sequence[MicroBatch],
    *,
    loss: LossConfig,
    table: StepTable,
    equal_reference: int | None = None,
) -> StepTable:
    """Compute the scores and losses of `run_training_step` without gradients and with dropout off.

    Args:
        parallel: the policy.
        microbatches: this rank's share; every rank passes equally many.
        loss: resolved settings (`phi_star` is a number).
        table: empty, one row per pair of the evaluated split.
        equal_reference: index of a reference that the policy still equals; its scores are then used as the
            policy's, and no forward pass is run.

    Returns:
        The table summed over ranks.
    """
    parallel.module.eval()
    try:
        for batch in microbatches:
            if equal_reference is None:
                scores = parallel.module(batch.rows, entropy=True)
                _score_batch(scores, batch, loss=loss, table=table)
            elif len(batch.slots):
                equal = batch.references[equal_reference]
                assert equal.chosen_entropy is not None
                assert equal.rejected_entropy is not None
                policy = PairScores(
                    equal.chosen, equal.rejected, equal.chosen_lengths, equal.rejected_lengths
                )
                entropy = (equal.chosen_entropy + equal.rejected_entropy) / (2 if batch.paired else 1)
                _record_losses(policy, entropy, batch, loss=loss, table=table)
    finally:
        parallel.module.train()
    table.sum_over_ranks(parallel)
    return table


def _score_batch(scores: SequenceScores, batch: MicroBatch, *, loss: LossConfig, table: StepTable) -> Tensor:
    """Compute the weighted losses (B,) of a micro-batch's pairs, and record them and their cost."""
    if not len(batch.slots):  # (0,), still connected to the weights for the backward pass
        return scores.logps
    table.add_cost(
        StepCost(tokens=batch.rows.tokens, positions=batch.rows.input_ids.numel(), flops=batch.flops)
    )
    policy, entropy = to_pair_scores(scores, paired=batch.paired)
    return _record_losses(policy, entropy, batch, loss=loss, table=table)


def _record_losses(
    policy: PairScores, entropy: Tensor, batch: MicroBatch, *, loss: LossConfig, table: StepTable
) -> Tensor:
    """Compute the weighted losses (B,) from the scores, and record pairs and losses in the table."""
    output = preference_loss(policy, batch.references, config=loss, soft_labels=batch.soft_labels)
    table.record_pairs(
        batch.slots,
        policy,
        batch.references,
        output,
        entropy=entropy,
        soft_labels=batch.soft_labels,
        weights=batch.weights,
    )
    return output.losses if batch.weights is None else output.losses * batch.weights.to(output.losses)


def to_pair_scores(scores: SequenceScores, *, paired: bool) -> tuple[PairScores, Tensor]:
    """Convert scores of sequences in row order to pairs, with the (B,) mean entropy of a pair's responses.

    A supervised row has no rejected response: a log-prob of 0 over one token takes its place.
    """
    assert scores.entropy is not None
    if not paired:
        absent = torch.zeros_like(scores.logps)
        rejected, lengths, entropy = absent, torch.ones_like(scores.lengths), scores.entropy
        return PairScores(scores.logps, rejected, scores.lengths, lengths), entropy
    chosen, rejected = scores.logps[0::2], scores.logps[1::2]
    entropy = (scores.entropy[0::2] + scores.entropy[1::2]) / 2
    return PairScores(chosen, rejected, scores.lengths[0::2], scores.lengths[1::2]), entropy
