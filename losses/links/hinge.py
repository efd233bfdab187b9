"""Hinge link: SLiC-HF (Zhao et al. 2023, arXiv:2305.10425)."""

from torch import Tensor
from torch.nn.functional import relu


def hinge(h: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - beta h), elementwise."""
    return relu(1 - beta * h)
