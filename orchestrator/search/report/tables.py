"""Tables of a search: ranking, differences from controls, failures, and the live view."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from orchestrator.search.journal import TrialRecord
from orchestrator.search.report.labels import (
    ABSENT,
    describe_point,
    find_kl_metric,
    find_varied_fields,
    flatten_point,
    format_metric_name,
    format_trial_numbers,
    format_value,
    list_shown_fields,
    shorten_field_names,
)
from orchestrator.search.report.ranking import (
    ACCURACY,
    Difference,
    Estimate,
    RankedPoint,
    compare_with_controls,
    rank_points,
)

if TYPE_CHECKING:
    from orchestrator.config.sweep import Objective

WIDTH = 80
_BEST, _CONTROL = "bold", "dim"
_SHARED = ("steps", "status")  # columns that become a note below the table if all their cells are the same
_MIN_POINT_WIDTH = 20  # characters


def build_summary(
    records: Sequence[TrialRecord],
    objectives: "Sequence[Objective]",
    *,
    primary: str | None = None,
    control: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None,
    width: int = WIDTH,
    rows: int | None = None,
) -> Group:
    """Build the tables for a search's end: ranking, differences from controls, failures."""
    ranked = rank_points(records, objectives)
    parts: list[Table | Text] = [
        build_ranking_table(ranked, objectives, primary=primary, width=width, rows=rows)
    ]
    compared = compare_with_controls(ranked, objectives, control)
    if compared:
        parts += [Text(), build_difference_table(compared[:rows], objectives)]
    failed = [record for record in records if record.status == "failed"]
    if failed:
        parts += [Text(), build_failure_table(failed)]
    return Group(*parts)


def build_ranking_table(
    ranked: Sequence[RankedPoint],
    objectives: "Sequence[Objective]",
    *,
    primary: str | None = None,
    width: int = WIDTH,
    rows: int | None = None,
) -> Table:
    """Build the table of the ranking, best first, of at most `rows` rows.

    Every field that varies has its own column if all fit in `width` characters, else they share one.
    `primary` names the reference whose KL is shown if it was measured.
    """
    wide = _build_table(ranked, objectives, primary, rows, one_column=False)
    console = Console(width=10_000)
    if console.measure(wide).maximum <= width:
        return wide
    return _build_table(ranked, objectives, primary, rows, one_column=True)


def _build_table(
    ranked: Sequence[RankedPoint],
    objectives: "Sequence[Objective]",
    primary: str | None,
    rows: int | None,
    *,
    one_column: bool,
) -> Table:
    metrics = _list_metrics(ranked, objectives, primary)
    columns = _build_columns(ranked, metrics, one_column=one_column)
    same = {name: cells[0] for name, cells in columns.items() if name in _SHARED and len(set(cells)) == 1}
    table = _new_table("Result of the search", _build_footnotes(ranked, rows, same))
    right = {"rank", "control of", "steps", *map(format_metric_name, metrics)}
    shown = {name: cells for name, cells in columns.items() if name not in same}
    for name in shown:
        justify: Literal["left", "right"] = "right" if name in right else "left"
        table.add_column(
            Text(name),
            justify=justify,
            no_wrap=not one_column or name in right,
            min_width=_MIN_POINT_WIDTH if name == "point" else None,
        )
    for row, one in enumerate(ranked[:rows]):
        style = _CONTROL if one.control_of is not None else _BEST if one.rank == 1 or one.front else ""
        # Text, since "[a]" in a plain string would be markup.
        table.add_row(*(Text(cells[row]) for cells in shown.values()), style=style)
    return table


def _build_columns(
    ranked: Sequence[RankedPoint], metrics: Sequence[str], *, one_column: bool
) -> dict[str, list[str]]:
    """Build the ranking's columns by heading, with the fields that vary in one column or in one each."""
    names = shorten_field_names(list_shown_fields(trial for one in ranked for trial in one.trials))
    columns = {
        "rank": [_format_rank(one) for one in ranked],
        "trials": [format_trial_numbers(one.trials) for one in ranked],
    }
    if one_column:
        columns["point"] = [_describe_ranked(one, names) for one in ranked]
    else:
        if any(one.control_of is not None for one in ranked):
            columns["control of"] = [str(one.control_of or "") for one in ranked]
        columns |= {name: [_format_field(one, field) for one in ranked] for field, name in names.items()}
    estimates = {metric: [one.estimates.get(metric) for one in ranked] for metric in metrics}
    columns |= {format_metric_name(metric): _format_estimates(column) for metric, column in estimates.items()}
    return columns | {
        "steps": [_format_steps(one) for one in ranked],
        "status": [_format_status(one) for one in ranked],
    }


def build_difference_table(compared: Sequence[Difference], objectives: "Sequence[Objective]") -> Table:
    """Build the table of points minus their controls; a note says how the intervals are computed."""
    names = shorten_field_names(find_varied_fields(_select_loss_fields(one.point) for one in compared))
    paired = "over the seeds that both have" if all(one.paired for one in compared) else None
    note = paired or "over the seeds that both have; of one seed, from both intervals over held-out pairs"
    table = _new_table("Point less its control: DPO of matched beta", f"± is a 95 % interval {note}")
    table.add_column("trials")
    table.add_column("control")
    table.add_column("point", overflow="fold")
    for objective in objectives:
        table.add_column(Text(format_metric_name(objective.metric)), justify="right", no_wrap=True)
    columns = [
        _format_estimates([one.estimates[o.metric] for one in compared], signed=True) for o in objectives
    ]
    for row, one in enumerate(compared):
        cells = [format_trial_numbers(one.point.trials), format_trial_numbers(one.control.trials)]
        cells.append(describe_point(one.point.point, names) or ABSENT)
        table.add_row(*map(Text, cells), *(Text(column[row]) for column in columns))
    return table


