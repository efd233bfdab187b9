"""Odds-ratio link: ORPO (Hong et al. 2024, arXiv:2403.07691, Eqs. 4 and 7)."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def orpo(u_chosen: Tensor, u_rejected: Tensor, *, beta: float) -> Tensor:
    """-beta log sigma(log odds(chosen) - log odds(rejected)), elementwise.

    Arguments are mean log-probs per token, <= 0, without a reference. An argument of exactly 0, a certain
    response with infinite odds, is clamped to just below 0.
    """
    return -beta * logsigmoid(_compute_log_odds(u_chosen) - _compute_log_odds(u_rejected))


def _compute_log_odds(logp: Tensor) -> Tensor:
    """Compute logp - log(1 - exp(logp))."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    # Each form of log(1 - e^x) is exact on its side of -log 2; both are finite on either side.
    near = logp > -math.log(2)
    return logp - torch.where(near, (-logp.expm1()).log(), (-logp.exp()).log1p())
