"""Self-play link with hard wins: SPPO (Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with P = 1 and 0)."""

from torch import Tensor


def sppo(u_chosen: Tensor, u_rejected: Tensor, *, beta: float) -> Tensor:
    """(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2, elementwise."""
    target = 1 / (2 * beta)
    return (u_chosen - target).square() + (u_rejected + target).square()
