"""The metrics of a step: a table with a row per pair, summed over ranks once, then read as named metrics.

Every pair of a step has a slot in one table that starts as zeros. A rank fills its own pairs' rows;
summing the tables over ranks gives all of them the exact per-pair values of the whole step with a
single all-reduce: means with global counts, percentiles, and the pairs to name when a loss is not finite.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.scores import LossOutput, PairScores, ReferenceScores
from models.parallel import Parallel

PAIR_COLUMNS = (
    "loss",
    "chosen_reward",
    "rejected_reward",
    "chosen_logp",
    "rejected_logp",
    "entropy",
    "scale",
    "primary_gap",
    "soft_label",
    "chosen_length",
    "rejected_length",
    "pair_weight",
)
COST_COLUMNS = ("tokens", "positions", "flops", "reference_stall")
STOP_COLUMN = len(COST_COLUMNS)
"""In the row of costs: how many ranks were asked to stop."""


@dataclass(frozen=True)
class StepCost:
    """The cost of a step on a rank.

    Attributes:
        tokens: tokens that are not padding.
        positions: positions computed, padding included.
        flops: model FLOPs.
        reference_stall: seconds blocked waiting for reference scores.
    """

    tokens: int = 0
    positions: int = 0
    flops: float = 0.0
    reference_stall: float = 0.0

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(
            self.tokens + other.tokens,
            self.positions + other.positions,
            self.flops + other.flops,
            self.reference_stall + other.reference_stall,
        )


class StepTable:
    """Per-pair values of one step: (pairs + 1, columns), the last row holding the step's costs.

    Args:
        pairs: number of pairs in the global batch.
        references: reference names, the primary first.
        device: where the ranks' tables are summed.
    """

    def __init__(self, pairs: int, references: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.references = tuple(references)
        names = (
            *PAIR_COLUMNS,
            *(f"logratio/{name}" for name in references),
            *(f"weight/{name}" for name in references),
            *(f"logp_per_token/{name}" for name in references),
            *(f"entropy/{name}" for name in references),
        )
        self._column = {name: index for index, name in enumerate(names)}
        width = max(len(names), STOP_COLUMN + 1)
        self.values = torch.zeros(pairs + 1, width, dtype=torch.float64, device=device)

    def __getitem__(self, name: str) -> Tensor:
        """Return a column's (pairs,) values."""
        return self.values[:-1, self._column[name]]

    def record_pairs(
        self,
        slots: Tensor,
        policy: PairScores,
        references: Sequence[ReferenceScores],
        output: LossOutput,
        *,
        entropy: Tensor,
        soft_labels: Tensor,
        weights: Tensor | None = None,
    ) -> None:
        """Write a micro-batch of pairs into their slots; all arguments are (B,) per pair.

        Without weights each pair has weight 1.
        """
        columns = [
            output.losses,
            output.chosen_rewards,
            output.rejected_rewards,
            policy.chosen,
            policy.rejected,
            entropy,
            output.scale,
            _compute_primary_gap(policy, references[0] if references else None),
            soft_labels,
            policy.chosen_lengths,
            policy.rejected_lengths,
            torch.ones_like(soft_labels) if weights is None else weights,
        ]
        columns += [
            (policy.chosen - reference.chosen + policy.rejected - reference.rejected) / 2
            for reference in references
        ]
        columns += list(output.weights.unbind(dim=1))
        columns += [_compute_logp_per_token(reference) for reference in references]
        columns += [_compute_entropy(reference) for reference in references]
        rows = torch.stack([column.detach().to(self.values) for column in columns], dim=1)
        self.values[slots, : rows.shape[1]] = rows

    def add_cost(self, cost: StepCost) -> None:
        """Add this rank's costs."""
        figures = [cost.tokens, cost.positions, cost.flops, cost.reference_stall]
        self.values[-1, : len(figures)] += torch.tensor(
            figures, dtype=torch.float64, device=self.values.device
        )

    def request_stop(self) -> None:
        """Tell all ranks, when the table is summed, that this one was asked to stop after the step."""
        self.values[-1, STOP_COLUMN] = 1

    @property
    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop, once the table is summed over them."""
        return bool(self.values[-1, STOP_COLUMN])

    def select(self, slots: Tensor) -> "StepTable":
        """Return the table of some of the pairs, without costs."""
        part = StepTable(len(slots), self.references, self.values.device)
        part.values[:-1] = self.values[slots]
        return part

    def sum_over_ranks(self, parallel: Parallel) -> None:
        """Replace the values by their sums over all ranks, and move them to main memory in one copy.

        Whatever is computed from them afterwards does not wait for the device again.
        """
        self.values = parallel.all_reduce_sum(self.values).cpu()

    @property
    def cost(self) -> StepCost:
        """The costs of all ranks, once the table is summed over them."""
        tokens, positions, flops, stall = self.values[-1, : len(COST_COLUMNS)].tolist()
        return StepCost(int(tokens), int(positions), flops, stall)

    @property
    def has_weight(self) -> bool:
        """Whether any pair counts; where none does, there is no mean over pairs."""
        return bool((self["pair_weight"] > 0).any())

    def compute_mean(self, values: Tensor) -> Tensor:
        """Compute the weighted mean of (pairs,) values; with equal weights it is the plain mean."""
        return compute_weighted_mean(values, self["pair_weight"])

    def find_non_finite(self) -> list[int]:
        """Return the slots of the pairs whose loss is NaN or infinite."""
        return torch.nonzero(~torch.isfinite(self["loss"])).flatten().tolist()


def _compute_logp_per_token(reference: ReferenceScores) -> Tensor:
    """Compute the mean log-prob of a token of both responses, in the reference's own tokens."""
    lengths = reference.chosen_lengths + reference.rejected_lengths
    return (reference.chosen + reference.rejected) / lengths.clamp(min=1)


