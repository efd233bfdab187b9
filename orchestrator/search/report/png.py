"""A search's pictures for a page or a screen, with matplotlib."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.search.report.figures import Axis, Search, hull, time_unit
from orchestrator.search.report.labels import format_metric_name, format_trials
from orchestrator.tracking.plots import STYLE, WIDTH, make_panels, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_GREY = "#888888"
_DASHED = (0, (3, 2))
_HOLLOW: dict[str, Any] = {"marker": "o", "markerfacecolor": "white"}


def draw(search: Search, to: Path) -> list[Path]:
    """Write the pictures that the search has numbers for; returns their paths."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figures = {
            "trials": _trials(search),
            "history": _history(search),
            "parallel": _parallel(search),
            "importance": _importance(search),
            "frontier": _frontier(search),
        }
        return [
            save_figure(figure, to / f"{name}.png") for name, figure in figures.items() if figure is not None
        ]


def _trials(search: Search) -> "Figure | None":
    present = [(o, curves) for o in search.objectives if (curves := search.curves(o.metric))]
    if not present:
        return None
    figure, axes = make_panels(len(present), height=3.6)
    best = {trial.number for trial in search.best.trials} if search.best else set()
    for ax, (objective, curves) in zip(axes, present, strict=True):
        name = format_metric_name(objective.metric)
        ax.set(title=f"{_capital(name)} of {len(curves)} trials", ylabel=name)
        for curve in curves:
            is_best = curve.record.number in best
            failed = curve.record.status == "failed"
            look = search.look(curve.record)
            colour, alpha = look.colour, 1.0 if is_best else 0.55
            dash = _DASHED if curve.record.control_of is not None else "-"
            width, order = (2.4, 3) if is_best else (1.1, 2)
            ax.plot(
                curve.steps,
                curve.values,
                color=colour,
                linestyle=dash,
                linewidth=width,
                alpha=alpha,
                zorder=order,
            )
            end: dict[str, Any] = (
                {"marker": "x", "color": "black"} if failed else {"marker": look.marker, "color": colour}
            )
            size = 6 if failed or is_best else 3.5
            ax.plot(curve.steps[-1], curve.values[-1], markersize=size, zorder=4 if failed else order, **end)
    _families(axes[0], search, lines=True, dashed=True, also=_ends(search))
    return figure


def _ends(search: Search) -> "list[Line2D]":
    from matplotlib.lines import Line2D

    handles = []
    if any(record.status == "failed" for record in search.records):
        handles.append(Line2D([], [], color="black", linestyle="none", marker="x", label="failed"))
    if search.best is not None:
        told = f"the first of the ranking:\n{format_trials(search.best.trials)}"
        handles.append(Line2D([], [], color=_GREY, linewidth=2.4, label=told))
    return handles


def _history(search: Search) -> "Figure | None":
    present = [(o, ended) for o in search.objectives if (ended := search.history(o))]
    if not present:
        return None
    from matplotlib.lines import Line2D

    figure, axes = make_panels(len(present), height=3.4)
    unit, seconds = time_unit(max(one.seconds for _, ended in present for one in ended))
    for ax, (objective, ended) in zip(axes, present, strict=True):
        name = format_metric_name(objective.metric)
        ax.set(title=f"{_capital(name)} of trials as they ended", ylabel=name)
        times = [one.seconds / seconds for one in ended]
        ax.step(times, [one.best for one in ended], where="post", color="black", linewidth=1.4, zorder=1)
        for time, one in zip(times, ended, strict=True):
            look = search.look(one.record)
            hollow = one.record.control_of is not None
            ax.plot(
                time,
                one.value,
                look.marker,
                color=look.colour,
                markerfacecolor="white" if hollow else look.colour,
                markersize=6,
                zorder=2,
            )
    axes[-1].set_xlabel(f"{unit} since the search began")
    _families(axes[0], search, lines=False, also=[Line2D([], [], color="black", label="best so far")])
    return figure


def _parallel(search: Search) -> "Figure | None":
    axes, count = search.axes(), len(search.tried)
    if not axes:
        return None
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Line

    figure = Figure(figsize=(max(WIDTH, 1.35 * len(axes) + 0.6), 4.4), layout="constrained")
    ax = figure.subplots()
    ax.set_axis_off()
    ax.set(xlim=(-0.15, len(axes) - 0.4), ylim=(-0.06, 1.14))
    ax.set_title(f"{count} points: the darker, the higher in the ranking; bold is the first", pad=10)
    colours = matplotlib.colormaps["viridis_r"]
    for index in reversed(range(count)):
        vertices, codes = _curve([axis.at[index] for axis in axes])
        goodness = 1 - index / (count - 1)
        line = PathPatch(
            Line(vertices, codes),
            facecolor="none",
            edgecolor=colours(0.1 + 0.9 * goodness),
            linewidth=2.6 if index == 0 else 1.1,
            alpha=1.0 if index == 0 else 0.75,
        )
        ax.add_patch(line)
    for x, axis in enumerate(axes):
        _axis(ax, x, axis)
    return figure


