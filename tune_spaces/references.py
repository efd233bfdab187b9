"""Named space `references`: which of the run's references, and how several become one."""

from itertools import combinations
from typing import Any

from pydantic import JsonValue

from tune_spaces.domains import Choice
from tune_spaces.draft import USE, Draft

SEVERAL = "several references"

_COMBINE = "loss.references.combine"
_WEIGHTS = "loss.references.weights"
_TRUST_REGION = "loss.references.trust_region"

_SEVERAL = {
    _WEIGHTS: Choice(values=("uniform", "adaptive", "adaptive_per_token")),
    # MRPO's authors clip at 0.1 (arXiv:2405.16388); none shows what the clipping is worth.
    _TRUST_REGION: Choice(values=(None, 0.05, 0.1, 0.3)),
}


def references(draft: Draft) -> None:
    """Draw the references to use, always with the primary: trials are measured against the same model.

    The primary alone leaves the loss as it is with one reference. Several are combined in one of three ways,
    each with weights and a trust region: MRPO's questions (arXiv:2405.16388), put to any loss. A family made
    for several keeps its combination, and a loss without a reference is left alone.
    """
    stage = draft.loss.references
    if len(draft.references) < 2 or stage.combine == "none":
        return
    alone, *several = _subsets(draft.references)
    if draft.has_family and stage.combine != "single":
        draft.draw(USE, Choice(values=tuple(several)), when=SEVERAL, suits=are_several)
    elif draft.draw(USE, Choice(values=(alone, *several))) == alone or _combine(draft) == "single":
        if stage.combine != "single":
            _combine_none(draft)
        return
    for field, domain in _SEVERAL.items():
        if field not in draft.fields:
            draft.draw(field, domain, when=SEVERAL)


def are_several(names: Any) -> bool:
    """Whether a value of `references.use` leaves something to combine."""
    return isinstance(names, list) and len(names) > 1


def _combine(draft: Draft) -> str:
    return str(draft.draw(_COMBINE, Choice(values=("harmonic", "geometric", "multi_loss")), when=SEVERAL))


def _combine_none(draft: Draft) -> None:
    draft.fix(_COMBINE, "single")
    draft.fix(_WEIGHTS, "uniform")
    draft.fix(_TRUST_REGION, None)


def _subsets(names: tuple[str, ...]) -> list[JsonValue]:
    """All sets of references with the first in them, the smallest first."""
    primary, *others = names
    sizes = range(len(others) + 1)
    return [[primary, *further] for size in sizes for further in combinations(others, size)]
