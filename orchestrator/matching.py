"""The DPO that a soft or dispersed loss must be compared with: the one that pulls as hard at the start.

A soft label shrinks a pair's pull by 2p - 1 and a dispersion scales it, so at equal beta such a loss moves
the policy less (or more) than DPO does, and would seem to gain by that alone. [derived]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from losses.config import LossConfig
from losses.dispersion import calibrated_phi_star
from losses.preference import preference_loss
from losses.scores import PairScores, ReferenceScores

_DIGITS = 4


def matched_beta(
    loss: LossConfig, *, soft_labels: Sequence[float] | np.ndarray, entropies: np.ndarray | None
) -> float:
    """The beta at which DPO's mean gradient in h at h = 0 equals this loss's.

    DPO's is -beta / 2 for every pair. For GDPO this is beta E[2p - 1], for MallowsPO-theta beta E[s].

    Args:
        loss: any loss of pairs.
        soft_labels: (N,) of training pairs.
        entropies: (N,) of the same pairs under the primary reference, where the loss reads them.
    """
    labels = torch.as_tensor(np.asarray(soft_labels), dtype=torch.float64)
    entropy = torch.zeros_like(labels) if entropies is None else torch.as_tensor(entropies).double()
    if loss.needs_calibration:
        loss = loss.with_phi_star(calibrated_phi_star(entropy))
    # At the start and per token or not, u_chosen = u_rejected = 0 against any references.
    plain = loss.model_copy(
        update={
            "references": LossConfig().references,
            "length_normalized": False,
            "sft_weight": 0.0,
            "margin": 0.0,
        }
    )
    ones, zeros = torch.ones_like(labels), torch.zeros_like(labels)
    h = zeros.clone().requires_grad_()
    policy = PairScores(h / 2, -h / 2, ones, ones)
    reference = ReferenceScores(zeros, zeros, ones, ones, entropy, entropy)
    losses = preference_loss(policy, [reference], config=plain, soft_labels=labels).losses
    (slopes,) = torch.autograd.grad(losses.sum(), h)
    return float(f"{-2 * slopes.mean().item():.{_DIGITS}g}")


def control_of(point: Mapping[str, Any], loss: LossConfig, beta: float) -> dict[str, Any] | None:
    """The point with DPO at the matched beta for its loss: hard labels, no dispersion, a sigmoid link.

    References, length normalisation and the SFT term stay as they are. None where the loss has nothing to
    control for, or pulls no pair at its start.
    """
    if loss.soft_label.type == "none" and loss.dispersion.type == "none":
        return None
    if not beta > 0:
        return None
    kept = {name: getattr(loss, name) for name in ("references", "length_normalized", "sft_weight")}
    dpo = LossConfig()
    return {
        **{field: value for field, value in point.items() if not field.startswith("loss.")},
        "loss.preset": "dpo",
        "loss.beta": beta,
        **{
            f"loss.{name}": value.model_dump(mode="json") if isinstance(value, BaseModel) else value
            for name, value in kept.items()
            if value != getattr(dpo, name)
        },
    }
