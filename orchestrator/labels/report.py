"""The report on labels: printed, as JSON, and as a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from orchestrator.files import replace_file, replace_text
from orchestrator.labels.statistics import LABEL_BINS, HumanStatistics, Interval, LabelStatistics
from orchestrator.labels.verdicts import Verdicts
from orchestrator.tracking.plots import COLOURS, STYLE, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR_WIDTH = 30
TABLE_WIDTH = 140
"""Columns that a table with intervals may take."""
MANY_FLIPS = 0.5
"""Above this share of verdicts that flip with the order, a judge is called of little use."""
_HEIGHT = 3.4
_MANY_POINTS = 500


def print_report(statistics: LabelStatistics, console: Console) -> None:
    """Print the spread of the labels, and how they agree with other judges and people."""
    console.print(f"{statistics.pairs:,} labels, the probability that chosen is better", style="bold")
    console.print(_build_histogram(statistics.histogram["label"]))
    console.print(f"{statistics.source_order:.1%} prefer the source's chosen")
    for name, order in statistics.orders.items():
        console.print(
            f"{name}: the response shown first is better with mean probability {order.mean_first:.3f}; the "
            f"verdict flips with the order for {order.flips:.1%} of the pairs"
        )
        if order.flips > MANY_FLIPS:
            console.print(
                f"{name}: the order decides more often than the responses do, so its labels say little; use "
                "another judge or --template"
            )
    for names, (same, correlation) in statistics.agreement.items():
        console.print(
            f"{names}: the same verdict on {same:.1%} of the pairs, Spearman {_format(correlation)}"
        )
    if statistics.human:
        _print_wide(_build_human_table(statistics.human), console)
        console.print(_build_reliability_table(statistics.human["label"]))


def _print_wide(table: Table, console: Console) -> None:
    """Print a table whose cells are not broken into lines, even where the console is narrower."""
    Console(file=console.file, width=max(console.width, TABLE_WIDTH), highlight=False).print(table)


def _format(interval: Interval | None) -> str:
    return "-" if interval is None else str(interval)


def _build_histogram(counts: Sequence[int]) -> Table:
    table = Table("label", "pairs", "", box=None, padding=(0, 2, 0, 2))
    for low, high, count in zip(LABEL_BINS[:-1], LABEL_BINS[1:], counts, strict=True):
        table.add_row(
            f"{low:.1f} to {high:.1f}", f"{count:,}", "█" * round(BAR_WIDTH * count / max(1, *counts))
        )
    return table


def _build_human_table(human: Mapping[str, HumanStatistics]) -> Table:
    table = Table(
        "against people", "same majority", "calibration error", "Spearman", box=None, padding=(0, 2, 0, 2)
    )
    for name, one in human.items():
        table.add_row(name, str(one.accuracy), f"{one.calibration_error:.3f}", _format(one.correlation))
    return table


def _build_reliability_table(human: HumanStatistics) -> Table:
    table = Table("confidence", "people who agree", "pairs", box=None, padding=(0, 2, 0, 2))
    for one in human.reliability:
        table.add_row(f"{one.confidence:.3f}", f"{one.agreement:.3f}", f"{one.pairs:,}")
    return table


def write_report(path: Path, statistics: LabelStatistics) -> None:
    """Write the statistics as JSON; what does not exist is null."""
    replace_text(path, json.dumps(_replace_nan(asdict(statistics)), indent=1) + "\n")


def _replace_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _replace_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nan(inner) for inner in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def draw_report(path: Path, statistics: LabelStatistics, verdicts: Mapping[str, Verdicts]) -> None:
    """Draw the labels' histogram, and where they exist verdicts in both orders and the reliability."""
    import matplotlib
    from matplotlib.figure import Figure

    ordered = {name: verdict for name, verdict in verdicts.items() if verdict.chosen_first is not None}
    panels = 1 + bool(ordered) + bool(statistics.human)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH if panels == 1 else 4.2 * panels, _HEIGHT), layout="constrained")
        axes = iter(figure.subplots(1, panels, squeeze=False)[0])
        _draw_histogram(next(axes), statistics)
        if ordered:
            _draw_orders(next(axes), ordered)
        if statistics.human:
            _draw_reliability(next(axes), statistics.human)
        with replace_file(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_histogram(axes: "Axes", statistics: LabelStatistics) -> None:
    axes.set_title("Labels")
    for number, (name, counts) in enumerate(statistics.histogram.items()):
        colour = COLOURS[number % len(COLOURS)]
        fill = name == "label"
        axes.stairs(counts, LABEL_BINS, color=colour, fill=fill, alpha=0.4 if fill else 1, label=name)
    axes.set(xlabel="P(chosen is better)", ylabel="pairs", xlim=(0, 1))
    if len(statistics.histogram) > 1:
        axes.legend()


def _draw_orders(axes: "Axes", verdicts: Mapping[str, Verdicts]) -> None:
    axes.set_title("Both orders")
    for number, (name, verdict) in enumerate(verdicts.items()):
        first, second = verdict.chosen_first, verdict.chosen_second
        assert first is not None
        assert second is not None
        size = 10 if len(first) <= _MANY_POINTS else 3
        axes.scatter(
            first, second, s=size, alpha=0.5, linewidths=0, color=COLOURS[number % len(COLOURS)], label=name
        )
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle=":")
    axes.set(xlabel="P(chosen), shown first", ylabel="P(chosen), shown second", xlim=(0, 1), ylim=(0, 1))
    axes.legend()


def _draw_reliability(axes: "Axes", human: Mapping[str, HumanStatistics]) -> None:
    axes.set_title("Agreement with people")
    for number, (name, one) in enumerate(human.items()):
        bins = one.reliability
        axes.plot(
            [each.confidence for each in bins],
            [each.agreement for each in bins],
            marker="o",
            color=COLOURS[number % len(COLOURS)],
            label=name,
        )
    axes.plot([0.5, 1], [0.5, 1], color="0.5", linewidth=1, linestyle=":")
    axes.set(xlabel="confidence", ylabel="share of people who agree", xlim=(0.5, 1), ylim=(0, 1))
    if len(human) > 1:
        axes.legend()
