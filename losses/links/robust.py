"""Unbiased logistic link under label flips: rDPO (Chowdhury et al. 2024, arXiv:2403.00409)."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def robust(h: Tensor, *, beta: float, flip_probability: float) -> Tensor:
    """[-(1 - e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2e), elementwise, e the flip probability.

    Its expectation over labels flipped with probability e is the loss of the clean labels.
    """
    unflipped = -(1 - flip_probability) * logsigmoid(beta * h)
    flipped = -flip_probability * logsigmoid(-beta * h)
    return (unflipped - flipped) / (1 - 2 * flip_probability)
