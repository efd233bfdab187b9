"""Computation of any preference loss: five stages from log-probabilities to one loss per pair.

Read this file first. A named loss (`losses.presets`) only configures the stages.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from losses.config import LossConfig
from losses.dispersion import compute_neg_log_dispersion
from losses.links.catalog import build_link
from losses.references import combine_references
from losses.scores import LossOutput, PairScores, ReferenceScores
from losses.settings import LossError
from losses.soft_labels import average_log_ratios, mix_losses


def preference_loss(
    policy: PairScores,
    references: Sequence[ReferenceScores],
    *,
    config: LossConfig,
    soft_labels: Tensor | None = None,
) -> LossOutput:
    """Compute the loss of each of B pairs, unreduced.

    Args:
        policy: log-probs that receive the gradients.
        references: scores of the same pairs by K frozen models, the primary first; may be empty if the config
            does not need any.
        config: settings of the five stages.
        soft_labels: (B,) probability in [0, 1] that chosen really beats rejected; None means 1.

    Raises:
        LossError: shapes differ, references or entropies that the config needs are missing, or phi_star
            is still `auto`.
    """
    policy, references, p = _prepare_inputs(policy, references, soft_labels)

    # 0. Length normalisation: log-probs per token; each model counts its own tokens.
    unit = policy.to_per_token() if config.length_normalized else policy

    # 1. References: combined into one, or M = K columns if each has its own loss. From here on (B, M).
    reference = combine_references(
        references, config.references, like=policy.chosen, length_normalized=config.length_normalized
    )
    u_chosen = unit.chosen[:, None] - reference.chosen
    u_rejected = unit.rejected[:, None] - reference.rejected

    # 2. Soft label: a geometric average changes the link's arguments, a mixture its result (below).
    arguments: tuple[Tensor, ...]
    arguments = (u_chosen, u_rejected) if config.link.two_sided else (u_chosen - u_rejected,)
    if config.soft_label.type == "geometric":
        arguments = average_log_ratios(arguments, p[:, None])

    # 3. Margin and dispersion: h becomes s (h - margin). Link mallows_phi reads the dispersion itself.
    dispersion = compute_neg_log_dispersion(config.dispersion, references, like=policy.chosen)
    scale = torch.ones_like(dispersion) if config.link.type == "mallows_phi" else dispersion
    arguments = tuple(scale[:, None] * (argument - config.margin) for argument in arguments)

    # 4. Link: one loss per pair and column, then one per pair.
    link = build_link(config.link, beta=config.beta, neg_log_dispersion=dispersion[:, None])
    if config.soft_label.type == "mixture":
        losses = mix_losses(link, arguments, p[:, None])
    else:
        losses = link(*arguments)
    losses = (reference.shares * losses).sum(dim=1)

    if config.sft_weight:
        losses = losses - config.sft_weight * policy.to_per_token().chosen
    return LossOutput(
        losses=losses,
        chosen_rewards=config.beta * (reference.shares * u_chosen.detach()).sum(dim=1),
        rejected_rewards=config.beta * (reference.shares * u_rejected.detach()).sum(dim=1),
        scale=dispersion,
        weights=reference.weights,
    )


def _prepare_inputs(
    policy: PairScores, references: Sequence[ReferenceScores], soft_labels: Tensor | None
) -> tuple[PairScores, list[ReferenceScores], Tensor]:
    """Convert all inputs to one dtype of float32 or wider, references without gradient, p to a tensor.

    Raises:
        LossError: the numbers of pairs differ.
    """
    for index, reference in enumerate(references):
        if len(reference) != len(policy):
            raise LossError(
                f"reference {index} has {len(reference)} pairs, the policy {len(policy)}; score the same ones"
            )
    if soft_labels is not None and soft_labels.shape != policy.chosen.shape:
        raise LossError(
            f"soft_labels has shape {tuple(soft_labels.shape)} for {len(policy)} pairs; give each pair one"
        )
    dtype = torch.float32
    for scores in (policy, *references):
        dtype = torch.promote_types(dtype, scores.dtype)
    policy = policy.to(dtype)
    p = torch.ones_like(policy.chosen) if soft_labels is None else soft_labels.to(policy.chosen)
    return policy, [reference.detach().to(dtype) for reference in references], p.detach()