def _compute_entropy(reference: ReferenceScores) -> Tensor:
    """Compute the mean entropy over the tokens of both responses, over log V; 1 where it is not known."""
    if reference.chosen_entropy is None or reference.rejected_entropy is None:
        return torch.ones_like(reference.chosen)
    lengths = reference.chosen_lengths + reference.rejected_lengths
    sums = reference.chosen_entropy * reference.chosen_lengths
    sums = sums + reference.rejected_entropy * reference.rejected_lengths
    return sums / lengths.clamp(min=1)


def _compute_primary_gap(policy: PairScores, primary: ReferenceScores | None) -> Tensor:
    """Compute h against the primary reference from summed log-probs: for every loss, accuracy is its sign."""
    gap = policy.chosen - policy.rejected
    return gap if primary is None else gap - (primary.chosen - primary.rejected)


@dataclass(frozen=True)
class MetricFlags:
    """Which optional metrics a run has.

    Attributes:
        has_pairs: rows have a rejected response.
        has_soft_labels: labels other than 1 exist.
        has_dispersion: the loss has a dispersion, whose scale is reported.
        has_reference_weights: several references are weighted.
    """

    has_pairs: bool = True
    has_soft_labels: bool = False
    has_dispersion: bool = False
    has_reference_weights: bool = False


def compute_training_metrics(table: StepTable, flags: MetricFlags) -> dict[str, float]:
    """Compute named means over a step's pairs; the table is summed over ranks.

    The means are weighted by the pairs' weights, and there are none if all weights are 0. Percentiles count
    pairs.
    """
    if not table.has_weight:
        return {}
    mean = table.compute_mean
    metrics = {
        "loss": mean(table["loss"]),
        "logps/chosen": mean(table["chosen_logp"]),
        "entropy": mean(table["entropy"]),
    }
    if flags.has_pairs:
        rewards = table["chosen_reward"] - table["rejected_reward"]
        metrics |= {
            "rewards/chosen": mean(table["chosen_reward"]),
            "rewards/rejected": mean(table["rejected_reward"]),
            "rewards/margins": mean(rewards),
            "rewards/accuracies": mean((rewards > 0).double()),
            "logps/rejected": mean(table["rejected_logp"]),
        }
    for name in table.references:
        # A supervised row has one response, whose value the mean over two responses has halved.
        metrics[f"logratio/{name}"] = mean(table[f"logratio/{name}"]) * (1 if flags.has_pairs else 2)
        if flags.has_reference_weights:
            metrics[f"weights/{name}"] = mean(table[f"weight/{name}"])
    if flags.has_dispersion:
        scale = table["scale"]
        metrics["dispersion/mean"] = mean(scale)
        metrics["dispersion/p10"] = torch.quantile(scale, 0.1)
        metrics["dispersion/p90"] = torch.quantile(scale, 0.9)
    return {name: float(value) for name, value in metrics.items()}


def compute_perf_metrics(
    table: StepTable, *, seconds: float, world_size: int, peak_flops: float | None
) -> dict[str, float]:
    """Compute the speed of a step over all ranks.

    Args:
        table: summed over ranks.
        seconds: wall time of the step.
        world_size: number of ranks.
        peak_flops: FLOP/s of one device in the step's precision; without it no model FLOPs utilisation is
            given.
    """
    cost, pairs = table.cost, len(table["loss"])
    metrics = {
        "perf/tokens_per_second": cost.tokens / seconds,
        "perf/pairs_per_second": pairs / seconds,
        "perf/padding": 1 - cost.tokens / max(cost.positions, 1),
        "perf/reference_stall": cost.reference_stall / world_size,
    }
    if peak_flops is not None:
        metrics["perf/mfu"] = cost.flops / (seconds * peak_flops * world_size)
    return metrics


