"""Anchored link for a policy better than the chosen responses: APO-down (arXiv:2408.06266, Eq. 8)."""

from torch import Tensor


def apo_down(u_chosen: Tensor, u_rejected: Tensor, *, beta: float) -> Tensor:
    """sigma(beta u_w) + 1 - sigma(beta (u_w - u_l)), elementwise: lowers both, rejected further."""
    return (beta * u_chosen).sigmoid() + (-beta * (u_chosen - u_rejected)).sigmoid()
