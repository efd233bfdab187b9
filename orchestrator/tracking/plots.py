"""Plots of a run from its `metrics.jsonl` and `dispersion.json`; metrics that are absent are not drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.files import replace_file
from orchestrator.tracking.metrics_file import read_metrics, read_scales

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS_FOLDER = "plots"
"""Name of the subfolder of a run's folder for its plots."""
_TRAINING_COLOUR, _EVAL_COLOUR = "#0072B2", "#D55E00"
COLOURS = (_TRAINING_COLOUR, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", _EVAL_COLOUR, "#000000")
"""The Okabe-Ito colours, which can be distinguished with any colour vision."""
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "savefig.dpi": 150,
}
"""Style of every plot, for `matplotlib.rc_context`."""
WIDTH, _PANEL_HEIGHT = 7.5, 2.7
_LOG_RATIO = "$\\log\\,\\pi - \\log\\,\\pi_\\mathrm{ref}$\n(nats per response)"
_MIN_SMOOTHED_POINTS = 60  # a series of fewer points is drawn without a running mean


@dataclass(frozen=True)
class _Series:
    """The steps at which a metric is finite, and its values there."""

    steps: list[int]
    values: list[float]


def draw_run(run_folder: Path, folder: Path | None = None) -> list[Path]:
    """Draw the metrics in a run's folder, as PNG files in `folder` (default `run_folder/plots`).

    Up to four plots: learning.png (loss, reward margin, accuracy), references.png (log ratios and weights
    per reference), dispersion.png (scales of the training pairs) and optimizer.png (learning rate, gradient
    norm). Returns their paths.
    """
    import matplotlib

    series = _collect_series(read_metrics(run_folder))
    target = folder or run_folder / PLOTS_FOLDER
    with matplotlib.rc_context(STYLE):
        figures = {
            "learning.png": _draw_learning(series),
            "references.png": _draw_references(series),
            "dispersion.png": _draw_dispersion(read_scales(run_folder)),
            "optimizer.png": _draw_optimizer(series),
        }
        return [save_figure(figure, target / name) for name, figure in figures.items() if figure is not None]


def _collect_series(lines: Sequence[Mapping[str, Any]]) -> dict[str, _Series]:
    series: dict[str, _Series] = {}
    for line in lines:
        for key, value in line.items():
            if key not in ("step", "time") and value is not None:
                metric = series.setdefault(key, _Series([], []))
                metric.steps.append(line["step"])
                metric.values.append(value)
    return series


def _draw_learning(series: Mapping[str, _Series]) -> "Figure | None":
    panels = [
        ("loss", "Loss", "mean loss per pair"),
        ("rewards/margins", "Reward margin", "chosen − rejected reward\n(β × nats)"),
        ("accuracy", "Agreement with people", "share of held-out pairs"),
    ]
    present = [panel for panel in panels if panel[0] in series or f"eval/{panel[0]}" in series]
    if not present:
        return None
    figure, axes = make_panels(len(present))
    _label_smoothing(axes[-1], [series[name] for name, _, _ in present if name in series])
    for ax, (name, title, unit) in zip(axes, present, strict=True):
        ax.set(title=title, ylabel=unit)
        if name in series:
            _draw_line(ax, series[name], _TRAINING_COLOUR, "training")
        if f"eval/{name}" in series:
            _draw_evaluations(ax, series[f"eval/{name}"], series.get(f"eval/{name}_interval"))
        if name == "rewards/margins":
            ax.axhline(0, color="#888888", linewidth=0.8)
        if name == "accuracy":
            ax.axhline(0.5, color="#888888", linewidth=0.8, linestyle=":", label="chance")
        _add_legend(ax)
    return figure


def _draw_references(series: Mapping[str, _Series]) -> "Figure | None":
    groups = [
        ("logratio/", "Log ratio to each reference", _LOG_RATIO),
        ("weights/", "Weight of each reference", "mean weight"),
    ]
    present = [group for group in groups if any(key.startswith(group[0]) for key in series)]
    if not present:
        return None
    # A reference has the same colour in all panels, also if it is missing in one.
    names = sorted({key.partition("/")[2] for key in series if key.startswith(("logratio/", "weights/"))})
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    figure, axes = make_panels(len(present))
    _label_smoothing(
        axes[-1], [metric for key, metric in series.items() if key.startswith(("logratio/", "weights/"))]
    )
    for ax, (prefix, title, unit) in zip(axes, present, strict=True):
        ax.set(title=title, ylabel=unit)
        for name, colour in colours.items():
            if prefix + name in series:
                _draw_line(ax, series[prefix + name], colour, name)
        if prefix == "logratio/":
            ax.axhline(0, color="#888888", linewidth=0.8)
        else:
            ax.set_ylim(-0.02, 1.02)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return figure


