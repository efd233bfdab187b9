"""Stage 3: the dispersion of people's preferences (MallowsPO; Chen et al. 2024, arXiv:2405.14953).

In a Mallows model with dispersion phi, the neg-log-dispersion -log phi is small where preferences scatter.
It is estimated from the primary reference's entropy: where that model is uncertain, people are assumed to
disagree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from losses.config import ConstantDispersion, DispersionConfig, EntropyDispersion
from losses.scores import ReferenceScores
from losses.settings import LossError

_CLAMP_MARGIN = 1e-4
"""Mean entropies are clamped to this distance from 0 and 1, where their log is infinite or 0."""


def compute_neg_log_dispersion(
    config: DispersionConfig, references: Sequence[ReferenceScores], *, like: Tensor
) -> Tensor:
    """Compute the neg-log-dispersion of each pair, > 0 and without gradient: (B,).

    `entropy`: -phi_star * log H with H the mean of both responses' normalised entropies under the primary
    reference [released code: phi_star 0.29, which includes the paper's factor 2]. H is a mean per token: a
    sum could exceed log V, which would make the scale negative and reverse the preference. `none` gives ones.

    Args:
        config: type of dispersion and its settings.
        references: the primary first; only its entropies are read.
        like: (B,) tensor whose shape, dtype and device the result has.

    Raises:
        LossError: the primary reference's entropies are missing, or phi_star is still `auto`.
    """
    if isinstance(config, EntropyDispersion):
        if config.phi_star == "auto":
            raise LossError(
                "dispersion.phi_star auto must be resolved before the loss is computed; "
                "use config.with_phi_star(calibrate_phi_star(entropies)), or set a number such as 0.29"
            )
        return config.phi_star * -_clamp_entropy(_compute_mean_entropy(references)).log()
    if isinstance(config, ConstantDispersion):
        return torch.full_like(like, config.value)
    return torch.ones_like(like)


def calibrate_phi_star(entropies: Tensor) -> float:
    """Compute the phi_star that makes the mean scale over a training set 1: 1 / mean(-log H).

    Only then is a comparison with an undispersed loss at the same beta fair. [derived]

    Args:
        entropies: (N,) per pair (H_chosen + H_rejected) / 2, normalised to [0, 1].

    Raises:
        LossError: there are no entropies, or some are not in [0, 1].
    """
    values = entropies.detach().double()
    if not len(values) or not bool(((values >= 0) & (values <= 1 + 1e-3)).all()):
        raise LossError(
            "phi_star auto needs entropies in [0, 1], one or more; "
            "divide the mean over a response's tokens (not the sum) by the log of the vocabulary's size"
        )
    return 1 / float(-_clamp_entropy(values).log().mean())


def _compute_mean_entropy(references: Sequence[ReferenceScores]) -> Tensor:
    primary = references[0] if references else None
    if primary is None or primary.chosen_entropy is None or primary.rejected_entropy is None:
        raise LossError(
            "dispersion entropy needs the primary reference's entropies, got none; pass ReferenceScores "
            "with chosen_entropy and rejected_entropy, or set dispersion: {type: none}"
        )
    return (primary.chosen_entropy + primary.rejected_entropy) / 2


def _clamp_entropy(entropy: Tensor) -> Tensor:
    return entropy.clamp(_CLAMP_MARGIN, 1 - _CLAMP_MARGIN)
