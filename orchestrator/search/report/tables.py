"""Tables of a search: ranking, differences to controls, failures, and the live view."""

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


_BEST = "bold"


_CONTROL = "dim"


_TOLD = ("steps", "status")  # below the table where they are the same for all


_POINT = 20  # characters; less cannot be read


def build_summary(
    records: Sequence[TrialRecord],
    objectives: "Sequence[Objective]",
    *,
    primary: str | None = None,
    control: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None,
    width: int = WIDTH,
    rows: int | None = None,
) -> Group:
    """All that is said at a search's end: ranking, differences to controls, failures."""
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
    """The ranking, best first; at most `rows` of it.

    Every field that varies has a column of its own if all fit in `width` characters, else they share one.
    `primary` names the reference whose KL is shown if it was measured.
    """
    wide = _build_table(ranked, objectives, primary, rows, apart=True)
    console = Console(width=10_000)
    if console.measure(wide).maximum <= width:
        return wide
    return _build_table(ranked, objectives, primary, rows, apart=False)


def _build_table(
    ranked: Sequence[RankedPoint],
    objectives: "Sequence[Objective]",
    primary: str | None,
    rows: int | None,
    *,
    apart: bool,
) -> Table:
    metrics = _list_metrics(ranked, objectives, primary)
    names = shorten_field_names(list_shown_fields(trial for one in ranked for trial in one.trials))
    columns = {
        "rank": [_format_rank(one) for one in ranked],
        "trials": [format_trial_numbers(one.trials) for one in ranked],
    }
    if apart:
        if any(one.control_of is not None for one in ranked):
            columns["control of"] = [str(one.control_of or "") for one in ranked]
        columns |= {name: [_format_field(one, field) for one in ranked] for field, name in names.items()}
    else:
        columns["point"] = [_describe_ranked(one, names) for one in ranked]
    estimates = {metric: [one.estimates.get(metric) for one in ranked] for metric in metrics}
    columns |= {format_metric_name(metric): _format_estimates(column) for metric, column in estimates.items()}
    columns |= {
        "steps": [_format_steps(one) for one in ranked],
        "status": [_format_status(one) for one in ranked],
    }
    same = {name: cells[0] for name, cells in columns.items() if name in _TOLD and len(set(cells)) == 1}
    made = _new_table("Result of the search", _build_footnotes(ranked, rows, same))
    right = {"rank", "control of", "steps", *map(format_metric_name, metrics)}
    kept = {name: cells for name, cells in columns.items() if name not in same}
    for name in kept:
        justify: Literal["left", "right"] = "right" if name in right else "left"
        made.add_column(
            Text(name),
            justify=justify,
            no_wrap=apart or name in right,
            min_width=_POINT if name == "point" else None,
        )
    for row, one in enumerate(ranked[:rows]):
        style = _CONTROL if one.control_of is not None else _BEST if one.rank == 1 or one.front else ""
        made.add_row(*(Text(cells[row]) for cells in kept.values()), style=style)  # Text: "[a]" is no markup
    return made


def build_difference_table(compared: Sequence[Difference], objectives: "Sequence[Objective]") -> Table:
    """Points less their controls; below it how the intervals came about."""
    names = shorten_field_names(find_varied_fields(_select_loss_fields(one.point) for one in compared))
    paired = "over the seeds that both have" if all(one.paired for one in compared) else None
    note = paired or "over the seeds that both have; of one seed, from both intervals over held-out pairs"
    made = _new_table("Point less its control: DPO of matched beta", f"± is a 95 % interval {note}")
    made.add_column("trials")
    made.add_column("control")
    made.add_column("point", overflow="fold")
    for objective in objectives:
        made.add_column(Text(format_metric_name(objective.metric)), justify="right", no_wrap=True)
    columns = [
        _format_estimates([one.estimates[o.metric] for one in compared], signed=True) for o in objectives
    ]
    for row, one in enumerate(compared):
        told = [format_trial_numbers(one.point.trials), format_trial_numbers(one.control.trials)]
        told.append(describe_point(one.point.point, names) or ABSENT)
        made.add_row(*map(Text, told), *(Text(column[row]) for column in columns))
    return made


def build_failure_table(failed: Sequence[TrialRecord]) -> Table:
    """Trials that failed, each with its reason."""
    made = _new_table("Failed trials")
    made.add_column("trial", justify="right")
    made.add_column("reason", overflow="fold")
    for record in failed:
        made.add_row(str(record.number), Text(record.reason or "no reason was recorded"))
    return made


def build_live_table(
    records: Sequence[TrialRecord],
    objectives: "Sequence[Objective]",
    *,
    max_steps: int | None = None,
    rows: int = 20,
) -> Table:
    """A search as it stands: what runs first, then the best of what ended; at most `rows` trials.

    `max_steps` is how far a trial goes when nothing stops it.
    """
    first = objectives[0]

    def order(record: TrialRecord) -> tuple[int, float]:
        value = record.result.get(first.metric, -math.inf if first.mode == "max" else math.inf)
        place = {"running": 0, "finished": 1, "stopped": 1, "failed": 2, "pending": 3}[record.status]
        return place, (record.number if place != 1 else -value if first.mode == "max" else value)

    shown = sorted(records, key=order)[:rows]
    names = shorten_field_names(list_shown_fields(records))
    made = _new_table(None, _format_counts(records))
    made.add_column("trial", justify="right", no_wrap=True)
    made.add_column("status", no_wrap=True)
    made.add_column("step", justify="right", no_wrap=True)
    for objective in objectives:
        made.add_column(Text(format_metric_name(objective.metric)), justify="right", no_wrap=True)
    made.add_column("point")
    for record in shown:
        step = f"{record.step}/{max_steps}" if max_steps else str(record.step)
        values = [record.result.get(o.metric) for o in objectives]
        told = [record.name.lstrip("0"), record.status, step]
        told += [ABSENT if value is None else f"{value:.4g}" for value in values]
        about = f"control of {record.control_of}: " if record.control_of is not None else ""
        about += describe_point(record.point, names)
        # A line each: the table is drawn over and over.
        made.add_row(*map(Text, told), Text(about, no_wrap=True, overflow="ellipsis"))
    return made


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
    """Objectives, and beside them accuracy and KL where they were measured."""
    kl = find_kl_metric((trial for one in ranked for trial in one.trials), primary)
    also = [ACCURACY] if any(ACCURACY in one.estimates for one in ranked) else []
    return list(dict.fromkeys([*(o.metric for o in objectives), *also, *([kl] if kl else [])]))


def _format_estimates(estimates: Sequence[Estimate | None], *, signed: bool = False) -> list[str]:
    """Three digits of the column's largest number, and as many decimals in all its cells."""
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
    """Of the trials that count."""
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
