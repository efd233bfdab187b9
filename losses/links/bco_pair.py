"""Binary-classifier link: BCO without its reward shift (Jung et al. 2024, arXiv:2404.04656)."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def bco_pair(u_chosen: Tensor, u_rejected: Tensor, *, beta: float) -> Tensor:
    """-log sigma(beta u_w) - log sigma(-beta u_l), elementwise."""
    return -logsigmoid(beta * u_chosen) - logsigmoid(-beta * u_rejected)
