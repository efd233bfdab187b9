"""Named space `dispersion`: whether pairs on which preferences scatter count less, and in which form."""

from tune_spaces.domains import Choice, Fixed
from tune_spaces.draft import PointDraft
from tune_spaces.losses import PHI_STAR_DOMAIN

_LINK = "loss.link.type"


def draw_dispersion(draft: PointDraft) -> None:
    """Draw MallowsPO's dispersion for any loss (arXiv:2405.14953): none, theta or phi.

    theta scales h by the primary reference's entropy. Its phi_star is `auto`, a mean scale of 1, because the
    search over beta already covers the scale. phi has the dispersion in the link, which replaces the sigmoid;
    there phi_star is searched around the released code's 0.29. A family that has a dispersion keeps it.
    """
    loss = draft.loss
    has_own = draft.has_family and loss.dispersion.type != "none"
    if has_own or loss.completions_only or not draft.references:
        return
    link = loss.link.type
    logistic = link in ("sigmoid", "mallows_phi")
    kind = draft.draw_field("loss.dispersion.type", Choice(values=("none", "entropy")))
    if kind == "entropy" and logistic:
        link = draft.draw_field(_LINK, Choice(values=("sigmoid", "mallows_phi")), when="entropy")
    elif kind == "none" and link == "mallows_phi":
        draft.fix_field(_LINK, "sigmoid")
    if kind == "entropy":
        phi = link == "mallows_phi"
        domain, when = (PHI_STAR_DOMAIN, "link mallows_phi") if phi else (Fixed(value="auto"), "other links")
        draft.draw_field("loss.dispersion.phi_star", domain, when=when)
