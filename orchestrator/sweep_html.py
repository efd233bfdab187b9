"""A search's pictures to point at: one HTML file each, with plotly.js once beside them."""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import points
from orchestrator.sweep_data import Search, hull, time_unit
from orchestrator.trials import TrialRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_DASHES = ("solid", "dot")
_MARKERS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond"}
_SCRIPT = "plotly.min.js"


def draw(search: Search, to: Path) -> list[Path]:
    """Write the pictures that the search has numbers for; returns their paths, and that of plotly.js."""
    figures = {
        "trials": _trials(search),
        "history": _history(search),
        "parallel": _parallel(search),
        "importance": _importance(search),
        "frontier": _frontier(search),
    }
    drawn = [_save(figure, to / f"{name}.html") for name, figure in figures.items() if figure is not None]
    return [*drawn, _script(to)] if drawn else []


def _trials(search: Search) -> "Figure | None":
    present = [(o, curves) for o in search.objectives if (curves := search.curves(o.metric))]
    if not present:
        return None
    figure = _panels([points.metric_name(o.metric) for o, _ in present], "optimizer step")
    best = {trial.number for trial in search.best.trials} if search.best else set()
    for row, (_, curves) in enumerate(present, start=1):
        told = set[str]()
        for curve in curves:
            look = search.look(curve.record)
            line = {
                "color": look.colour,
                "dash": "solid" if curve.record.control_of is None else "dash",
                "width": 4 if curve.record.number in best else 1.5,
            }
            figure.add_scatter(
                x=curve.steps,
                y=curve.values,
                mode="lines+markers",
                line=line,
                marker={"size": 4, "symbol": _MARKERS[look.marker]},
                hovertemplate=_about(search, curve.record) + "<br>step %{x}: %{y:.4g}<extra></extra>",
                **_entry(look.family, told, row),
                row=row,
                col=1,
            )
    return figure


def _history(search: Search) -> "Figure | None":
    present = [(o, ended) for o in search.objectives if (ended := search.history(o))]
    if not present:
        return None
    unit, seconds = time_unit(max(one.seconds for _, ended in present for one in ended))
    figure = _panels([points.metric_name(o.metric) for o, _ in present], f"{unit} since the search began")
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
        for family, look in search.looks.items():
            own = [one for one in ended if points.family(one.record) == family]
            hollow = [one.record.control_of is not None for one in own]
            symbol = _MARKERS[look.marker]
            figure.add_scatter(
                x=[one.seconds / seconds for one in own],
                y=[one.value for one in own],
                mode="markers",
                marker={
                    "color": look.colour,
                    "size": 9,
                    "symbol": [f"{symbol}-open" if is_control else symbol for is_control in hollow],
                },
                text=[_about(search, one.record) for one in own],
                hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
                **_entry(family, set(), row),
                row=row,
                col=1,
            )
    return figure


def _parallel(search: Search) -> "Figure | None":
    shown = [one for one in search.ranked if one.control_of is None]
    axes = search.axes(shown)
    if len(shown) < 2 or len(axes) <= len(search.objectives):
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
    line = {"color": [-place for place in range(len(shown))], "colorscale": "Viridis_r"}
    figure = Figure(Parcoords(dimensions=dimensions, line=line))
    figure.update_layout(title=f"{len(shown)} points, the better the darker", margin={"t": 120})
    return figure


def _importance(search: Search) -> "Figure | None":
    weighed = search.importances
    if not weighed:
        return None
    figure = _panels(
        [f"What {points.metric_name(metric)} depended on" for metric in weighed], "", share=False
    )
    for row, one in enumerate(weighed.values(), start=1):
        figure.add_bar(
            x=list(one.shares.values()),
            y=[search.names.get(field, field) for field in one.shares],
            error_x={"array": list(one.errors.values())},
            orientation="h",
            marker={"color": "#0072B2"},
            showlegend=False,
            row=row,
            col=1,
        )
        figure.update_yaxes(autorange="reversed", title="", row=row, col=1)
        figure.update_xaxes(title=one.told, row=row, col=1)
    return figure


def _frontier(search: Search) -> "Figure | None":
    present = search.frontiers()
    kl = search.kl
    if not present or kl is None:
        return None
    figure = _panels(
        [points.metric_name(m) for m in present], f"{points.metric_name(kl)} (nats per response)"
    )
    for row, evaluations in enumerate(present.values(), start=1):
        for family, look in search.looks.items():
            own = [one for one in evaluations if points.family(one.record) == family]
            if not own:
                continue
            figure.add_scatter(
                x=[one.kl for one in own],
                y=[one.value for one in own],
                mode="markers",
                marker={"color": look.colour, "symbol": _MARKERS[look.marker], "opacity": 0.45},
                text=[f"{_about(search, one.record)}<br>step {one.step}" for one in own],
                hovertemplate="%{text}<br>KL %{x:.3g}: %{y:.4g}<extra></extra>",
                **_entry(family, set(), row),
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
                legendgroup=family,
                showlegend=False,
                row=row,
                col=1,
            )
    return figure


def _panels(titles: Sequence[str], below: str, *, share: bool = True) -> "Figure":
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=len(titles), cols=1, shared_xaxes=share, subplot_titles=[html.escape(title) for title in titles]
    )
    figure.update_layout(template="plotly_white", height=120 + 380 * len(titles), hovermode="closest")
    figure.update_xaxes(title=below, row=len(titles), col=1)
    return figure


def _entry(family: str, told: set[str], row: int) -> dict[str, Any]:
    """One entry in the legend per family; a click on it shows and hides all its lines."""
    entry = {
        "name": html.escape(family),
        "legendgroup": family,
        "showlegend": row == 1 and family not in told,
    }
    told.add(family)
    return entry


def _about(search: Search, record: TrialRecord) -> str:
    about = f"trial {record.number}" + (f", control of {record.control_of}" if record.control_of else "")
    lines = [
        f"{name} {points.text(record.point[f])}" for f, name in search.names.items() if f in record.point
    ]
    return html.escape(about) + "".join(f"<br>{html.escape(line)}" for line in lines)


def _save(figure: "Figure", path: Path) -> Path:
    page = figure.to_html(include_plotlyjs="directory", config={"displaylogo": False})
    return _replace(page, path)


def _script(folder: Path) -> Path:
    from plotly.offline import get_plotlyjs

    return _replace(get_plotlyjs(), folder / _SCRIPT)


def _replace(text: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path
