"""Figures of a search on one interactive HTML page, drawn with plotly."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.files import replace_text
from orchestrator.search.report.figures import BarFigure, Figure, LineFigure, ParallelFigure, Style
from orchestrator.tracking.plots import COLOURS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Canvas

_SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down"}
_SYMBOLS |= {"P": "cross", "p": "pentagon", "*": "star", "x": "x-thin-open"}
_DASHES = {"none": None, "solid": "solid", "dashed": "dash"}
_PIXELS = 1.5  # per typographic point; a little more than CSS's 1.33, to be easy to point at
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>Search</title></head>
<body style="font-family: sans-serif; max-width: 1200px; margin: auto">
"""


def draw_html_page(figures: Iterable[Figure], path: Path) -> None:
    """Write all figures on one page.

    plotly.js is in the page: a viewer that shows the page alone, as MLflow does, finds no file beside it.
    """
    page = _HEAD
    for i, figure in enumerate(figures):
        if isinstance(figure, LineFigure):
            drawn = _draw_lines(figure)
        elif isinstance(figure, BarFigure):
            drawn = _draw_bars(figure)
        else:
            drawn = _draw_parallel(figure)
        page += drawn.to_html(full_html=False, include_plotlyjs=i == 0, config={"displaylogo": False})
    replace_text(path, page + "</body></html>\n")


def _draw_lines(figure: LineFigure) -> "Canvas":
    drawn = _make_panels([panel.title for panel in figure.panels], share=True)
    drawn.update_xaxes(title=figure.x_label, row=len(figure.panels), col=1)
    for label, style in figure.legend.items():  # a click on an entry shows and hides all of its group
        entry = {"x": [None], "y": [None], "name": _escape(label), "legendgroup": label}
        drawn.add_scatter(**entry, **_to_properties(style))
    for row, panel in enumerate(figure.panels, start=1):
        drawn.update_yaxes(title=panel.y_label, row=row, col=1)
        for series in panel.series:
            trace = _to_properties(series.style)
            trace |= {"x": series.x, "y": series.y, "legendgroup": series.group, "showlegend": False}
            if series.stepped:
                trace["line"]["shape"] = "hv"
            if series.hover:
                trace["text"] = [_escape(text) for text in series.hover]
                trace["hovertemplate"] = "%{text}<extra></extra>"
            else:
                trace["hoverinfo"] = "skip"
            drawn.add_scatter(**trace, row=row, col=1)
    return drawn


def _to_properties(style: Style) -> dict[str, Any]:
    """Return plotly's properties of a scatter trace; a line has small markers at all its points."""
    has_line = style.line != "none"
    parts = ["lines"] * has_line + ["markers"] * (style.marker is not None)
    symbol = _SYMBOLS[style.marker or "o"]
    return {
        "mode": "+".join(parts),
        "opacity": style.opacity,
        "line": {"color": style.colour, "dash": _DASHES[style.line], "width": _PIXELS * style.width},
        "marker": {
            "color": style.colour,
            "size": 4 if has_line else _PIXELS * style.size,
            "symbol": symbol + ("-open" if style.hollow else ""),
        },
    }


def _draw_bars(figure: BarFigure) -> "Canvas":
    drawn = _make_panels([panel.title for panel in figure.panels], share=False)
    for row, panel in enumerate(figure.panels, start=1):
        bars = {"x": panel.values, "y": panel.labels, "error_x": {"array": panel.errors}, "orientation": "h"}
        drawn.add_bar(**bars, marker={"color": COLOURS[0]}, showlegend=False, row=row, col=1)
        drawn.update_yaxes(autorange="reversed", row=row, col=1)
        drawn.update_xaxes(title=panel.x_label, row=row, col=1)
    return drawn


def _draw_parallel(figure: ParallelFigure) -> "Canvas":
    from plotly.graph_objects import Figure as Canvas
    from plotly.graph_objects import Parcoords

    dimensions = [
        {
            "label": axis.label,
            "values": axis.positions,
            "range": [0, 1],
            "tickvals": [y for y, _ in axis.ticks],
            "ticktext": [label for _, label in axis.ticks],
        }
        for axis in figure.axes
    ]
    count = len(figure.axes[0].positions)
    line = {"color": [-place for place in range(count)], "colorscale": "Viridis_r"}
    drawn = Canvas(Parcoords(dimensions=dimensions, line=line))
    drawn.update_layout(title=figure.title, margin={"t": 120, "l": 170}, height=640)
    return drawn


def _make_panels(titles: Sequence[str], *, share: bool) -> "Canvas":
    from plotly.subplots import make_subplots

    rows, titles = len(titles), [_escape(title) for title in titles]
    gap = (0.1 if share else 0.22) / max(rows - 1, 1)
    drawn = make_subplots(rows=rows, cols=1, shared_xaxes=share, subplot_titles=titles, vertical_spacing=gap)
    drawn.update_layout(template="plotly_white", height=140 + 400 * rows, hovermode="closest")
    return drawn


def _escape(text: str) -> str:
    """Escape what a page reads as markup; a line break becomes one of the page's."""
    return html.escape(text).replace("\n", "<br>")
