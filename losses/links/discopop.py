"""Log-ratio modulated link: DiscoPOP (Lu et al. 2024, arXiv:2406.08414, Eq. 5)."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def discopop(h: Tensor, *, beta: float, temperature: float) -> Tensor:
    """-(1 - m) log sigma(x) + m exp(-x) with x = beta h and m = sigma(x / temperature), elementwise."""
    x = beta * h
    logistic = (-x / temperature).sigmoid() * -logsigmoid(x)
    # m exp(-x) in one exponent: exp(-x) alone overflows where m is 0.
    exponential = (logsigmoid(x / temperature) - x).exp()
    return logistic + exponential
