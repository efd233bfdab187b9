"""Soft labels: the share of people who preferred the first response, from whatever the row has of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from preferences.naming import suggest_name
from preferences.pairs import BadRow
from preferences.reading.label_rules import (
    FirstLabel,
    LabelRule,
    RatersLabel,
    ScoresLabel,
    StrengthLabel,
    WinnerLabel,
)

Row = Mapping[str, Any]


def compute_soft_label(fields: Row, row: Row, label: LabelRule | None, place: str) -> float | None:
    """Return the share of people who preferred the first response, or None if the row does not say.

    Args:
        fields: the row's fields, among which are a soft label or counts of votes if it has them.
        row: the whole row, which `label` reads.
        label: how a column gives the label; None for the fields.
        place: names the row in an error.

    Raises:
        BadRow: the label is missing, malformed, out of range, or given twice.
    """
    given = [name for name in ("soft_label", "votes_chosen", "votes_rejected") if name in fields]
    if label is not None:
        if given:
            raise BadRow(
                place,
                "two labels",
                f"the row has {given[0]} beside what data.label reads; keep one of them "
                f"(data.columns: {{{given[0]}: null}} does not read it)",
            )
        return _LABELS[type(label)](row, label, place)
    votes = given if "soft_label" not in given else [name for name in given if name != "soft_label"]
    if "soft_label" in given and votes:
        remedy = "data.columns: {soft_label: null} reads the votes"
        raise BadRow(place, "two labels", f"give soft_label or votes, not both ({remedy})")
    if votes:
        return _count_votes(fields, votes, place)
    if "soft_label" not in fields:
        return None
    share = parse_number(fields["soft_label"])
    if share is None or not 0.0 <= share <= 1.0:
        raise BadRow(
            place,
            "bad soft label",
            "soft_label must be a number from 0 to 1 (the share that preferred chosen), "
            f"got {_shorten(fields['soft_label'])}",
        )
    return share


def parse_weight(row: Row, column: str | None, place: str) -> float:
    """Return the weight of a pair: 1 if no column has it.

    Raises:
        BadRow: the weight is missing, not a number, or below 0.
    """
    if column is None:
        return 1.0
    value = find_value(row, column, place, "data.weight")
    weight = parse_number(value)
    if weight is None or weight < 0:
        raise BadRow(
            place, "bad weight", f"{column} (data.weight) must be a number >= 0, got {_shorten(value)}"
        )
    return weight


def find_value(row: Row, path: str, place: str, setting: str) -> Any:
    """Return the value of a column, or of a part of one: `chosen.score`, `ratings.0`, `raters.score`.

    A name after a list takes that part of every entry.

    Raises:
        BadRow: the row has no such column or part.
    """
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        try:
            value = _take_part(value, name)
        except (KeyError, IndexError, TypeError, ValueError):
            raise BadRow(
                place,
                "missing column",
                f"{setting} reads {path!r}, which the row does not have{suggest_name(path, list(row))}; its "
                f"columns are {', '.join(map(repr, row)) or 'none'}",
            ) from None
    return value


def _take_part(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return value[int(name)] if name.isdigit() else [part[name] for part in value]
    return value[name]


def _compute_from_strength(row: Row, label: StrengthLabel, place: str) -> float:
    value = find_value(row, label.column, place, "data.label")
    return _share_of_first(value, label, label.column, place)


def _compute_from_raters(row: Row, label: RatersLabel, place: str) -> float:
    path = label.column if label.field is None else f"{label.column}.{label.field}"
    values = find_value(row, path, place, "data.label")
    if not isinstance(values, list) or not values:
        raise BadRow(
            place,
            "bad raters",
            f"{path} must be a list with a number of each rater, got {_shorten(values)}",
        )
    shares = [_share_of_first(value, label, path, place) for value in values]
    return sum(1.0 if share > 0.5 else 0.5 if share == 0.5 else 0.0 for share in shares) / len(shares)


def _share_of_first(value: Any, label: StrengthLabel | RatersLabel, path: str, place: str) -> float:
    """Return where a number lies in its range, from 0 to 1, counted towards the first response."""
    low, high = label.range
    number = parse_number(value)
    if number is None or not low <= number <= high:
        raise BadRow(
            place,
            "bad label",
            f"{path} must be a number from {low:g} to {high:g} (data.label.range), got {_shorten(value)}",
        )
    return (number - low if label.prefers == "first" else high - number) / (high - low)


def _compute_from_scores(row: Row, label: ScoresLabel, place: str) -> float:
    scores = []
    for path in label.columns:
        value = find_value(row, path, place, "data.label")
        number = parse_number(value)
        if number is None:
            raise BadRow(place, "bad label", f"{path} (data.label) must be a number, got {_shorten(value)}")
        scores.append(number)
    return 0.5 * (1 + math.tanh((scores[0] - scores[1]) / label.temperature / 2))  # sigma, without overflow


def _compute_from_winner(row: Row, label: WinnerLabel, place: str) -> float:
    value = find_value(row, label.column, place, "data.label")
    for values, share in ((label.first, 1.0), (label.second, 0.0), (label.tie, 0.5)):
        if _is_among(value, values):
            return share
    known = ", ".join(repr(v) for v in (*label.first, *label.second, *label.tie))
    raise BadRow(
        place,
        "unknown winner",
        f"{label.column} is {_shorten(value)}, and data.label knows {known}; add it to first, second or tie",
    )


def _is_among(value: Any, values: Sequence[Any]) -> bool:
    """Return whether a value is one of those, also as the text that a CSV file has of it."""
    return not isinstance(value, list | dict) and str(value) in [str(known) for known in values]


_LABELS: dict[type, Any] = {
    StrengthLabel: _compute_from_strength,
    RatersLabel: _compute_from_raters,
    ScoresLabel: _compute_from_scores,
    WinnerLabel: _compute_from_winner,
    FirstLabel: lambda *_: 1.0,
}


def _count_votes(fields: Row, names: list[str], place: str) -> float:
    if len(names) == 1:
        raise BadRow(
            place, "bad votes", f"{names[0]} is given alone; votes_chosen and votes_rejected go together"
        )
    chosen, rejected = (_parse_votes(fields[name], name, place) for name in names)
    if chosen + rejected == 0:
        raise BadRow(place, "no votes", "votes_chosen and votes_rejected are both 0: nobody preferred either")
    return chosen / (chosen + rejected)


def _parse_votes(value: Any, field: str, place: str) -> float:
    votes = parse_number(value)
    if votes is None or votes < 0 or votes != int(votes):
        raise BadRow(place, "bad votes", f"{field} must be a whole number >= 0, got {_shorten(value)}")
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


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
