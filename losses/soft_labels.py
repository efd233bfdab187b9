"""Stage 2: how sure people were. p is the probability that chosen really beats rejected.

A link reads either h alone or (u_chosen, u_rejected); `arguments` below is a tuple of one or of two tensors.
"""

from collections.abc import Callable

from torch import Tensor


def geometric_average(arguments: tuple[Tensor, ...], p: Tensor) -> tuple[Tensor, ...]:
    """The link's arguments for responses averaged by their labels.

    GDPO (Furuta et al. 2024, arXiv:2409.06691): pi(y_w)^p pi(y_l)^(1-p) in place of pi(y_w), and likewise for
    y_l, turns h into (2p - 1) h. The gradient is tempered, to exactly 0 at p = 1/2, and p < 1/2 turns the
    pair round by itself. For links of two arguments [derived] each becomes the average of both.
    """
    if len(arguments) == 1:
        return ((2 * p - 1) * arguments[0],)
    chosen, rejected = arguments
    return p * chosen + (1 - p) * rejected, (1 - p) * chosen + p * rejected


def mixture(link: Callable[..., Tensor], arguments: tuple[Tensor, ...], p: Tensor) -> Tensor:
    """The loss expected over who wins: p link(h) + (1 - p) link(-h).

    With the sigmoid link this is conservative DPO (Mitchell 2023), whose optimum is sigma(beta h) = p.
    """
    return p * link(*arguments) + (1 - p) * link(*_swapped(arguments))


def _swapped(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (-arguments[0],) if len(arguments) == 1 else arguments[::-1]
