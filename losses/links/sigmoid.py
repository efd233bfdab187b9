"""Logistic link: DPO (Rafailov et al. 2023, arXiv:2305.18290, Eq. 7)."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid(h: Tensor, *, beta: float) -> Tensor:
    """-log sigma(beta h), elementwise."""
    return -logsigmoid(beta * h)
