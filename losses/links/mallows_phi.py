"""The exact Mallows pairwise probability under Kendall's tau: MallowsPO-phi (arXiv:2405.14953)."""

import torch
from torch import Tensor


def mallows_phi(h: Tensor, *, beta: float, neg_log_dispersion: Tensor, smoothing: float) -> Tensor:
    """-log g(beta h), elementwise, in float64 whatever the input; the result has the input's dtype.

    g(t) = q(t + 1) - q(t) for t > 0 with q(u) = u / (1 - exp(-lam u)), and g(-t) = 1 - g(t): the probability
    that the better of two items wins when their consensus ranks are t apart. g jumps at 0, where training
    starts, so for |t| < smoothing it is replaced by 1/2 + a t + b t^3, which has the same value and slope at
    t = smoothing [derived; the paper smooths as well].

    Args:
        h: any shape.
        beta: inverse temperature.
        neg_log_dispersion: lam > 0, broadcastable to h. The loss has a rounding error of about 1e-15 / lam.
        smoothing: the |t| below which g is smoothed, > 0.
    """
    t = beta * h.double()
    lam = neg_log_dispersion.double()
    edge = torch.full_like(lam, smoothing)

    log_upset = _compute_log_upset(t.abs().clamp(min=smoothing), lam)
    outside = torch.where(t < 0, -log_upset, -(-log_upset.exp()).log1p())

    rise = 0.5 - _compute_log_upset(edge, lam).exp()
    slope = _compute_slope(edge, lam)
    a = (3 * rise - slope * edge) / (2 * edge)
    b = (slope * edge - rise) / (2 * edge**3)
    near = t.clamp(-smoothing, smoothing)
    inside = -(0.5 + a * near + b * near**3).log()

    return torch.where(t.abs() < smoothing, inside, outside).to(h.dtype)


def _compute_log_upset(distance: Tensor, lam: Tensor) -> Tensor:
    """Compute log g(-distance) = log(1 - g(distance)) for distance > 0.

    The factor exp(-lam distance) is taken out of the log, so that it neither underflows nor cancels.
    """
    closer = distance / -torch.expm1(-lam * distance)
    further = (distance + 1) * (-lam).exp() / -torch.expm1(-lam * (distance + 1))
    return (closer - further).log() - lam * distance


def _compute_slope(t: Tensor, lam: Tensor) -> Tensor:
    """Compute g'(t) for t > 0."""
    return _compute_tail_slope(lam * (t + 1)) - _compute_tail_slope(lam * t)


def _compute_tail_slope(x: Tensor) -> Tensor:
    """Compute the derivative of x / expm1(x), written with exp(-x) so that it does not overflow."""
    complement = -torch.expm1(-x)
    return (-x).exp() * (complement - x) / complement.square()
