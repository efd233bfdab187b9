"""Reverse-divergence link: EXO (Ji et al. 2024, arXiv:2402.00856, Eq. 16)."""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid


def exo(h: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """KL divergence from (sigma(beta h), sigma(-beta h)) to the smoothed label (1 - e, e), elementwise."""
    x = beta * h
    chosen = x.sigmoid() * (logsigmoid(x) - math.log1p(-label_smoothing))
    rejected = (-x).sigmoid() * (logsigmoid(-x) - math.log(label_smoothing))
    return chosen + rejected
