"""Soft labels: the share of people who preferred `chosen`, given, counted from votes, or 1 by default."""

import math
from collections.abc import Mapping
from typing import Any

from preferences.pairs import BadRow


def compute_soft_label(fields: Mapping[str, Any], place: str) -> float:
    """Return the share of people who preferred `chosen`: given, counted from votes, or 1 without either."""
    votes = [name for name in ("votes_chosen", "votes_rejected") if name in fields]
    if "soft_label" in fields and votes:
        remedy = "data.columns: {soft_label: null} reads the votes"
        raise BadRow(place, "two labels", f"give soft_label or votes, not both ({remedy})")
    if len(votes) == 1:
        raise BadRow(
            place, "bad votes", f"{votes[0]} is given alone; votes_chosen and votes_rejected go together"
        )
    if votes:
        chosen, rejected = (_parse_votes(fields[name], name, place) for name in votes)
        if chosen + rejected == 0:
            raise BadRow(
                place, "no votes", "votes_chosen and votes_rejected are both 0: nobody preferred either"
            )
        return chosen / (chosen + rejected)
    if "soft_label" not in fields:
        return 1.0
    label = parse_number(fields["soft_label"])
    if label is None or not 0.0 <= label <= 1.0:
        raise BadRow(
            place,
            "bad soft label",
            "soft_label must be a number from 0 to 1 (the share that preferred chosen), "
            f"got {fields['soft_label']!r}",
        )
    return label


def _parse_votes(value: Any, field: str, place: str) -> float:
    votes = parse_number(value)
    if votes is None or votes < 0 or votes != int(votes):
        raise BadRow(place, "bad votes", f"{field} must be a whole number >= 0, got {value!r}")
    return votes


def parse_number(value: Any) -> float | None:
    """Return a finite number, also from text (CSV); None for anything else, including a bool or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        parsed = float(value)
    except (ValueError, OverflowError):
        return None
    return parsed if math.isfinite(parsed) else None
