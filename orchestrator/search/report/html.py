"""A search's pictures to point at: one HTML page that needs nothing beside it, so MLflow shows it too."""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.search.journal import TrialRecord
from orchestrator.search.report import labels as points
from orchestrator.search.report.figures import MARKERS, OTHER_MARKER, Look, Search, hull, time_unit

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "pentagon")
_MARKERS = {**dict(zip(MARKERS, _SYMBOLS, strict=True)), OTHER_MARKER: "star"}
_PAGE = "search.html"
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>Search</title></head>
<body style="font-family: sans-serif; max-width: 1200px; margin: auto">
"""


def draw(search: Search, to: Path) -> list[Path]:
    """Write one page of the pictures that the search has numbers for; returns its path, if there are any.

    plotly.js is in the page: a viewer that shows it alone, as MLflow does, finds no file beside it.
    """
    figures = [
        figure
        for make in (_trials, _history, _parallel, _importance, _frontier)
        if (figure := make(search)) is not None
    ]
    if not figures:
        return []
    page = _HEAD
    for i, figure in enumerate(figures):
        page += figure.to_html(full_html=False, include_plotlyjs=i == 0, config={"displaylogo": False})
    return [_replace(page + "</body></html>\n", to / _PAGE)]


def _trials(search: Search) -> "Figure | None":
    present = [(o, curves) for o in search.objectives if (curves := search.curves(o.metric))]
    if not present:
        return None
    figure = _panels(
        [f"{points.format_metric_name(o.metric)} of {len(curves)} trials" for o, curves in present],
        "optimizer step",
    )
    _families(figure, search, "lines+markers")
    best = {trial.number for trial in search.best.trials} if search.best else set()
    for row, (_, curves) in enumerate(present, start=1):
        for curve in curves:
            look = search.look(curve.record)
            is_best = curve.record.number in best
            dash = "dash" if curve.record.control_of is not None else "solid"
            figure.add_scatter(
                x=curve.steps,
                y=curve.values,
                mode="lines+markers",
                line={"color": look.colour, "dash": dash, "width": 4 if is_best else 1.5},
                opacity=1.0 if is_best else 0.65,
                marker={"size": 4, "symbol": _MARKERS[look.marker]},
                hovertemplate=_about(search, curve.record) + "<br>step %{x}: %{y:.4g}<extra></extra>",
                legendgroup=look.family,
                showlegend=False,
                row=row,
                col=1,
            )
    return figure


def _history(search: Search) -> "Figure | None":
    present = [(o, ended) for o in search.objectives if (ended := search.history(o))]
    if not present:
        return None
    unit, seconds = time_unit(max(one.seconds for _, ended in present for one in ended))
    figure = _panels(
        [f"{points.format_metric_name(o.metric)} of trials as they ended" for o, _ in present],
        f"{unit} since the search began",
    )
    _families(figure, search, "markers")
    for row, (_, ended) in enumerate(present, start=1):
        figure.add_scatter(
            x=[one.seconds / seconds for one in ended],
            y=[one.best for one in ended],
            line={"color": "black", "shape": "hv"},
            mode="lines",
            name="best so far",
            showlegend=row == 1,
            hoverinfo="skip",
            row=row,
            col=1,
        )
        for look, own in search.by_look(ended).items():
            figure.add_scatter(
                x=[one.seconds / seconds for one in own],
                y=[one.value for one in own],
                mode="markers",
                marker={
                    "color": look.colour,
                    "size": 9,
                    "symbol": [_symbol(look, one.record) for one in own],
                },
                text=[_about(search, one.record) for one in own],
                hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
                legendgroup=look.family,
                showlegend=False,
                row=row,
                col=1,
            )
    return figure


def _parallel(search: Search) -> "Figure | None":
    axes, count = search.axes(), len(search.tried)
    if not axes:
        return None
    from plotly.graph_objects import Figure, Parcoords

    dimensions = [
        {
            "label": axis.name + (f" ({axis.note})" if axis.note else ""),
            "values": axis.at,
            "range": [0, 1],
            "tickvals": [y for y, _ in axis.ticks],
            "ticktext": [label for _, label in axis.ticks],
        }
        for axis in axes
    ]
    line = {"color": [-place for place in range(count)], "colorscale": "Viridis_r"}
    figure = Figure(Parcoords(dimensions=dimensions, line=line))
    title = f"{count} points: the darker, the higher in the ranking"
    figure.update_layout(title=title, margin={"t": 120, "l": 170}, height=640)
    return figure


def _importance(search: Search) -> "Figure | None":
    weighed = search.importances
    if not weighed:
        return None
    figure = _panels(
        [f"What {points.format_metric_name(metric)} depended on" for metric in weighed], "", share=False
    )
    for row, one in enumerate(weighed.values(), start=1):
        figure.add_bar(
            x=[one.shares[field] for field in one.shown_fields],
            y=[search.names[field] for field in one.shown_fields],
            error_x={"array": [one.errors[field] for field in one.shown_fields]},
            orientation="h",
            marker={"color": "#0072B2"},
            showlegend=False,
            row=row,
            col=1,
        )
        figure.update_yaxes(autorange="reversed", title="", row=row, col=1)
        figure.update_xaxes(title=one.explanation, row=row, col=1)
    return figure


def _frontier(search: Search) -> "Figure | None":
    present = search.frontiers()
    kl = search.kl
    if not present or kl is None:
        return None
    figure = _panels(
        [
            f"{points.format_metric_name(metric)} against divergence; lines: the best of each loss"
            for metric in present
        ],
        f"{points.format_metric_name(kl)} (nats per response)",
    )
    _families(figure, search, "markers")
    for row, evaluations in enumerate(present.values(), start=1):
        for look, own in search.by_look(evaluations).items():
            figure.add_scatter(
                x=[one.kl for one in own],
                y=[one.value for one in own],
                mode="markers",
                marker={
                    "color": look.colour,
                    "opacity": 0.45,
                    "symbol": [_symbol(look, one.record) for one in own],
                },
                text=[f"{_about(search, one.record)}<br>step {one.step}" for one in own],
                hovertemplate="%{text}<br>KL %{x:.3g}: %{y:.4g}<extra></extra>",
                legendgroup=look.family,
                showlegend=False,
                row=row,
                col=1,
            )
            edge = hull(own)
            figure.add_scatter(
                x=[x for x, _ in edge],
                y=[y for _, y in edge],
                mode="lines",
                line={"color": look.colour, "shape": "hv", "width": 2.5},
                hoverinfo="skip",
                legendgroup=look.family,
                showlegend=False,
                row=row,
                col=1,
            )
    return figure


def _panels(titles: Sequence[str], below: str, *, share: bool = True) -> "Figure":
    from plotly.subplots import make_subplots

    rows = len(titles)
    titles = [html.escape(title[:1].upper() + title[1:]) for title in titles]
    gap = (0.1 if share else 0.22) / max(rows - 1, 1)
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=share, subplot_titles=titles, vertical_spacing=gap)
    figure.update_layout(template="plotly_white", height=140 + 400 * rows, hovermode="closest")
    figure.update_xaxes(title=below, row=rows, col=1)
    return figure


def _families(figure: "Figure", search: Search, mode: str) -> None:
    """What colours and forms mean; a click on a family shows and hides all of it."""
    for look in dict.fromkeys(search.looks.values()):
        figure.add_scatter(
            x=[None],
            y=[None],
            mode=mode,
            line={"color": look.colour},
            marker={"color": look.colour, "symbol": _MARKERS[look.marker]},
            name=html.escape(look.family),
            legendgroup=look.family,
        )
    if any(record.control_of is not None for record in search.records):
        style = {"line": {"color": "#888888", "dash": "dash"}, "marker": {"symbol": "circle-open"}}
        only = "lines" if "lines" in mode else "markers"
        figure.add_scatter(x=[None], y=[None], mode=only, name="control", **style)


def _symbol(look: Look, record: TrialRecord) -> str:
    """Hollow for a control."""
    return _MARKERS[look.marker] + ("-open" if record.control_of is not None else "")


def _about(search: Search, record: TrialRecord) -> str:
    about = f"trial {record.number}" + (f", control of {record.control_of}" if record.control_of else "")
    lines = [
        f"{name} {points.format_value(record.point[f])}"
        for f, name in search.names.items()
        if f in record.point
    ]
    return html.escape(about) + "".join(f"<br>{html.escape(line)}" for line in lines)


def _replace(text: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path
