"""Figures of a search as PNG files, drawn with matplotlib."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.search.report.figures import BarFigure, Figure, LineFigure, ParallelFigure, Style
from orchestrator.search.report.parallel_axes import ParallelAxis
from orchestrator.tracking.plots import COLOURS, STYLE, WIDTH, make_panels, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_LINES: dict[str, Any] = {"none": "none", "solid": "-", "dashed": (0, (3, 2))}
_MAX_LABEL = 20  # characters


def draw_png_files(figures: Mapping[str, Figure], to: Path) -> list[Path]:
    """Write each figure into the folder `to`, as its name and `.png`; returns the paths."""
    import matplotlib

    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            if isinstance(figure, LineFigure):
                drawn = _draw_lines(figure)
            elif isinstance(figure, BarFigure):
                drawn = _draw_bars(figure)
            else:
                drawn = _draw_parallel(figure)
            paths.append(save_figure(drawn, to / f"{name}.png"))
    return paths


def _draw_lines(figure: LineFigure) -> "Canvas":
    from matplotlib.lines import Line2D

    drawn, axes = make_panels(len(figure.panels), height=3.6)
    axes[-1].set_xlabel(figure.x_label)
    for ax, panel in zip(axes, figure.panels, strict=True):
        ax.set(title=panel.title, ylabel=panel.y_label)
        for series in panel.series:
            properties = _to_properties(series.style)
            if series.stepped:
                properties["drawstyle"] = "steps-post"
            if series.style.line != "none":
                properties["markevery"] = [len(series.x) - 1]
            ax.plot(series.x, series.y, **properties)
    legend = figure.legend.items()
    handles = [Line2D([], [], label=_escape(label), **_to_properties(style)) for label, style in legend]
    if handles:
        axes[0].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return drawn


def _to_properties(style: Style) -> dict[str, Any]:
    """Return matplotlib's properties of a line with markers."""
    marker = (style.colour, style.opacity if style.line == "none" else 1.0)
    # White hides the lines behind a hollow marker; behind faint ones much lies that should be seen.
    inside = "white" if style.opacity == 1 else "none"
    return {
        "color": (style.colour, style.opacity),
        "linestyle": _LINES[style.line],
        "linewidth": style.width,
        "marker": style.marker,
        "markersize": style.size,
        "markeredgecolor": marker,
        "markerfacecolor": inside if style.hollow else marker,
    }


def _draw_bars(figure: BarFigure) -> "Canvas":
    from matplotlib.figure import Figure as Canvas

    rows, count = max(len(panel.labels) for panel in figure.panels), len(figure.panels)
    drawn = Canvas(figsize=(WIDTH, (0.32 * rows + 1.2) * count), layout="constrained")
    for ax, panel in zip(drawn.subplots(count, 1, squeeze=False)[:, 0], figure.panels, strict=True):
        labels = [_escape(label) for label in panel.labels]
        ax.barh(labels, panel.values, xerr=panel.errors, color=COLOURS[0], height=0.6)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.axvline(0, color="#888888", linewidth=0.8)
        ax.set(title=panel.title, xlabel=panel.x_label)
    return drawn


def _draw_parallel(figure: ParallelFigure) -> "Canvas":
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.patches import PathPatch

    columns, count = len(figure.axes), len(figure.axes[0].positions)
    drawn = Canvas(figsize=(max(WIDTH, 1.35 * columns + 0.6), 4.4), layout="constrained")
    ax = drawn.subplots()
    ax.set_axis_off()
    ax.set(xlim=(-0.15, columns - 0.4), ylim=(-0.06, 1.14))
    ax.set_title(f"{figure.title}; bold is the first", pad=10)
    colours = matplotlib.colormaps["viridis_r"]
    for index in reversed(range(count)):
        line = PathPatch(
            _build_curve([axis.positions[index] for axis in figure.axes]),
            facecolor="none",
            edgecolor=colours(0.1 + 0.9 * (1 - index / (count - 1))),
            linewidth=2.6 if index == 0 else 1.1,
            alpha=1.0 if index == 0 else 0.75,
        )
        ax.add_patch(line)
    for x, axis in enumerate(figure.axes):
        _draw_axis(ax, x, axis)
    return drawn


def _build_curve(heights: Sequence[float]) -> Any:
    """Build a smooth path through the heights at x = 0, 1, ..., level where it crosses an axis."""
    from matplotlib.path import Path as Curve

    vertices, codes = [(0.0, heights[0])], [int(Curve.MOVETO)]
    for x, (left, right) in enumerate(pairwise(heights)):
        vertices += [(x + 0.5, left), (x + 0.5, right), (x + 1.0, right)]
        codes += [int(Curve.CURVE4)] * 3
    return Curve(vertices, codes)


def _draw_axis(ax: "Axes", x: int, axis: ParallelAxis) -> None:
    ax.plot([x, x], [0, 1], color="black", linewidth=0.9, zorder=3)
    for low, high in axis.bands:
        ax.plot([x, x], [low, high], color="black", linewidth=3, solid_capstyle="butt", zorder=3)
    ax.text(x, 1.05, _escape(axis.label), ha="center", va="bottom", fontsize=9, weight="bold")
    background = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
    for y, label in axis.ticks:
        short = label if len(label) <= _MAX_LABEL else label[: _MAX_LABEL - 1] + "…"
        ax.plot([x - 0.02, x + 0.02], [y, y], color="black", linewidth=0.9, zorder=3)
        ax.text(x + 0.04, y, _escape(short), va="center", fontsize=8, zorder=4, bbox=background)


def _escape(label: str) -> str:
    """Escape dollar signs, which would begin a formula."""
    return label.replace("$", r"\$")
