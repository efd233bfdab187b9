"""Stage 2: soft labels. p is the probability that chosen really beats rejected.

A link reads either h alone or (u_chosen, u_rejected); `arguments` below is a tuple of one or two tensors.
"""

from collections.abc import Callable

from torch import Tensor


def average_log_ratios(arguments: tuple[Tensor, ...], p: Tensor) -> tuple[Tensor, ...]:
    """Average the link's arguments over the two responses, weighted by the soft label (geometric average).

    GDPO (Furuta et al. 2024, arXiv:2409.06691): pi(y_w)^p pi(y_l)^(1-p) in place of pi(y_w), and likewise for
    y_l, turns h into (2p - 1) h. The gradient is tempered, to exactly 0 at p = 1/2, and p < 1/2 swaps the
    two responses. For links of two arguments [derived], each argument becomes an average of both.
    """
    if len(arguments) == 1:
        return ((2 * p - 1) * arguments[0],)
    chosen, rejected = arguments
    return p * chosen + (1 - p) * rejected, (1 - p) * chosen + p * rejected


def mix_losses(link: Callable[..., Tensor], arguments: tuple[Tensor, ...], p: Tensor) -> Tensor:
    """Compute the expected loss over which response wins: p link(h) + (1 - p) link(-h).

    With the sigmoid link this is conservative DPO (Mitchell 2023), whose optimum is sigma(beta h) = p.
    """
    return p * link(*arguments) + (1 - p) * link(*_swap_responses(arguments))


def _swap_responses(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (-arguments[0],) if len(arguments) == 1 else arguments[::-1]
