"""The matched control of a soft or dispersed loss: the plain loss (mostly DPO) of equal initial gradient.

A soft label shrinks a pair's gradient by 2p - 1 and a dispersion scales it, so at equal beta such a loss
moves the policy less (or more) than DPO does, and could seem better for that reason alone. [derived]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from losses.config import LossConfig
from losses.dispersion import calibrate_phi_star
from losses.preference import preference_loss
from losses.scores import PairScores, ReferenceScores

_DIGITS = 4


def match_beta(
    loss: LossConfig, *, soft_labels: Sequence[float] | np.ndarray, entropies: np.ndarray | None
) -> float | None:
    """Compute the beta at which the control's mean gradient in h at h = 0 equals this loss's.

    For GDPO this is beta E[2p - 1], for MallowsPO-theta beta E[s]. The gradient of squared links grows as
    beta shrinks, so their beta is divided by the same factor. Pairs count alike, whatever their weights.

    Args:
        loss: any loss of pairs.
        soft_labels: (N,) of training pairs.
        entropies: (N,) of the same pairs under the primary reference, if the loss needs them.

    Returns:
        The matched beta, or None if the loss has no positive mean gradient at its start.
    """
    labels = torch.as_tensor(np.asarray(soft_labels), dtype=torch.float64)
    entropy = torch.zeros_like(labels) if entropies is None else torch.as_tensor(entropies).double()
    if loss.needs_calibration:
        loss = loss.with_phi_star(calibrate_phi_star(entropy))
    plain = build_hard_label_loss(loss)
    target = _compute_initial_gradient(loss, labels, entropy)
    plain_gradient = _compute_initial_gradient(plain, labels, entropy)
    twice_beta = plain.model_copy(update={"beta": 2 * plain.beta})
    grows_with_beta = _compute_initial_gradient(twice_beta, labels, entropy) > plain_gradient
    if not (target > 0 and plain_gradient > 0):
        return None
    factor = target / plain_gradient
    return float(f"{loss.beta * (factor if grows_with_beta else 1 / factor):.{_DIGITS}g}")


def build_hard_label_loss(loss: LossConfig) -> LossConfig:
    """Return the loss for hard labels without dispersion: DPO for GDPO and MallowsPO, IPO for GIPO."""
    plain = LossConfig()
    update: dict[str, Any] = {"soft_label": plain.soft_label, "dispersion": plain.dispersion}
    if loss.link.type == "mallows_phi":
        update["link"] = plain.link
    return loss.model_copy(update=update)


def _compute_initial_gradient(loss: LossConfig, labels: torch.Tensor, entropy: torch.Tensor) -> float:
    """Compute the mean of -dL/dh at the start, where the policy equals its only reference.

    There u_chosen = u_rejected = 0.
    """
    plain = LossConfig()
    single_reference_loss = loss.model_copy(
        update={"references": plain.references, "length_normalized": False, "sft_weight": 0.0, "margin": 0.0}
    )
    ones, zeros = torch.ones_like(labels), torch.zeros_like(labels)
    h = zeros.clone().requires_grad_()
    policy = PairScores(h / 2, -h / 2, ones, ones)
    reference = ReferenceScores(zeros, zeros, ones, ones, entropy, entropy)
    losses = preference_loss(policy, [reference], config=single_reference_loss, soft_labels=labels).losses
    (slopes,) = torch.autograd.grad(losses.sum(), h)
    return -slopes.mean().item()


def build_control(point: Mapping[str, Any], loss: LossConfig, beta: float | None) -> dict[str, Any] | None:
    """Build the control of a point: the same loss for hard labels, without dispersion, at the matched beta.

    References, link, length normalisation, margin and the SFT term stay as they are.

    Returns:
        The control, or None if the loss is neither soft nor dispersed, or has no matched beta.
    """
    if beta is None or (loss.soft_label.type == "none" and loss.dispersion.type == "none"):
        return None
    dpo, control = LossConfig(), build_hard_label_loss(loss)
    differing = {
        f"loss.{name}": value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for name in type(dpo).model_fields
        if name != "beta" and (value := getattr(control, name)) != getattr(dpo, name)
    }
    other_fields = {field: value for field, value in point.items() if not field.startswith("loss.")}
    return {**other_fields, "loss.preset": "dpo", "loss.beta": beta, **differing}
