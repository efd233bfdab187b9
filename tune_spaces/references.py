"""Named space `references`: which of the run's references are used, and how several are combined."""

from itertools import combinations
from typing import Any

from pydantic import JsonValue

from tune_spaces.domains import Choice
from tune_spaces.draft import USE_FIELD, PointDraft

WHEN_SEVERAL = "several references"

_COMBINE = "loss.references.combine"
_WEIGHTS = "loss.references.weights"
_TRUST_REGION = "loss.references.trust_region"

_SEVERAL_DOMAINS = {
    _WEIGHTS: Choice(values=("uniform", "adaptive", "adaptive_per_token")),
    # MRPO's authors clip at 0.1 (arXiv:2405.16388); None shows what the clipping contributes.
    _TRUST_REGION: Choice(values=(None, 0.05, 0.1, 0.3)),
}


def draw_references(draft: PointDraft) -> None:
    """Draw the references to use, always with the primary: trials are measured against the same model.

    With the primary alone, the loss keeps its form with one reference. Several references are combined in one
    of three ways, each with weights and a trust region: MRPO's choices (arXiv:2405.16388), for any loss. A
    family made for several references keeps its combination; a loss without a reference is not changed.
    """
    stage = draft.loss.references
    if len(draft.references) < 2 or stage.combine == "none":
        return
    primary_only, *several = _list_subsets(draft.references)
    if draft.has_family and stage.combine != "single":
        draft.draw_field(
            USE_FIELD, Choice(values=tuple(several)), when=WHEN_SEVERAL, is_suitable=has_several_references
        )
    elif (
        draft.draw_field(USE_FIELD, Choice(values=(primary_only, *several))) == primary_only
        or _draw_combine(draft) == "single"
    ):
        if stage.combine != "single":
            _reset_combine(draft)
        return
    for field, domain in _SEVERAL_DOMAINS.items():
        if field not in draft.fields:
            draft.draw_field(field, domain, when=WHEN_SEVERAL)


def has_several_references(names: Any) -> bool:
    """Whether a value of `references.use` names several references, which must be combined."""
    return isinstance(names, list) and len(names) > 1


def _draw_combine(draft: PointDraft) -> str:
    return str(
        draft.draw_field(_COMBINE, Choice(values=("harmonic", "geometric", "multi_loss")), when=WHEN_SEVERAL)
    )


def _reset_combine(draft: PointDraft) -> None:
    """Set the loss back to one reference, for a base loss that combines several."""
    draft.fix_field(_COMBINE, "single")
    draft.fix_field(_WEIGHTS, "uniform")
    draft.fix_field(_TRUST_REGION, None)


def _list_subsets(names: tuple[str, ...]) -> list[JsonValue]:
    """List all sets of references that contain the first one, the smallest sets first."""
    primary, *others = names
    sizes = range(len(others) + 1)
    return [[primary, *further] for size in sizes for further in combinations(others, size)]