def _curve(heights: Sequence[float]) -> tuple[list[tuple[float, float]], list[int]]:
    """A smooth line through the heights at x = 0, 1, ...: level where it crosses an axis."""
    from matplotlib.path import Path as Line

    vertices, codes = [(0.0, heights[0])], [int(Line.MOVETO)]
    for x, (left, right) in enumerate(pairwise(heights)):
        vertices += [(x + 0.5, left), (x + 0.5, right), (x + 1.0, right)]
        codes += [int(Line.CURVE4)] * 3
    return vertices, codes


def _axis(ax: "Axes", x: int, axis: Axis) -> None:
    ax.plot([x, x], [0, 1], color="black", linewidth=0.9, zorder=3)
    for low, high in axis.bands:
        ax.plot([x, x], [low, high], color="black", linewidth=3, solid_capstyle="butt", zorder=3)
    note = f" ({axis.note})" if axis.note else ""
    ax.text(x, 1.05, _plain(axis.name + note), ha="center", va="bottom", fontsize=9, weight="bold")
    for y, label in axis.ticks:
        ax.plot([x - 0.02, x + 0.02], [y, y], color="black", linewidth=0.9, zorder=3)
        background = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
        ax.text(x + 0.04, y, _plain(_cut(label)), va="center", fontsize=8, zorder=4, bbox=background)


def _importance(search: Search) -> "Figure | None":
    weighed = search.importances
    if not weighed:
        return None
    from matplotlib.figure import Figure

    rows = max(len(one.shown_fields) for one in weighed.values())
    figure = Figure(figsize=(WIDTH, (0.32 * rows + 1.2) * len(weighed)), layout="constrained")
    for ax, (metric, one) in zip(
        figure.subplots(len(weighed), 1, squeeze=False)[:, 0], weighed.items(), strict=True
    ):
        names = [_plain(search.names[field]) for field in one.shown_fields]
        shares, errors = [one.shares[f] for f in one.shown_fields], [one.errors[f] for f in one.shown_fields]
        ax.barh(names, shares, xerr=errors, color="#0072B2", height=0.6)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.axvline(0, color=_GREY, linewidth=0.8)
        ax.set(title=f"What {format_metric_name(metric)} depended on", xlabel=one.explanation)
    return figure


def _frontier(search: Search) -> "Figure | None":
    present = search.frontiers()
    kl = search.kl
    if not present or kl is None:
        return None
    figure, axes = make_panels(len(present), height=3.6)
    for ax, (metric, evaluations) in zip(axes, present.items(), strict=True):
        name = format_metric_name(metric)
        ax.set(title=f"{_capital(name)} against divergence; lines: the best of each loss", ylabel=name)
        for look, own in search.by_look(evaluations).items():
            for one in own:
                hollow = one.record.control_of is not None
                ax.plot(
                    one.kl,
                    one.value,
                    look.marker,
                    color=look.colour,
                    markerfacecolor="none" if hollow else look.colour,
                    markersize=4,
                    alpha=0.35,
                )
            x, y = zip(*hull(own), strict=True)
            ax.step(x, y, where="post", color=look.colour, linewidth=1.8)
    axes[-1].set_xlabel(f"{format_metric_name(kl)} (nats per response)")
    _families(axes[0], search, lines=True)
    return figure


def _families(
    ax: "Axes", search: Search, *, lines: bool, dashed: bool = False, also: "Sequence[Line2D]" = ()
) -> None:
    """What the colours and forms mean, beside the picture."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            linestyle="-" if lines else "none",
            color=look.colour,
            marker=look.marker,
            markersize=5,
            label=_plain(look.family),
        )
        for look in dict.fromkeys(search.looks.values())
    ]
    if any(record.control_of is not None for record in search.records):
        style: dict[str, Any] = {"linestyle": _DASHED} if dashed else {"linestyle": "none", **_HOLLOW}
        handles.append(Line2D([], [], color=_GREY, label="control", **style))
    handles += also
    if len(handles) > 1:
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def _cut(label: str, most: int = 20) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _plain(label: str) -> str:
    """A dollar sign would begin a formula."""
    return label.replace("$", r"\$")
