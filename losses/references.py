"""Stage 1: K frozen references are combined into one.

Weighting, clipping and the harmonic combination are MRPO's (Le et al. 2024, arXiv:2405.16388); the geometric
one is the exact optimum of the same objective (arXiv:2502.01203).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.config import ReferenceStageConfig
from losses.scores import ReferenceScores
from losses.settings import LossError


@dataclass(frozen=True)
class CombinedReference:
    """The log-probs that the policy is compared with.

    Attributes:
        chosen, rejected: (B, M) log-probs; M is 1, or K if each reference has its own loss.
        shares: (B, M) weight of each column's loss; rows sum to 1.
        weights: (B, K) weight of each reference passed in, for logging.
    """

    chosen: Tensor
    rejected: Tensor
    shares: Tensor
    weights: Tensor


def combine_references(
    references: Sequence[ReferenceScores],
    config: ReferenceStageConfig,
    *,
    like: Tensor,
    length_normalized: bool,
) -> CombinedReference:
    """Weight, clip and combine the references as configured.

    Args:
        references: sums of log-probs of B pairs by K references, the primary first.
        config: combination, weights and trust region.
        like: (B,) tensor whose dtype and device the result has.
        length_normalized: combine log-probs per token; the weights are still computed from the sums.

    Raises:
        LossError: there are too few references, or not as many as weights.
    """
    _check_reference_count(len(references), config)
    no_weights = like.new_zeros(len(like), len(references))
    full_share = like.new_ones(len(like), 1)
    if config.combine == "none":
        zero = torch.zeros_like(full_share)
        return CombinedReference(zero, zero, shares=full_share, weights=no_weights)

    units = [reference.to_per_token() for reference in references] if length_normalized else references
    chosen = torch.stack([reference.chosen for reference in units], dim=1)
    rejected = torch.stack([reference.rejected for reference in units], dim=1)
    if config.combine == "single":
        weights = torch.cat([full_share, no_weights[:, 1:]], dim=1)
        return CombinedReference(chosen[:, :1], rejected[:, :1], shares=full_share, weights=weights)

    weights = compute_reference_weights(references, config.weights)
    if config.trust_region is not None:
        chosen, rejected = clip_to_primary(
            chosen, rejected, radius=config.trust_region, mode=config.trust_region_mode
        )
    if config.combine == "multi_loss":
        return CombinedReference(chosen, rejected, shares=weights, weights=weights)
    mean = compute_harmonic_mean if config.combine == "harmonic" else compute_geometric_mean
    return CombinedReference(
        mean(chosen, weights), mean(rejected, weights), shares=full_share, weights=weights
    )


def compute_reference_weights(references: Sequence[ReferenceScores], rule: str | Sequence[float]) -> Tensor:
    """Compute the weights of K references, (B, K), rows summing to 1.

    `adaptive` (MRPO's ARWC): a reference's weight is proportional to how far it separates the two responses,
    |d_k| / sum_j |d_j| with d_k = log r_k(chosen) - log r_k(rejected) from unclipped sums.
    `adaptive_per_token` [derived] computes d_k from log-probs per token, which makes references with
    different tokenizers comparable. Where no reference separates the responses, the weights are uniform.
    """
    sums = torch.stack([reference.chosen for reference in references], dim=1)
    uniform = torch.full_like(sums, 1 / len(references))
    if rule == "uniform":
        return uniform
    if not isinstance(rule, str):
        return (sums.new_tensor(rule) / sum(rule)).expand_as(sums)
    units = (
        [reference.to_per_token() for reference in references] if rule == "adaptive_per_token" else references
    )
    gaps = torch.stack([reference.chosen - reference.rejected for reference in units], dim=1).abs()
    total = gaps.sum(dim=1, keepdim=True)
    return torch.where(total > 0, gaps / total.where(total > 0, 1), uniform)


def clip_to_primary(chosen: Tensor, rejected: Tensor, *, radius: float, mode: str) -> tuple[Tensor, Tensor]:
    """Clip every reference around the primary: MRPO's clipped trust region (CTRO). All tensors are (B, K).

    Log-probs may differ from the primary's by the fraction `radius` in either direction. In `adaptive` mode
    the radius is divided between the two responses in proportion to their mean log-probs; in `fixed` mode
    both responses get the whole radius.
    """
    chosen_radius = rejected_radius = torch.full_like(chosen[:, :1], radius)
    if mode == "adaptive":
        chosen_size = chosen.mean(dim=1, keepdim=True).abs()
        rejected_size = rejected.mean(dim=1, keepdim=True).abs()
        total = chosen_size + rejected_size
        share = torch.where(total > 0, chosen_size / total.where(total > 0, 1), 0.5)
        chosen_radius, rejected_radius = radius * share, radius * (1 - share)
    return _clip_around_primary(chosen, chosen_radius), _clip_around_primary(rejected, rejected_radius)


def compute_harmonic_mean(logps: Tensor, weights: Tensor) -> Tensor:
    """Compute the log of the weighted harmonic mean of K probabilities, (B, K) -> (B, 1).

    -logsumexp_k(log w_k - log r_k): MRPO's closed-form reference, which bounds the objective with K
    divergences from below. It lies between the least likely reference and the geometric mean.
    """
    return -torch.logsumexp(weights.log() - logps, dim=1, keepdim=True)


def compute_geometric_mean(logps: Tensor, weights: Tensor) -> Tensor:
    """Compute the log of K probabilities' weighted geometric mean, up to a constant, (B, K) -> (B, 1)."""
    return (weights * logps).sum(dim=1, keepdim=True)


def _clip_around_primary(logps: Tensor, radius: Tensor) -> Tensor:
    primary = logps[:, :1]
    # Log-probs are negative: the larger factor gives the lower bound.
    return logps.clamp(min=(1 + radius) * primary, max=(1 - radius) * primary)


def _check_reference_count(count: int, config: ReferenceStageConfig) -> None:
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