def compute_eval_metrics(table: StepTable, flags: MetricFlags) -> dict[str, float]:
    """Compute the `eval/` metrics: those of training, and agreement with the annotators.

    `eval/accuracy` is the share of pairs whose h against the primary reference has the sign of the
    majority's label (h = 0 counts one half; pairs with p = 1/2 are left out), with the half-width of its
    95 % normal interval. `eval/margin` is the mean of the same h, signed by the majority, in nats and
    independent of beta. `eval/label_nll` and `eval/calibration_error` (10 equal bins of confidence) compare
    sigma(beta h), beta h being the implied reward margin, with the soft labels. All are weighted by the
    pairs' weights, and there are none if all weights are 0.
    """
    metrics = compute_training_metrics(table, flags)
    if flags.has_pairs:
        metrics |= _compute_agreement_metrics(table.select(torch.nonzero(table["soft_label"] != 0.5)[:, 0]))
    if flags.has_soft_labels and table.has_weight:
        margin, label = table["chosen_reward"] - table["rejected_reward"], table["soft_label"]
        weights = table["pair_weight"]
        metrics["label_nll"] = float(compute_label_nll(margin, label, weights))
        metrics["calibration_error"] = float(compute_calibration_error(margin.sigmoid(), label, weights))
    return {f"eval/{name}": value for name, value in metrics.items()}


def _compute_agreement_metrics(table: StepTable) -> dict[str, float]:
    """Compute accuracy, its interval and the margin of a table of pairs with p != 1/2.

    The interval counts pairs of different weights as (sum w)^2 / sum w^2 pairs of equal ones (Kish's
    effective sample size).
    """
    if not table.has_weight:
        return {}
    accuracy, weights = table.compute_mean(compute_majority_agreement(table)), table["pair_weight"]
    effective_pairs = weights.sum().square() / weights.square().sum()
    return {
        "accuracy": float(accuracy),
        "accuracy_interval": float(1.96 * (accuracy * (1 - accuracy) / effective_pairs).sqrt()),
        "margin": float(table.compute_mean(compute_majority_gaps(table))),
    }


def compute_majority_gaps(table: StepTable) -> Tensor:
    """Compute h against the primary reference, signed by the majority's label: (pairs with p != 1/2,)."""
    label = table["soft_label"] - 0.5
    return table["primary_gap"][label != 0] * label[label != 0].sign()


def compute_majority_agreement(table: StepTable) -> Tensor:
    """Compute 1 for agreement, 0 against it, one half for h = 0: (pairs with p != 1/2,)."""
    gap = compute_majority_gaps(table)
    return torch.where(gap == 0, 0.5, (gap > 0).double())


def find_best_within_kl_budget(
    budget: float | None,
    metrics: Mapping[str, float],
    previous: Mapping[str, float],
    references: Sequence[str],
) -> dict[str, float]:
    """Find `eval/margin_at_kl`, `eval/reward_at_kl`: the best so far with KL to the primary within budget.

    Args:
        budget: nats per response.
        metrics: of this evaluation.
        previous: metrics of the evaluation before it, which include the best until then.
        references: names, the primary first.
    """
    kl = metrics.get(f"eval/kl/{references[0]}") if references else None
    if budget is None or kl is None:
        return {}
    best: dict[str, float] = {}
    for name in ("eval/margin", "eval/reward"):
        values = [previous[f"{name}_at_kl"]] if f"{name}_at_kl" in previous else []
        values += [metrics[name]] if kl <= budget and math.isfinite(metrics.get(name, math.nan)) else []
        best |= {f"{name}_at_kl": max(values)} if values else {}
    return best


def compute_weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Compute sum(w x) / sum(w) of (N,) values and weights."""
    return (values * weights).sum() / weights.sum()


def compute_label_nll(margins: Tensor, soft_labels: Tensor, weights: Tensor) -> Tensor:
    """Compute the weighted mean of -[p log sigma(m) + (1 - p) log sigma(-m)].

    Args:
        margins: (N,) reward margins m.
        soft_labels: (N,) labels p.
        weights: (N,) of the pairs.
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    log_likelihoods = soft_labels * log_sigmoid(margins) + (1 - soft_labels) * log_sigmoid(-margins)
    return -compute_weighted_mean(log_likelihoods, weights)


def compute_calibration_error(
    predicted: Tensor, soft_labels: Tensor, weights: Tensor, bins: int = 10
) -> Tensor:
    """Compute |mean prediction - mean label| over equal-width bins, each weighted by its pairs' weights.

    This is the expected calibration error.
    """
    index = (predicted * bins).long().clamp(0, bins - 1)
    zeros = torch.zeros(bins, dtype=predicted.dtype, device=predicted.device)
    gap = zeros.index_add(0, index, (predicted - soft_labels) * weights)
    return gap.abs().sum() / weights.sum()
