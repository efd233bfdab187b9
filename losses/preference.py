"""A preference loss, whichever it is: five stages from log-probabilities to one loss per pair.

Read this file first. A named loss (`losses.presets`) only sets what each stage does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from losses import soft_labels as soft
from losses.config import LossConfig
from losses.dispersion import neg_log_dispersion
from losses.links.catalog import link_function
from losses.references import combine_references
from losses.scores import LossOutput, PairScores, ReferenceScores
from losses.settings import LossError


def preference_loss(
    policy: PairScores,
    references: Sequence[ReferenceScores],
    *,
    config: LossConfig,
    soft_labels: Tensor | None = None,
) -> LossOutput:
    """The loss of each of B pairs, unreduced.

    Args:
        policy: log-probs that gradients flow to.
        references: K frozen models' scores of the same pairs, the primary first; may be empty where the
            config reads none.
        config: the five stages.
        soft_labels: (B,) probability in [0, 1] that chosen really beats rejected; None means 1.

    Raises:
        LossError: shapes differ, references or entropies that the config reads are missing, or phi_star
            is still `auto`.
    """
    policy, references, p = _same_terms(policy, references, soft_labels)

    # 0. Length normalisation: log-probs per token, each model counting its own tokens.
    unit = policy.per_token() if config.length_normalized else policy

    # 1. References: K become one, or M = K columns when each keeps a loss of its own. From here on (B, M).
    reference = combine_references(
        references, config.references, like=policy.chosen, length_normalized=config.length_normalized
    )
    u_chosen = unit.chosen[:, None] - reference.chosen
    u_rejected = unit.rejected[:, None] - reference.rejected

    # 2. Soft label: a geometric average acts on what the link reads, a mixture on what it returns (below).
    arguments: tuple[Tensor, ...]
    arguments = (u_chosen, u_rejected) if config.link.two_sided else (u_chosen - u_rejected,)
    if config.soft_label.type == "geometric":
        arguments = soft.geometric_average(arguments, p[:, None])

    # 3. Margin and dispersion: h becomes s (h - margin). Link mallows_phi takes the dispersion itself.
    dispersion = neg_log_dispersion(config.dispersion, references, like=policy.chosen)
    scale = torch.ones_like(dispersion) if config.link.type == "mallows_phi" else dispersion
    arguments = tuple(scale[:, None] * (argument - config.margin) for argument in arguments)

    # 4. Link: to one loss per pair and column, then one per pair.
    link = link_function(config.link, beta=config.beta, neg_log_dispersion=dispersion[:, None])
    if config.soft_label.type == "mixture":
        losses = soft.mixture(link, arguments, p[:, None])
    else:
        losses = link(*arguments)
    losses = (reference.shares * losses).sum(dim=1)

    if config.sft_weight:
        losses = losses - config.sft_weight * policy.per_token().chosen
    return LossOutput(
        losses=losses,
        chosen_rewards=config.beta * (reference.shares * u_chosen.detach()).sum(dim=1),
        rejected_rewards=config.beta * (reference.shares * u_rejected.detach()).sum(dim=1),
        scale=dispersion,
        weights=reference.weights,
    )


def _same_terms(
    policy: PairScores, references: Sequence[ReferenceScores], soft_labels: Tensor | None
) -> tuple[PairScores, list[ReferenceScores], Tensor]:
    """Everything in one dtype of float32 or wider, references without gradient, p as a tensor."""
    for index, reference in enumerate(references):
        if len(reference) != len(policy):
            raise LossError(
                f"reference {index} has {len(reference)} pairs, the policy {len(policy)}; score the same"
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
    return policy, [reference.detached().to(dtype) for reference in references], p.detach()
