"""Noise-tolerant link: ROPO (Liang et al. 2024, arXiv:2404.04102)."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def ropo(h: Tensor, *, beta: float, alpha: float) -> Tensor:
    """4A^2/(1+A)^2 sigma(-beta h) - 4A/(1+A)^2 log sigma(beta h), elementwise, A = alpha.

    The bounded first part learns little from pairs that look mislabelled; the second keeps a slope there.
    """
    bounded = alpha * (-beta * h).sigmoid()
    return 4 * alpha / (1 + alpha) ** 2 * (bounded - logsigmoid(beta * h))
