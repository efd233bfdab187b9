"""Noise-contrastive link: NCA (Chen et al. 2024, arXiv:2402.05369)."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def nca(u_chosen: Tensor, u_rejected: Tensor, *, beta: float) -> Tensor:
    """-log sigma(beta u_w) - 1/2 log sigma(-beta u_w) - 1/2 log sigma(-beta u_l), elementwise."""
    chosen, rejected = beta * u_chosen, beta * u_rejected
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2
