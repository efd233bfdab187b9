"""Squared link: IPO (Azar et al. 2023, arXiv:2310.12036, Eq. 17)."""

from torch import Tensor


def ipo(h: Tensor, *, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2, elementwise: h is pulled to a finite target, smaller for larger beta."""
    return (h - 1 / (2 * beta)).square()
