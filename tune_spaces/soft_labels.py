"""Named space `soft_labels`: what the share of people who preferred `chosen` does to the loss."""

from tune_spaces.domains import Choice
from tune_spaces.draft import Draft


def soft_labels(draft: Draft) -> None:
    """Draw how a soft label acts: not at all, GDPO's geometric average, or conservative DPO's mixture.

    Both act on any link (arXiv:2409.06691; Mitchell 2023). A family that has a rule of its own keeps it.
    On data without soft labels the three are the same loss.
    """
    loss = draft.loss
    kept = draft.has_family and loss.soft_label.type != "none"
    if not (kept or loss.completions_only):
        draft.draw("loss.soft_label.type", Choice(values=("none", "geometric", "mixture")))
