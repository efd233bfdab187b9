"""Anchored link for a policy worse than the chosen responses: APO-zero (arXiv:2408.06266, Eq. 7)."""

from torch import Tensor


def apo_zero(u_chosen: Tensor, u_rejected: Tensor, *, beta: float) -> Tensor:
    """1 - sigma(beta u_w) + sigma(beta u_l), elementwise: raises chosen, lowers rejected."""
    return (-beta * u_chosen).sigmoid() + (beta * u_rejected).sigmoid()
