"""What a search's pictures show, as plain numbers: PNG and HTML are drawn from the same.

Everything comes from the trials' records and their `metrics.jsonl`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.search.journal import TrialRecord
from orchestrator.search.report import labels as points
from orchestrator.search.report.importance import Importance, estimate_importance
from orchestrator.search.report.ranking import RankedPoint, rank_points
from orchestrator.tracking.metrics_file import read_metrics
from orchestrator.tracking.plots import COLOURS

if TYPE_CHECKING:
    from orchestrator.config.sweep import Objective

MARKERS = ("o", "s", "^", "D", "v", "P", "p")
"""matplotlib's, one per colour."""
OTHER_MARKER = "*"
_GREY, _BASELINE = "#999999", "dpo"
_NOT_SET = {points.ABSENT: "not set"}
_SLOT = 0.1  # of an axis of numbers, for each kind that is no number
_AXES = 10  # as many as can be read side by side
_ORDINAL = 6  # distinct numbers; an axis of no more shows each of them
_GOOD = ("eval/reward", "eval/accuracy", "eval/margin")


@dataclass(frozen=True)
class Curve:
    """One metric of one trial over its steps."""

    record: TrialRecord
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Ended:
    """An ended trial: seconds since the search began, its result, and the best of the search until then."""

    record: TrialRecord
    seconds: float
    value: float
    best: float


