"""Named space `soft_labels`: how the share of people who preferred `chosen` enters the loss."""

from tune_spaces.domains import Choice
from tune_spaces.draft import PointDraft


def draw_soft_label_type(draft: PointDraft) -> None:
    """Draw how a soft label is used: not at all, GDPO's geometric average, or conservative DPO's mixture.

    Both work with any link (arXiv:2409.06691; Mitchell 2023). A family that has a rule of its own keeps it.
    On data without soft labels the three are the same loss.
    """
    loss = draft.loss
    has_own = draft.has_family and loss.soft_label.type != "none"
    if not (has_own or loss.completions_only):
        draft.draw_field("loss.soft_label.type", Choice(values=("none", "geometric", "mixture")))
