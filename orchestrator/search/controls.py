"""The control of a soft or dispersed loss: the plain one (DPO, for most) that pulls as hard at the start.

A soft label shrinks a pair's pull by 2p - 1 and a dispersion scales it, so at equal beta such a loss moves
the policy less (or more) than DPO does, and would seem to gain by that alone. [derived]
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
    """The beta at which the control's mean gradient in h at h = 0 equals this loss's.

    For GDPO this is beta E[2p - 1], for MallowsPO-theta beta E[s]. Squared links pull the harder the smaller
    beta is, so theirs is divided by the same factor. None where the loss pulls no pair at its start.

    Args:
        loss: any loss of pairs.
        soft_labels: (N,) of training pairs.
        entropies: (N,) of the same pairs under the primary reference, where the loss reads them.
    """
    labels = torch.as_tensor(np.asarray(soft_labels), dtype=torch.float64)
    entropy = torch.zeros_like(labels) if entropies is None else torch.as_tensor(entropies).double()
    if loss.needs_calibration:
        loss = loss.with_phi_star(calibrate_phi_star(entropy))
    plain = hard_label_loss(loss)
    wanted, given = (
        _mean_initial_gradient(loss, labels, entropy),
        _mean_initial_gradient(plain, labels, entropy),
    )
    doubled = _mean_initial_gradient(plain.model_copy(update={"beta": 2 * plain.beta}), labels, entropy)
    if not (wanted > 0 and given > 0):
        return None
    factor = wanted / given
    return float(f"{loss.beta * (factor if doubled > given else 1 / factor):.{_DIGITS}g}")


def hard_label_loss(loss: LossConfig) -> LossConfig:
    """The loss for hard labels without dispersion: DPO for GDPO and MallowsPO, IPO for GIPO."""
    plain = LossConfig()
    update: dict[str, Any] = {"soft_label": plain.soft_label, "dispersion": plain.dispersion}
    if loss.link.type == "mallows_phi":
        update["link"] = plain.link
    return loss.model_copy(update=update)


def _mean_initial_gradient(loss: LossConfig, labels: torch.Tensor, entropy: torch.Tensor) -> float:
    """Mean of -dL/dh at the start, where the policy equals its only reference: u_chosen = u_rejected = 0."""
    plain = LossConfig()
    start = loss.model_copy(
        update={"references": plain.references, "length_normalized": False, "sft_weight": 0.0, "margin": 0.0}
    )
    ones, zeros = torch.ones_like(labels), torch.zeros_like(labels)
    h = zeros.clone().requires_grad_()
    policy = PairScores(h / 2, -h / 2, ones, ones)
    reference = ReferenceScores(zeros, zeros, ones, ones, entropy, entropy)
    losses = preference_loss(policy, [reference], config=start, soft_labels=labels).losses
    (slopes,) = torch.autograd.grad(losses.sum(), h)
    return -slopes.mean().item()


def build_control(point: Mapping[str, Any], loss: LossConfig, beta: float | None) -> dict[str, Any] | None:
    """The point with the same loss for hard labels, without dispersion, at the matched beta.

    References, link, length normalisation, margin and the SFT term stay as they are. None where the loss has
    nothing to control for, or no matched beta.
    """
    if beta is None or (loss.soft_label.type == "none" and loss.dispersion.type == "none"):
        return None
    dpo, control = LossConfig(), hard_label_loss(loss)
    differing = {
        f"loss.{name}": value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for name in type(dpo).model_fields
        if name != "beta" and (value := getattr(control, name)) != getattr(dpo, name)
    }
    rest = {field: value for field, value in point.items() if not field.startswith("loss.")}
    return {**rest, "loss.preset": "dpo", "loss.beta": beta, **differing}