@dataclass(frozen=True)
class Axis:
    """One field over all points shown: where each lies between 0 and 1, and what stands beside the axis.

    `bands` are the parts of it over which points of one value are spread.
    """

    name: str
    at: list[float]
    ticks: list[tuple[float, str]]
    bands: list[tuple[float, float]] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Look:
    """How a family of losses is told from the others: no two have a colour or a marker in common."""

    family: str
    colour: str
    marker: str


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of one trial: the divergence it had and what it was worth."""

    record: TrialRecord
    step: int
    kl: float
    value: float


_Of = TypeVar("_Of", Curve, Ended, Evaluated)


@dataclass(frozen=True)
class Search:
    """The records of a search, its objectives and its trials' metrics by number."""

    records: Sequence[TrialRecord]
    objectives: "Sequence[Objective]"
    lines: Mapping[int, Sequence[Mapping[str, Any]]]
    primary: str | None = None

    @classmethod
    def read(
        cls,
        records: Iterable[TrialRecord],
        objectives: "Sequence[Objective]",
        folders: Mapping[int, Path],
        primary: str | None = None,
    ) -> "Search":
        """With the metrics in the trials' folders; a trial without a folder has none."""
        records = sorted(records, key=lambda record: record.number)
        lines = {r.number: read_metrics(folders[r.number]) for r in records if r.number in folders}
        return cls(records, objectives, lines, primary)

    @cached_property
    def ranked(self) -> list[RankedPoint]:
        """Points and controls with a result, best first."""
        return [one for one in rank_points(self.records, self.objectives) if one.rank is not None]

    @cached_property
    def names(self) -> dict[str, str]:
        """Fields that vary, with their short names."""
        return points.shorten_field_names(points.list_shown_fields(self.records))

    @cached_property
    def looks(self) -> dict[str, Look]:
        """By family, the best first. DPO and the best have a colour each; the others have one in common."""
        ranked = [trial for one in self.ranked for trial in one.trials]
        families = list(dict.fromkeys(points.loss_family(record) for record in [*ranked, *self.records]))
        count = len(COLOURS)
        if len(families) <= count:
            named = families
        else:
            named = [family for family in families if family != _BASELINE][: count - (_BASELINE in families)]
            named = [family for family in families if family in (*named, _BASELINE)]
        looks = {
            family: Look(family, colour, marker)
            for family, colour, marker in zip(named, COLOURS, MARKERS, strict=False)
        }
        others = [family for family in families if family not in named]
        other = Look(f"{len(others)} other{'s' * (len(others) > 1)}", _GREY, OTHER_MARKER)
        return looks | dict.fromkeys(others, other)

    def look(self, record: TrialRecord) -> Look:
        """That of the trial's family."""
        return self.looks[points.loss_family(record)]

    def by_look(self, evaluations: "Iterable[_Of]") -> dict[Look, "list[_Of]"]:
        """What belongs to a trial, by the look that its family has."""
        found: dict[Look, list[_Of]] = {look: [] for look in self.looks.values()}
        for one in evaluations:
            found[self.look(one.record)].append(one)
        return {look: own for look, own in found.items() if own}

    @property
    def best(self) -> RankedPoint | None:
        """The first of the ranking that is no control."""
        return next(iter(self.tried), None)

    @cached_property
    def importances(self) -> dict[str, Importance]:
        """By objective; empty where there are too few points."""
        drawn = [
            {field: value for field, value in points.flatten_point(one.point).items() if field in self.names}
            for one in self.ranked
        ]
        found = {
            o.metric: estimate_importance(drawn, [one.estimates[o.metric].mean for one in self.ranked])
            for o in self.objectives
        }
        return {metric: one for metric, one in found.items() if one is not None}

    @property
    def kl(self) -> str | None:
        """The metric of the divergence from the primary reference, if it was measured."""
        return points.find_kl_metric(self.records, self.primary)

    def curves(self, metric: str) -> list[Curve]:
        """One per trial that measured it, controls and failed trials too."""
        found = []
        for record in self.records:
            pairs = [
                (int(line["step"]), float(line[metric]))
                for line in self.lines.get(record.number, ())
                if line.get(metric) is not None
            ]
            if pairs:
                found.append(Curve(record, [step for step, _ in pairs], [value for _, value in pairs]))
        return found

    def history(self, objective: "Objective") -> list[Ended]:
        """Trials with a result in the order they ended; controls are in it but are never the best."""
        stamps = {
            number: [line["time"] for line in lines if "time" in line] for number, lines in self.lines.items()
        }
        started = min((min(times) for times in stamps.values() if times), default=0.0)
        ended = [
            (max(stamps[record.number]) - started, record, value)
            for record in self.records
            if stamps.get(record.number)
            and (value := points.read_result(record, objective.metric)) is not None
        ]
        better = max if objective.mode == "max" else min
        best: float | None = None
        found = []
        for seconds, record, value in sorted(ended, key=lambda item: item[0]):
            if record.control_of is None:
                best = value if best is None else better(best, value)
            found.append(Ended(record, seconds, value, math.nan if best is None else best))
        return found

    def evaluated(self, metric: str) -> list[Evaluated]:
        """Every evaluation at which both the divergence and `metric` were measured."""
        kl = self.kl
        if kl is None:
            return []
        return [
            Evaluated(record, int(line["step"]), float(line[kl]), float(line[metric]))
            for record in self.records
            for line in self.lines.get(record.number, ())
            if line.get(kl) is not None and line.get(metric) is not None
        ]

    def frontiers(self) -> dict[str, list[Evaluated]]:
        """What was measured beside the divergence, and all evaluations of it: reward, accuracy, margin."""
        found = {metric: self.evaluated(metric) for metric in _GOOD}
        return {metric: evaluations for metric, evaluations in found.items() if evaluations}

    @property
    def tried(self) -> list[RankedPoint]:
        """Those of the ranking that are no controls."""
        return [one for one in self.ranked if one.control_of is None]

    def axes(self) -> list[Axis]:
        """Of the points tried: one per field that varies, the ten most set of more, and one per objective.

        None with fewer than two points, or where nothing varies.
        """
        shown = self.tried
        if len(shown) < 2:
            return []
        drawn = [points.flatten_point(one.point) for one in shown]
        fields = points.find_varied_fields(drawn)
        common = sorted(fields, key=lambda field: -sum(field in point for point in drawn))[:_AXES]
        fields = [field for field in fields if field in common]
        if not fields:
            return []
        axes = [
            _axis(self.names[field], [point.get(field, points.ABSENT) for point in drawn]) for field in fields
        ]
        for objective in self.objectives:
            values = [one.estimates[objective.metric].mean for one in shown]
            axes.append(_number_axis(points.format_metric_name(objective.metric), values))
        return axes


