"""The axes of a search's parallel coordinates: one per field that varies and one per objective."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from orchestrator.search.report.labels import (
    ABSENT,
    find_varied_fields,
    flatten_point,
    format_metric_name,
    format_value,
    is_number,
    spans_decades,
)
from orchestrator.search.report.search_data import SearchData

_NOT_SET = "not set"
_SLOT = 0.1  # share of an axis of numbers for each value that is no number
_MAX_AXES = 10  # as many as can be read side by side
_MAX_ORDINALS = 6  # distinct numbers; an axis of no more shows each of them


@dataclass(frozen=True)
class ParallelAxis:
    """One field over all points shown: the position of each between 0 and 1, and labelled ticks.

    `bands` are the parts of the axis over which points of one value are spread.
    """

    label: str
    positions: list[float]
    ticks: list[tuple[float, str]]
    bands: list[tuple[float, float]] = field(default_factory=list)


def build_parallel_axes(data: SearchData) -> list[ParallelAxis]:
    """Build an axis per field that varies over the ranked points (the ten most set ones) and per objective.

    Empty with fewer than two points, or where nothing varies.
    """
    shown = data.ranked_points
    if len(shown) < 2:
        return []
    drawn = [flatten_point(point.point) for point in shown]
    fields = find_varied_fields(drawn)
    most_set = sorted(fields, key=lambda field: -sum(field in point for point in drawn))[:_MAX_AXES]
    fields = [field for field in fields if field in most_set]
    if not fields:
        return []
    axes = [
        _build_axis(data.field_names[field], [point.get(field, ABSENT) for point in drawn])
        for field in fields
    ]
    for objective in data.objectives:
        values = [point.estimates[objective.metric].mean for point in shown]
        axes.append(_build_number_axis(format_metric_name(objective.metric), values))
    return axes


def _build_axis(name: str, values: Sequence[Any]) -> ParallelAxis:
    """Build a scale where there are many numbers, else an axis on which every value has a place.

    `values` come best first: values that are no numbers are in the order of how well they did, the best on
    top; numbers are above them.
    """
    numbers = sorted({value for value in values if is_number(value)})
    if len(numbers) > _MAX_ORDINALS:
        return _build_number_axis(name, values)
    labels = _order_categories(values) + [_label_value(value) for value in numbers]
    places = {label: (i + 0.5) / len(labels) for i, label in enumerate(labels)}
    positions, bands = _spread([places[_label_value(value)] for value in values], 0.28 / len(labels))
    return ParallelAxis(name, positions, [(place, label) for label, place in places.items()], bands)


def _build_number_axis(name: str, values: Sequence[Any]) -> ParallelAxis:
    """Build a scale of numbers, logarithmic if they span decades; values that are no numbers are below it."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    numbers = [float(value) for value in values if is_number(value)]
    places = {label: _SLOT * (i + 0.5) for i, label in enumerate(_order_categories(values))}
    floor = _SLOT * (len(places) + 0.5 * bool(places))
    log = spans_decades(numbers)
    scale = math.log10 if log else float
    low, high = min(numbers), max(numbers)

    def place(value: float) -> float:
        spread = scale(high) - scale(low)
        return floor + (1 - floor) * ((scale(value) - scale(low)) / spread if spread else 0.5)

    locator = LogLocator(subs=(1.0, 3.0), numticks=20) if log else MaxNLocator(5)
    located = [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]
    ticks = [(y, label) for label, y in places.items()] + [(place(y), format_value(y)) for y in located]
    others, bands = _spread([places[_label_value(v)] for v in values if not is_number(v)], 0.28 * _SLOT)
    rest = iter(others)
    positions = [place(float(value)) if is_number(value) else next(rest) for value in values]
    return ParallelAxis(name + (" (log)" if log else ""), positions, ticks, bands)


def _label_value(value: Any) -> str:
    return _NOT_SET if value == ABSENT else format_value(value)


def _order_categories(values: Sequence[Any]) -> list[str]:
    """Labels of the values that are no numbers, the worst first; "not set" is below all of them."""
    ranks: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        if not is_number(value):
            ranks.setdefault(_label_value(value), []).append(i)
    return sorted(ranks, key=lambda label: (label != _NOT_SET, -fmean(ranks[label])))


def _spread(places: Sequence[float], most: float) -> tuple[list[float], list[tuple[float, float]]]:
    """Move points of one place a little apart, the first on top, so that lines can be followed.

    Returns:
        The new positions, and the bands over which points were spread, each at most `most` to either side.
    """
    members: dict[float, list[int]] = {}
    for i, place in enumerate(places):
        members.setdefault(place, []).append(i)
    positions, bands = list(places), []
    for place, own in members.items():
        half = min(most, 0.012 * (len(own) - 1))
        bands.append((place - half, place + half))
        for order, i in enumerate(own):
            positions[i] = place + half * (1 - 2 * order / max(len(own) - 1, 1))
    return positions, bands