def _draw_dispersion(scales: Sequence[float]) -> "Figure | None":
    if not scales:
        return None
    figure, (ax,) = make_panels(1, height=3.4)
    ordered = sorted(scales)
    mean = sum(ordered) / len(ordered)
    top = ordered[min(int(0.995 * len(ordered)), len(ordered) - 1)]
    bins = min(50, max(8, len(ordered) // 8))
    ax.hist(ordered, bins=bins, range=(min(0.0, ordered[0]), top or 1.0), color=_TRAINING_COLOUR, alpha=0.75)
    ax.axvline(mean, color=_EVAL_COLOUR, linewidth=1.6, label=f"mean {mean:.2f}")
    beyond = sum(scale > top for scale in ordered)
    ax.set(
        title=f"Dispersion scale of {len(ordered):,} training pairs",
        xlabel=f"scale of a pair's margin{f' ({beyond:,} above {top:.2f} not shown)' if beyond else ''}",
        ylabel="pairs",
    )
    ax.grid(axis="x", visible=False)
    ax.legend()
    return figure


def _draw_optimizer(series: Mapping[str, _Series]) -> "Figure | None":
    panels = [
        ("learning_rate", "Learning rate", "step size"),
        ("grad_norm", "Gradient norm", "before clipping"),
    ]
    present = [panel for panel in panels if panel[0] in series]
    if not present:
        return None
    figure, axes = make_panels(len(present), height=2.3)
    _label_smoothing(axes[-1], [series["grad_norm"]] if "grad_norm" in series else [])
    for ax, (name, title, unit) in zip(axes, present, strict=True):
        ax.set(title=title, ylabel=unit)
        if name == "learning_rate":
            ax.plot(series[name].steps, series[name].values, color=_TRAINING_COLOUR, linewidth=1.6)
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        else:
            _draw_line(ax, series[name], _TRAINING_COLOUR, "")
        ax.set_ylim(bottom=0)
    return figure


def make_panels(count: int, height: float = _PANEL_HEIGHT) -> "tuple[Figure, list[Axes]]":
    """Return a figure and its `count` panels, stacked with a shared axis of optimizer steps."""
    # matplotlib.figure and not pyplot: it needs no display and has no global list of open figures.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, height * count + 0.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


def _draw_line(ax: "Axes", series: _Series, colour: str, label: str) -> None:
    """Draw every step; if there are many, as a thin line with their running mean on top."""
    if len(series.steps) < _MIN_SMOOTHED_POINTS:
        marker = "o" if len(series.steps) == 1 else None
        ax.plot(series.steps, series.values, color=colour, linewidth=1.6, label=label, marker=marker)
        return
    window = _choose_window(series)
    ax.plot(series.steps, series.values, color=colour, linewidth=0.7, alpha=0.3)
    smooth = _compute_running_mean(series.values, window)
    ax.plot(series.steps[window - 1 :], smooth, color=colour, linewidth=1.8, label=label)


def _draw_evaluations(ax: "Axes", series: _Series, interval: _Series | None) -> None:
    style: dict[str, Any] = {"color": _EVAL_COLOUR, "marker": "o", "markersize": 4, "linewidth": 1.2}
    if interval is None or interval.steps != series.steps:
        ax.plot(series.steps, series.values, label="held out", **style)
    else:
        label = "held out, with 95 % interval"
        ax.errorbar(series.steps, series.values, yerr=interval.values, capsize=2.5, label=label, **style)


def _compute_running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and the `window - 1` values before it, from value number `window` on."""
    means, total = [], sum(values[: window - 1])
    for i in range(window - 1, len(values)):
        total += values[i]
        means.append(total / window)
        total -= values[i - window + 1]
    return means


def _choose_window(series: _Series) -> int:
    return max(len(series.steps) // 30, 5)


def _label_smoothing(ax: "Axes", drawn: Sequence[_Series]) -> None:
    """Explain thin and bold lines in the axis label, if any of the series is drawn with both."""
    longest = max(drawn, key=lambda series: len(series.steps), default=None)
    if longest is not None and len(longest.steps) >= _MIN_SMOOTHED_POINTS:
        ax.set_xlabel(f"optimizer step (thin: each step; bold: mean of {_choose_window(longest)} steps)")


def _add_legend(ax: "Axes") -> None:
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="best", fontsize=9)


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure as PNG in one move; returns its path."""
    with replace_file(path) as part:
        figure.savefig(part, format="png")
    return path