def time_unit(seconds: float) -> tuple[str, float]:
    """What to count so long a time in, and how many seconds that has."""
    return next(
        (unit for unit in (("hours", 3600.0), ("minutes", 60.0)) if seconds > 2 * unit[1]), ("seconds", 1.0)
    )


def hull(evaluations: Sequence[Evaluated]) -> list[tuple[float, float]]:
    """The evaluations that none reaches with less divergence, from little to much."""
    best, found = -math.inf, []
    for one in sorted(evaluations, key=lambda one: (one.kl, -one.value)):
        if one.value > best:
            best = one.value
            found.append((one.kl, one.value))
    return found


def _axis(name: str, values: Sequence[Any]) -> Axis:
    """Numbers on a scale if there are many; below them what is no number: not set, none, auto.

    `values` come best first: other kinds than numbers stand in the order of how well they did, the best on
    top.
    """
    if len({value for value in values if points.is_number(value)}) > _ORDINAL:
        return _number_axis(name, values)
    kinds = _kinds(values)
    kinds += [points.format_value(value) for value in sorted({v for v in values if points.is_number(v)})]
    places = {kind: (i + 0.5) / len(kinds) for i, kind in enumerate(kinds)}
    at, bands = _spread([places[points.format_value(value)] for value in values], 0.28 / len(kinds))
    return Axis(name, at, [(y, _NOT_SET.get(kind, kind)) for kind, y in places.items()], bands)


def _number_axis(name: str, values: Sequence[Any]) -> Axis:
    from matplotlib.ticker import LogLocator, MaxNLocator

    present = [float(value) for value in values if points.is_number(value)]
    places = {kind: _SLOT * (i + 0.5) for i, kind in enumerate(_kinds(values))}
    floor = _SLOT * (len(places) + 0.5 * bool(places))
    log = points.spans_decades(present)
    scale = math.log10 if log else float
    low, high = min(present), max(present)

    def place(value: float) -> float:
        spread = scale(high) - scale(low)
        return floor + (1 - floor) * ((scale(value) - scale(low)) / spread if spread else 0.5)

    locator = LogLocator(subs=(1.0, 3.0), numticks=20) if log else MaxNLocator(5)
    located = [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]
    ticks = [(y, _NOT_SET.get(kind, kind)) for kind, y in places.items()]
    ticks += [(place(tick), points.format_value(tick)) for tick in located]
    others, bands = _spread(
        [places[points.format_value(v)] for v in values if not points.is_number(v)], 0.28 * _SLOT
    )
    beside = iter(others)
    at = [place(float(value)) if points.is_number(value) else next(beside) for value in values]
    return Axis(name, at, ticks, bands, "log" if log else "")


def _kinds(values: Sequence[Any]) -> list[str]:
    """What is no number, the worst first; not set is below all of them."""
    ranks: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        if not points.is_number(value):
            ranks.setdefault(points.format_value(value), []).append(i)
    return sorted(ranks, key=lambda kind: (kind != points.ABSENT, -fmean(ranks[kind])))


def _spread(at: Sequence[float], most: float) -> tuple[list[float], list[tuple[float, float]]]:
    """Points of one place a little apart, the first on top, so that lines can be followed; and the bands."""
    members: dict[float, list[int]] = {}
    for i, place in enumerate(at):
        members.setdefault(place, []).append(i)
    spread, bands = list(at), []
    for place, own in members.items():
        half = min(most, 0.012 * (len(own) - 1))
        bands.append((place - half, place + half))
        for order, i in enumerate(own):
            spread[i] = place + half * (1 - 2 * order / max(len(own) - 1, 1))
    return spread, bands
