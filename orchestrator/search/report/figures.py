"""A search's figures, described without a plotting library: `png` and `html` draw the same description."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.search.journal import TrialRecord
from orchestrator.search.report.labels import format_metric_name, format_trials, format_value
from orchestrator.search.report.parallel_axes import ParallelAxis, build_parallel_axes
from orchestrator.search.report.search_data import Curve, LossFamily, SearchData, compute_frontier

Line = Literal["none", "solid", "dashed"]


@dataclass(frozen=True)
class Style:
    """How points are drawn.

    Attributes:
        colour: `#rrggbb`, of line and marker.
        marker: by matplotlib's name. Of a line only the last point is marked; a page may mark all points.
        width: of the line, in typographic points, as is the marker's `size`.
        opacity: of the line, or of the markers where there is no line.
        hollow: whether only the marker's edge is drawn.
    """

    colour: str
    marker: str | None = None
    line: Line = "none"
    width: float = 1.5
    size: float = 5.0
    opacity: float = 1.0
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one style that belong to the legend's entry `group`.

    `hover` has a text per point, or none; if `stepped`, each value holds until the next point.
    """

    x: Sequence[float]
    y: Sequence[float]
    style: Style
    group: str
    hover: Sequence[str] = ()
    stepped: bool = False


@dataclass(frozen=True)
class Panel:
    """Series on one pair of axes; the later ones are on top."""

    title: str
    y_label: str
    series: Sequence[Series]


@dataclass(frozen=True)
class LineFigure:
    """Panels one above the other that share the horizontal axis and a legend: styles by label."""

    x_label: str
    panels: Sequence[Panel]
    legend: Mapping[str, Style]


@dataclass(frozen=True)
class BarPanel:
    """Horizontal bars, the first on top; `errors` are the half-lengths of their error bars."""

    title: str
    x_label: str
    labels: Sequence[str]
    values: Sequence[float]
    errors: Sequence[float]


@dataclass(frozen=True)
class BarFigure:
    """Panels of bars one above the other, each with its own horizontal axis."""

    panels: Sequence[BarPanel]


@dataclass(frozen=True)
class ParallelFigure:
    """Parallel coordinates: a line per point across all axes, the best point first."""

    title: str
    axes: Sequence[ParallelAxis]


Figure = LineFigure | BarFigure | ParallelFigure

_GREY, _BLACK = "#888888", "#000000"
_FAILED, _FAILED_STYLE = "failed", Style(_BLACK, "x", size=6)
_BEST_SO_FAR, _BEST_SO_FAR_STYLE = "best so far", Style(_BLACK, line="solid")
_HOLLOW_CONTROL, _DASHED_CONTROL = Style(_GREY, "o", hollow=True), Style(_GREY, line="dashed")
_FRONTIER_METRICS = ("eval/reward", "eval/accuracy", "eval/margin")