def build_failure_table(failed: Sequence[TrialRecord]) -> Table:
    """Build the table of failed trials with their reasons."""
    table = _new_table("Failed trials")
    table.add_column("trial", justify="right")
    table.add_column("reason", overflow="fold")
    for record in failed:
        table.add_row(str(record.number), Text(record.reason or "no reason was recorded"))
    return table


def build_live_table(
    records: Sequence[TrialRecord],
    objectives: "Sequence[Objective]",
    *,
    max_steps: int | None = None,
    rows: int = 20,
) -> Table:
    """Build the live table: running trials first, then the best of those that ended; at most `rows` trials.

    `max_steps` is the step at which a trial ends if nothing stops it earlier.
    """
    first = objectives[0]

    def order(record: TrialRecord) -> tuple[int, float]:
        value = record.result.get(first.metric, -math.inf if first.mode == "max" else math.inf)
        place = {"running": 0, "finished": 1, "stopped": 1, "failed": 2, "pending": 3}[record.status]
        return place, (record.number if place != 1 else -value if first.mode == "max" else value)

    shown = sorted(records, key=order)[:rows]
    names = shorten_field_names(list_shown_fields(records))
    table = _new_table(None, _format_counts(records))
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    for objective in objectives:
        table.add_column(Text(format_metric_name(objective.metric)), justify="right", no_wrap=True)
    table.add_column("point")
    for record in shown:
        step = f"{record.step}/{max_steps}" if max_steps else str(record.step)
        values = [record.result.get(o.metric) for o in objectives]
        cells = [record.name.lstrip("0"), record.status, step]
        cells += [ABSENT if value is None else f"{value:.4g}" for value in values]
        about = f"control of {record.control_of}: " if record.control_of is not None else ""
        about += describe_point(record.point, names)
        # One line per trial: the table is redrawn all the time.
        table.add_row(*map(Text, cells), Text(about, no_wrap=True, overflow="ellipsis"))
    return table


def _new_table(title: str | None, caption: str | None = None) -> Table:
    return Table(
        box=None,
        padding=(0, 2, 0, 0),
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
    )


def _list_metrics(
    ranked: Sequence[RankedPoint], objectives: "Sequence[Objective]", primary: str | None
) -> list[str]:
    """Return the objectives, and accuracy and KL where they were measured."""
    kl = find_kl_metric((trial for one in ranked for trial in one.trials), primary)
    also = [ACCURACY] if any(ACCURACY in one.estimates for one in ranked) else []
    return list(dict.fromkeys([*(o.metric for o in objectives), *also, *([kl] if kl else [])]))


def _format_estimates(estimates: Sequence[Estimate | None], *, signed: bool = False) -> list[str]:
    """Format a column: three digits of its largest number, and as many decimals in all cells."""
    largest = max((abs(one.mean) for one in estimates if one is not None), default=0.0)
    decimals = min(max(2 - math.floor(math.log10(largest)), 0), 6) if largest else 3
    sign = "+" if signed else ""
    cells = []
    for one in estimates:
        cell = ABSENT if one is None else f"{one.mean:{sign}.{decimals}f}"
        if one is not None and one.half_width is not None:
            cell += f" ± {one.half_width:.{decimals}f}"
        cells.append(cell)
    return cells


def _format_rank(one: RankedPoint) -> str:
    return ABSENT if one.rank is None else f"{one.rank}{'*' if one.front else ''}"


def _format_field(one: RankedPoint, name: str) -> str:
    return format_value(flatten_point(one.point).get(name, ABSENT))


def _select_loss_fields(one: RankedPoint) -> dict[str, Any]:
    return {field: value for field, value in flatten_point(one.point).items() if field.startswith("loss.")}


def _describe_ranked(one: RankedPoint, names: Mapping[str, str]) -> str:
    about = "" if one.control_of is None else f"control of {one.control_of}: "
    return about + describe_point(one.point, names)


def _format_steps(one: RankedPoint) -> str:
    """Format the steps of the trials that count: of a ranked point, those that did not fail."""
    steps = [trial.step for trial in one.trials if one.rank is None or trial.status != "failed"]
    return str(min(steps)) if min(steps) == max(steps) else f"{min(steps)}–{max(steps)}"


def _format_status(one: RankedPoint) -> str:
    counts = Counter(trial.status for trial in one.trials)
    if len(counts) == 1:
        return one.trials[0].status
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _format_counts(records: Sequence[TrialRecord]) -> str:
    counts: Counter[str] = Counter(record.status for record in records)
    order = ("running", "finished", "stopped", "failed", "pending")
    return ", ".join(f"{counts[status]} {status}" for status in order if counts[status])


def _build_footnotes(ranked: Sequence[RankedPoint], rows: int | None, same: Mapping[str, str]) -> str:
    notes = []
    if "status" in same:
        steps = f" at step {same['steps']}" if "steps" in same else ""
        notes.append(f"All {same['status']}{steps}.")
    elif "steps" in same:
        notes.append(f"All at step {same['steps']}.")
    if rows is not None and len(ranked) > rows:
        notes.append(f"{len(ranked) - rows} more are not shown.")
    if any(one.front for one in ranked):
        notes.append("* no other is better in all objectives.")
    repeated = any(estimate.count > 1 for one in ranked for estimate in one.estimates.values())
    if repeated:
        notes.append("± is a 95 % interval of the mean over seeds.")
    elif any(e.half_width is not None for one in ranked for e in one.estimates.values()):
        notes.append("± is a 95 % interval over held-out pairs, of one seed.")
    return " ".join(notes)
