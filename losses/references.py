"""Stage 1: K frozen references become one.

Weighting, clipping and the harmonic combination are MRPO's (Le et al. 2024, arXiv:2405.16388); the geometric
one is the exact optimum of the same objective (arXiv:2502.01203).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.config import ReferencesConfig
from losses.scores import ReferenceScores
from losses.settings import LossError


@dataclass(frozen=True)
class CombinedReference:
    """What the policy is compared with.

    Attributes:
        chosen, rejected: (B, M) log-probs; M is 1, or K when each reference keeps a loss of its own.
        shares: (B, M) how much each column's loss counts; rows sum to 1.
        weights: (B, K) weight of each reference given, for the record.
    """

    chosen: Tensor
    rejected: Tensor
    shares: Tensor
    weights: Tensor


def combine_references(
    references: Sequence[ReferenceScores], config: ReferencesConfig, *, like: Tensor, length_normalized: bool
) -> CombinedReference:
    """Weigh, clip and combine the references as the config says.

    Args:
        references: K of them, of B pairs each, the primary first, sums of log-probs.
        config: which combination, weights and trust region.
        like: (B,) tensor whose dtype and device the result has.
        length_normalized: combine log-probs per token; the weights are still taken from the sums.

    Raises:
        LossError: too few references, or not as many as weights.
    """
    _check_count(len(references), config)
    nothing = like.new_zeros(len(like), len(references))
    alone = like.new_ones(len(like), 1)
    if config.combine == "none":
        zero = torch.zeros_like(alone)
        return CombinedReference(zero, zero, shares=alone, weights=nothing)

    units = [reference.per_token() for reference in references] if length_normalized else references
    chosen = torch.stack([reference.chosen for reference in units], dim=1)
    rejected = torch.stack([reference.rejected for reference in units], dim=1)
    if config.combine == "single":
        weights = torch.cat([alone, nothing[:, 1:]], dim=1)
        return CombinedReference(chosen[:, :1], rejected[:, :1], shares=alone, weights=weights)

    weights = reference_weights(references, config.weights)
    if config.trust_region is not None:
        chosen, rejected = clip_to_primary(
            chosen, rejected, radius=config.trust_region, mode=config.trust_region_mode
        )
    if config.combine == "multi_loss":
        return CombinedReference(chosen, rejected, shares=weights, weights=weights)
    mean = harmonic_mean if config.combine == "harmonic" else geometric_mean
    return CombinedReference(mean(chosen, weights), mean(rejected, weights), shares=alone, weights=weights)


def reference_weights(references: Sequence[ReferenceScores], rule: str | Sequence[float]) -> Tensor:
    """Weights of K references, (B, K), rows summing to 1.

    `adaptive` (MRPO's ARWC): each reference counts as much as it tells the two responses apart,
    |d_k| / sum_j |d_j| with d_k = log r_k(chosen) - log r_k(rejected) from unclipped sums.
    `adaptive_per_token` [derived] takes d_k from log-probs per token, which makes references with
    different tokenizers comparable. Where no reference tells them apart the weights are uniform.
    """
    sums = torch.stack([reference.chosen for reference in references], dim=1)
    uniform = torch.full_like(sums, 1 / len(references))
    if rule == "uniform":
        return uniform
    if not isinstance(rule, str):
        return (sums.new_tensor(rule) / sum(rule)).expand_as(sums)
    units = (
        [reference.per_token() for reference in references] if rule == "adaptive_per_token" else references
    )
    gaps = torch.stack([reference.chosen - reference.rejected for reference in units], dim=1).abs()
    total = gaps.sum(dim=1, keepdim=True)
    return torch.where(total > 0, gaps / total.where(total > 0, 1), uniform)


def clip_to_primary(chosen: Tensor, rejected: Tensor, *, radius: float, mode: str) -> tuple[Tensor, Tensor]:
    """Clip every reference around the first: MRPO's clipped trust region (CTRO). All (B, K).

    Log-probs may differ from the primary's by the fraction `radius` either way. In `adaptive` mode the radius
    is shared between the two responses in proportion to their mean log-probs; `fixed` gives it to both.
    """
    chosen_radius = rejected_radius = torch.full_like(chosen[:, :1], radius)
    if mode == "adaptive":
        chosen_size = chosen.mean(dim=1, keepdim=True).abs()
        rejected_size = rejected.mean(dim=1, keepdim=True).abs()
        total = chosen_size + rejected_size
        share = torch.where(total > 0, chosen_size / total.where(total > 0, 1), 0.5)
        chosen_radius, rejected_radius = radius * share, radius * (1 - share)
    return _clip(chosen, chosen_radius), _clip(rejected, rejected_radius)


def harmonic_mean(logps: Tensor, weights: Tensor) -> Tensor:
    """Log of the weighted harmonic mean of K probabilities, (B, K) -> (B, 1).

    -logsumexp_k(log w_k - log r_k): MRPO's closed-form reference, which bounds the objective with K
    divergences from below. It lies between the least likely reference and the geometric mean.
    """
    return -torch.logsumexp(weights.log() - logps, dim=1, keepdim=True)


def geometric_mean(logps: Tensor, weights: Tensor) -> Tensor:
    """Log of the weighted geometric mean of K probabilities up to a constant, (B, K) -> (B, 1)."""
    return (weights * logps).sum(dim=1, keepdim=True)


def _clip(logps: Tensor, radius: Tensor) -> Tensor:
    primary = logps[:, :1]
    # Log-probs are negative: the larger factor gives the lower bound.
    return logps.clamp(min=(1 + radius) * primary, max=(1 - radius) * primary)


def _check_count(count: int, config: ReferencesConfig) -> None:
    if config.combine != "none" and count == 0:
        raise LossError(
            f"references.combine {config.combine} needs a reference, got none; "
            "pass ReferenceScores, or set references: {combine: none}"
        )
    if config.trust_region is not None and count == 1:
        raise LossError(
            "references.trust_region clips references around the first, but there is only one; "
            "set trust_region: null, or add a reference"
        )
    if isinstance(config.weights, tuple) and len(config.weights) != count:
        raise LossError(
            f"references.weights has {len(config.weights)} entries for {count} references; give one each"
        )