def build_figures(data: SearchData) -> dict[str, Figure]:
    """Describe the figures that the search has numbers for, by name: what was not measured is not drawn."""
    figures = {
        "trials": _build_trials(data),
        "history": _build_history(data),
        "parallel": _build_parallel(data),
        "importance": _build_importance(data),
        "frontier": _build_frontier(data),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _build_trials(data: SearchData) -> LineFigure | None:
    """Objectives over steps: a line per trial, with a cross where a trial failed."""
    best = {trial.number for trial in data.best.trials} if data.best else set()
    panels = []
    for objective in data.objectives:
        curves = data.collect_curves(objective.metric)
        curves.sort(key=lambda curve: curve.record.number in best)
        series = [_build_curve(data, curve, is_best=curve.record.number in best) for curve in curves]
        failed = [curve for curve in curves if curve.record.status == "failed"]
        series += [Series(curve.x[-1:], curve.values[-1:], _FAILED_STYLE, _FAILED) for curve in failed]
        if curves:
            panels.append(_build_panel(objective.metric, f"of {len(curves)} trials", series))
    also = {_FAILED: _FAILED_STYLE} if any(record.status == "failed" for record in data.records) else {}
    if data.best:
        label = f"the first of the ranking:\n{format_trials(data.best.trials)}"
        also[label] = Style(_GREY, line="solid", width=2.4)
    legend = _build_legend(data, "solid", _DASHED_CONTROL, also)
    return LineFigure("optimizer step", panels, legend) if panels else None


def _build_curve(data: SearchData, curve: Curve, *, is_best: bool) -> Series:
    """A line, dashed for a control; at its end the family's marker, or none if the trial failed."""
    record, family = curve.record, data.find_family(curve.record)
    marker = None if record.status == "failed" else family.marker
    line: Line = "solid" if record.control_of is None else "dashed"
    if is_best:
        style = Style(family.colour, marker, line, width=2.4, size=6)
    else:
        style = Style(family.colour, marker, line, width=1.1, size=3.5, opacity=0.55)
    texts = [f"step {step}: {value:.4g}" for step, value in zip(curve.x, curve.values, strict=True)]
    return _build_trial_series(data, record, curve.x, curve.values, texts, style)


def _build_history(data: SearchData) -> LineFigure | None:
    """Results in the order they came, and the best so far."""
    ended = {objective.metric: data.list_ended_trials(objective) for objective in data.objectives}
    ended = {metric: trials for metric, trials in ended.items() if trials}
    if not ended:
        return None
    unit, scale = _choose_time_unit(max(one.seconds for trials in ended.values() for one in trials))
    panels = []
    for metric, trials in ended.items():
        times, bests = [one.seconds / scale for one in trials], [one.best for one in trials]
        series = [Series(times, bests, _BEST_SO_FAR_STYLE, _BEST_SO_FAR, stepped=True)]
        for time, one in zip(times, trials, strict=True):
            style = _build_marker_style(data, one.record, size=6)
            texts = [f"{one.value:.4g}"]
            series.append(_build_trial_series(data, one.record, [time], [one.value], texts, style))
        panels.append(_build_panel(metric, "of trials as they ended", series))
    legend = _build_legend(data, "none", _HOLLOW_CONTROL, {_BEST_SO_FAR: _BEST_SO_FAR_STYLE})
    return LineFigure(f"{unit} since the search began", panels, legend)


def _build_parallel(data: SearchData) -> ParallelFigure | None:
    """Which fields went with which results."""
    axes = build_parallel_axes(data)
    title = f"{len(data.ranked_points)} points: the darker, the higher in the ranking"
    return ParallelFigure(title, axes) if axes else None


def _build_importance(data: SearchData) -> BarFigure | None:
    """Which fields the objectives depended on."""
    panels = []
    for metric, importance in data.importances.items():
        title, fields = f"What {format_metric_name(metric)} depended on", importance.shown_fields
        names = [data.field_names[field] for field in fields]
        shares, errors = ([values[f] for f in fields] for values in (importance.shares, importance.errors))
        panels.append(BarPanel(title, importance.explanation, names, shares, errors))
    return BarFigure(panels) if panels else None


def _build_frontier(data: SearchData) -> LineFigure | None:
    """What was gained at which divergence, and the frontier of each family of losses."""
    kl = data.kl_metric
    if kl is None:
        return None
    panels = []
    for metric in _FRONTIER_METRICS:
        series: list[Series] = []
        points: dict[LossFamily, list[tuple[float, float]]] = {}
        for curve in data.collect_curves(metric, over=kl):
            rows = list(zip(curve.steps, curve.x, curve.values, strict=True))
            texts = [f"step {step}\nKL {x:.3g}: {y:.4g}" for step, x, y in rows]
            style = _build_marker_style(data, curve.record, size=4, opacity=0.35)
            series.append(_build_trial_series(data, curve.record, curve.x, curve.values, texts, style))
            points.setdefault(data.find_family(curve.record), []).extend((x, y) for _, x, y in rows)
        for family, pairs in points.items():
            x, y = zip(*compute_frontier(pairs), strict=True)
            style = Style(family.colour, line="solid", width=1.8)
            series.append(Series(x, y, style, family.label, stepped=True))
        if series:
            panels.append(_build_panel(metric, "against divergence; lines: the best of each loss", series))
    legend = _build_legend(data, "solid", _HOLLOW_CONTROL, {})
    return LineFigure(f"{format_metric_name(kl)} (nats per response)", panels, legend) if panels else None


def _build_marker_style(data: SearchData, record: TrialRecord, size: float, opacity: float = 1.0) -> Style:
    """The marker of the trial's family, hollow for a control."""
    family, hollow = data.find_family(record), record.control_of is not None
    return Style(family.colour, family.marker, size=size, opacity=opacity, hollow=hollow)


def _build_trial_series(
    data: SearchData,
    record: TrialRecord,
    x: Sequence[float],
    y: Sequence[float],
    texts: Sequence[str],
    style: Style,
) -> Series:
    """Points of one trial; `texts` have what is hovered over each beside the trial's description."""
    fields = [(name, field) for field, name in data.field_names.items() if field in record.point]
    about = f"trial {record.number}" + (f", control of {record.control_of}" if record.control_of else "")
    about += "".join(f"\n{name} {format_value(record.point[field])}" for name, field in fields)
    return Series(x, y, style, data.find_family(record).label, [f"{about}\n{text}" for text in texts])


def _build_panel(metric: str, about: str, series: Sequence[Series]) -> Panel:
    name = format_metric_name(metric)
    return Panel(f"{name[:1].upper()}{name[1:]} {about}", name, series)


def _build_legend(
    data: SearchData, line: Line, control: Style, also: Mapping[str, Style]
) -> dict[str, Style]:
    """Styles of the families, of controls if there are any, and `also`; a single one needs no legend."""
    families = data.families.values()
    legend = {family.label: Style(family.colour, family.marker, line) for family in families}
    if any(record.control_of is not None for record in data.records):
        legend["control"] = control
    legend |= also
    return legend if len(legend) > 1 else {}


def _choose_time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit to show so long a time in, and its seconds."""
    for unit, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds > 2 * length:
            return unit, length
    return "seconds", 1.0
