"""Named space `losses`: the named loss, and that loss's own settings."""

from collections.abc import Mapping

from losses.presets import PRESETS
from tune_spaces.domains import Choice, Domain, Fixed, LogUniform, Uniform
from tune_spaces.draft import PRESET_FIELD, PointDraft

# beta multiplies a difference of two log-ratios, in nats. DPO's authors use 0.1 and 0.5, and 0.05 to 5 for
# their frontier (arXiv:2305.18290); later comparisons use 0.01 to 0.1 (SimPO's searches, arXiv:2405.14734).
_BETA = LogUniform(low=0.01, high=1)
# Averaging by soft labels shrinks h by E[2p - 1] < 1, so the same strength needs a larger beta.
_SOFT_BETA = LogUniform(low=0.01, high=2)
# For losses in which a small beta is a large target: sppo pulls u to 1/(2 beta), NCA's authors use 0.01.
_SMALL_BETA = LogUniform(low=0.001, high=0.1)
# beta multiplies nats per token: SimPO's authors use 2 to 10, MallowsPO's plug-in 10.
_PER_TOKEN_BETA = LogUniform(low=1, high=20)
# SimPO's ratio gamma / beta: 0 to 1 in its authors' advice, 0.1 to 0.3 in MallowsPO's plug-in.
_MARGIN = Uniform(low=0, high=1)
_SFT_WEIGHT = LogUniform(low=0.1, high=2)
_WEIGHTS = Choice(values=("uniform", "adaptive", "adaptive_per_token"))
# Outside the link phi_star multiplies h as beta does: `auto` (a mean scale of 1) leaves the scale to beta.
_AUTO = Fixed(value="auto")
# In the link phi_star sets the form of the loss. The released code uses 0.29 (arXiv:2405.14953).
PHI_STAR_DOMAIN = LogUniform(low=0.1, high=1)

_BETA_FIELD = "loss.beta"
_PHI_STAR_FIELD = "loss.dispersion.phi_star"
_WEIGHTS_FIELD = "loss.references.weights"

FAMILIES: Mapping[str, Mapping[str, Domain]] = {
    # One reference, hard labels.
    "dpo": {_BETA_FIELD: _BETA},
    "ipo": {_BETA_FIELD: _BETA},
    # The target gap, 1/(2 beta), is in nats per token here.
    "ipo_length_normalized": {_BETA_FIELD: LogUniform(low=0.1, high=10)},
    "dpo_length_normalized": {_BETA_FIELD: _PER_TOKEN_BETA},  # 5 in the paper
    "hinge": {_BETA_FIELD: _BETA},
    # From no flipped labels to 0.4, the most noise that the paper's experiments add.
    "robust_dpo": {_BETA_FIELD: _BETA, "loss.link.flip_probability": Uniform(low=0, high=0.4)},
    "ropo": {_BETA_FIELD: _BETA, "loss.link.alpha": LogUniform(low=2, high=50)},
    "exo": {_BETA_FIELD: _BETA, "loss.link.label_smoothing": LogUniform(low=1e-4, high=0.1)},
    "nca": {_BETA_FIELD: _SMALL_BETA},
    "bco_pair": {_BETA_FIELD: _BETA},  # 0.01 in the paper
    "apo_zero": {_BETA_FIELD: _BETA},  # 0.1 in the paper, both
    "apo_down": {_BETA_FIELD: _BETA},
    "sppo": {_BETA_FIELD: _SMALL_BETA},
    # beta 0.05 and temperature 0.05 in the paper.
    "discopop": {_BETA_FIELD: _BETA, "loss.link.temperature": LogUniform(low=0.01, high=0.5)},
    "rpo": {_BETA_FIELD: _BETA, "loss.sft_weight": _SFT_WEIGHT},
    # Soft labels.
    "cdpo": {_BETA_FIELD: _BETA},
    "cipo": {_BETA_FIELD: _BETA},
    "gdpo": {_BETA_FIELD: _SOFT_BETA},
    "gipo": {_BETA_FIELD: _SOFT_BETA},
    "gropo": {_BETA_FIELD: _SOFT_BETA, "loss.link.alpha": LogUniform(low=2, high=50)},
    # Dispersion.
    "mallows_theta": {_BETA_FIELD: _BETA, _PHI_STAR_FIELD: _AUTO},
    "mallows_theta_ipo": {_BETA_FIELD: _BETA, _PHI_STAR_FIELD: _AUTO},
    "mallows_phi": {_BETA_FIELD: _BETA, _PHI_STAR_FIELD: PHI_STAR_DOMAIN},
    # Several references. The paper's radius of the trust region is 0.1.
    "mrpo": {
        _BETA_FIELD: _BETA,
        _WEIGHTS_FIELD: _WEIGHTS,
        "loss.references.trust_region": LogUniform(low=0.01, high=0.5),
    },
    "geometric_references": {_BETA_FIELD: _BETA, _WEIGHTS_FIELD: _WEIGHTS},
    "multi_dpo": {_BETA_FIELD: _BETA, _WEIGHTS_FIELD: _WEIGHTS},
    # No reference in the loss.
    "simpo": {_BETA_FIELD: _PER_TOKEN_BETA, "loss.margin": _MARGIN},
    "mallows_simpo": {_BETA_FIELD: _PER_TOKEN_BETA, "loss.margin": _MARGIN, _PHI_STAR_FIELD: _AUTO},
    "orpo": {_BETA_FIELD: LogUniform(low=0.05, high=2)},  # the paper's lambda, 0.1 to 2 in SimPO's searches
    "cpo": {_BETA_FIELD: _BETA, "loss.sft_weight": _SFT_WEIGHT},
}
"""The named losses that train on pairs, each with the domains of its own fields."""


def draw_loss_family(draft: PointDraft) -> None:
    """Draw a loss family that the run has enough references for, then the family's own settings.

    A range belongs to its family (`loss.beta [simpo]`), since values of beta do not compare across families.
    """
    count = len(draft.references)
    offered = tuple(name for name in FAMILIES if count_references_read(name) <= count)
    family = draft.draw_field(PRESET_FIELD, Choice(values=offered))
    for field, domain in FAMILIES.get(family, {}).items():
        draft.draw_field(field, domain, when=family)


def count_references_read(family: str) -> int:
    """Return the minimum number of references that a named loss is made for."""
    loss = PRESETS[family]
    return loss.min_references if loss.references.combine in ("none", "single") else 2
