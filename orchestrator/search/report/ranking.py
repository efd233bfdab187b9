"""A search's results for a person: ranked with confidence, compared with controls, failures with reasons."""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from orchestrator.search.journal import TrialRecord
from orchestrator.search.report import labels as points

if TYPE_CHECKING:
    from orchestrator.config.sweep import Objective

ACCURACY = "eval/accuracy"
WIDTH = 80
_BEST = "bold"
_CONTROL = "dim"
_TOLD = ("steps", "status")  # below the table where they are the same for all
_POINT = 20  # characters; less cannot be read
ABSENT = points.ABSENT


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` trials with the half-width of its 95 % interval, where one can be given."""

    mean: float
    half_width: float | None
    count: int


@dataclass(frozen=True)
class Ranked:
    """One point, or one control, with all its repeats.

    Attributes:
        rank: from 1; None where no repeat gave every objective.
        trials: its repeats.
        estimates: by metric; those that at least one repeat gave.
        front: with several objectives, whether no other point is better in all of them.
    """

    rank: int | None
    trials: tuple[TrialRecord, ...]
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    front: bool = False

    @property
    def point(self) -> Mapping[str, Any]:
        """The fields it drew."""
        return self.trials[0].point

    @property
    def point_id(self) -> int:
        """The number of its first trial."""
        return self.trials[0].point_id

    @property
    def control_of(self) -> int | None:
        """The point whose control it is."""
        return self.trials[0].control_of


@dataclass(frozen=True)
class Difference:
    """A point less its control, by objective; `paired` when the interval is over seeds that both have."""

    point: Ranked
    control: Ranked
    estimates: Mapping[str, Estimate]
    paired: bool


# ---------------------------------------------------------------- ranking


def rank(records: Sequence[TrialRecord], objectives: "Sequence[Objective]") -> list[Ranked]:
    """Points and controls, best first by the mean of the first objective over the repeats that gave one.

    The interval of a mean is Student's t over the repeats; the one trial of a point has its own interval of
    `eval/accuracy` over the held-out pairs, and none for other metrics. With several objectives those that
    no other is better than in all come first. Points without a result come last, without a rank.
    """
    grouped: dict[int, list[TrialRecord]] = {}
    for record in sorted(records, key=lambda record: record.number):
        grouped.setdefault(record.point_id, []).append(record)
    candidates = [Ranked(None, tuple(trials), _estimates(trials)) for trials in grouped.values()]
    complete = [one for one in candidates if all(o.metric in one.estimates for o in objectives)]
    scores = {one.point_id: _scores(one, objectives) for one in complete}
    front = {key for key, own in scores.items() if not any(_dominates(o, own) for o in scores.values())}
    several = len(objectives) > 1
    ordered = sorted(
        complete, key=lambda one: (several and one.point_id not in front, -scores[one.point_id][0])
    )
    ranked = [
        Ranked(place, one.trials, one.estimates, several and one.point_id in front)
        for place, one in enumerate(ordered, start=1)
    ]
    return ranked + [one for one in candidates if one.point_id not in scores]


def differences(
    ranked: Sequence[Ranked],
    objectives: "Sequence[Objective]",
    control: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None,
) -> list[Difference]:
    """What each point has gained over its control, in the order of the ranking.

    `control` gives the fields of a point's control, so that one control can serve many points; without it
    a control serves the point that it was entered for.
    """
    found = []
    for one in ranked:
        own = None if one.control_of is not None else _control_of(one, ranked, control)
        if own is not None and one.rank is not None and own.rank is not None:
            estimates = {o.metric: _difference(one, own, o.metric) for o in objectives}
            paired = all(estimate.count > 1 for estimate in estimates.values())
            found.append(Difference(one, own, estimates, paired))
    return found


def _control_of(
    one: Ranked,
    ranked: Sequence[Ranked],
    control: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None,
) -> Ranked | None:
    if control is None:
        return next((other for other in ranked if other.control_of == one.point_id), None)
    fields = control(one.point)
    if fields is None:
        return None
    return next((o for o in ranked if o.control_of is not None and o.point == fields), None)


def _difference(one: Ranked, control: Ranked, metric: str) -> Estimate:
    """Over the seeds that both have; with fewer than two of them, of the means.

    The latter's interval adds both in squares: too wide where the same held-out pairs are easy for both,
    never too narrow.
    """
    ours, theirs = _by_repeat(one, metric), _by_repeat(control, metric)
    common = sorted(ours.keys() & theirs.keys())
    if len(common) > 1:
        return _mean([ours[repeat] - theirs[repeat] for repeat in common])
    left, right = one.estimates[metric], control.estimates[metric]
    known = left.half_width is not None and right.half_width is not None
    half = math.hypot(left.half_width or 0, right.half_width or 0) if known else None
    return Estimate(left.mean - right.mean, half, 1)


def _by_repeat(one: Ranked, metric: str) -> dict[int, float]:
    values = ((trial.repeat, points.result(trial, metric)) for trial in one.trials)
    return {repeat: value for repeat, value in values if value is not None}


def _estimates(trials: Sequence[TrialRecord]) -> dict[str, Estimate]:
    found = {}
    for metric in dict.fromkeys(metric for trial in trials for metric in trial.result):
        values = [value for trial in trials if (value := points.result(trial, metric)) is not None]
        if values:
            found[metric] = _mean(values)
    alone = found.get(ACCURACY)
    if alone is not None and alone.count == 1:
        own = next(t for t in trials if points.result(t, ACCURACY) is not None).result
        found[ACCURACY] = Estimate(alone.mean, own.get(f"{ACCURACY}_interval"), 1)
    return found


def _mean(values: Sequence[float]) -> Estimate:
    from scipy.special import stdtrit  # slow to import, and only the end of a search needs it

    count = len(values)
    if count == 1:
        return Estimate(values[0], None, 1)
    half = float(stdtrit(count - 1, 0.975)) * stdev(values) / math.sqrt(count)
    return Estimate(fmean(values), half, count)


def _scores(one: Ranked, objectives: "Sequence[Objective]") -> tuple[float, ...]:
    """Means, turned so that more is better."""
    return tuple(one.estimates[o.metric].mean * (1 if o.mode == "max" else -1) for o in objectives)


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- tables


def summary(
    records: Sequence[TrialRecord],
    objectives: "Sequence[Objective]",
    *,
    primary: str | None = None,
    control: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None,
    width: int = WIDTH,
    rows: int | None = None,
) -> Group:
    """All that is said at a search's end: ranking, differences to controls, failures."""
    ranked = rank(records, objectives)
    parts: list[Table | Text] = [table(ranked, objectives, primary=primary, width=width, rows=rows)]
    compared = differences(ranked, objectives, control)
    if compared:
        parts += [Text(), difference_table(compared[:rows], objectives)]
    failed = [record for record in records if record.status == "failed"]
    if failed:
        parts += [Text(), failure_table(failed)]
    return Group(*parts)


def table(
    ranked: Sequence[Ranked],
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
    wide = _table(ranked, objectives, primary, rows, apart=True)
    console = Console(width=10_000)
    if console.measure(wide).maximum <= width:
        return wide
    return _table(ranked, objectives, primary, rows, apart=False)


def _table(
    ranked: Sequence[Ranked],
    objectives: "Sequence[Objective]",
    primary: str | None,
    rows: int | None,
    *,
    apart: bool,
) -> Table:
    metrics = _metrics(ranked, objectives, primary)
    names = points.short_names(points.shown_fields(trial for one in ranked for trial in one.trials))
    columns = {
        "rank": [_rank(one) for one in ranked],
        "trials": [points.numbers(one.trials) for one in ranked],
    }
    if apart:
        if any(one.control_of is not None for one in ranked):
            columns["control of"] = [str(one.control_of or "") for one in ranked]
        columns |= {name: [_field(one, field) for one in ranked] for field, name in names.items()}
    else:
        columns["point"] = [_about(one, names) for one in ranked]
    estimates = {metric: [one.estimates.get(metric) for one in ranked] for metric in metrics}
    columns |= {points.metric_name(metric): _cells(column) for metric, column in estimates.items()}
    columns |= {"steps": [_steps(one) for one in ranked], "status": [_status(one) for one in ranked]}
    same = {name: cells[0] for name, cells in columns.items() if name in _TOLD and len(set(cells)) == 1}
    made = _empty("Result of the search", _footnotes(ranked, rows, same))
    right = {"rank", "control of", "steps", *map(points.metric_name, metrics)}
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


def difference_table(compared: Sequence[Difference], objectives: "Sequence[Objective]") -> Table:
    """Points less their controls; below it how the intervals came about."""
    names = points.short_names(points.varied(_loss_fields(one.point) for one in compared))
    paired = "over the seeds that both have" if all(one.paired for one in compared) else None
    note = paired or "over the seeds that both have; of one seed, from both intervals over held-out pairs"
    made = _empty("Point less its control: DPO of matched beta", f"± is a 95 % interval {note}")
    made.add_column("trials")
    made.add_column("control")
    made.add_column("point", overflow="fold")
    for objective in objectives:
        made.add_column(Text(points.metric_name(objective.metric)), justify="right", no_wrap=True)
    columns = [_cells([one.estimates[o.metric] for one in compared], signed=True) for o in objectives]
    for row, one in enumerate(compared):
        told = [points.numbers(one.point.trials), points.numbers(one.control.trials)]
        told.append(points.described(one.point.point, names) or ABSENT)
        made.add_row(*map(Text, told), *(Text(column[row]) for column in columns))
    return made


def failure_table(failed: Sequence[TrialRecord]) -> Table:
    """Trials that failed, each with its reason."""
    made = _empty("Failed trials")
    made.add_column("trial", justify="right")
    made.add_column("reason", overflow="fold")
    for record in failed:
        made.add_row(str(record.number), Text(record.reason or "no reason was recorded"))
    return made


def live_table(
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
    names = points.short_names(points.shown_fields(records))
    made = _empty(None, _counts(records))
    made.add_column("trial", justify="right", no_wrap=True)
    made.add_column("status", no_wrap=True)
    made.add_column("step", justify="right", no_wrap=True)
    for objective in objectives:
        made.add_column(Text(points.metric_name(objective.metric)), justify="right", no_wrap=True)
    made.add_column("point")
    for record in shown:
        step = f"{record.step}/{max_steps}" if max_steps else str(record.step)
        values = [record.result.get(o.metric) for o in objectives]
        told = [record.name.lstrip("0"), record.status, step]
        told += [ABSENT if value is None else f"{value:.4g}" for value in values]
        about = f"control of {record.control_of}: " if record.control_of is not None else ""
        about += points.described(record.point, names)
        # A line each: the table is drawn over and over.
        made.add_row(*map(Text, told), Text(about, no_wrap=True, overflow="ellipsis"))
    return made


# ---------------------------------------------------------------- files


def write_csv(records: Sequence[TrialRecord], path: Path) -> None:
    """Every trial in one row: its record, the fields it drew, its last metrics."""
    kept = ("number", "point_id", "repeat", "control_of", "status", "step", "seconds", "reason", "mlflow_run")
    fields = dict.fromkeys(name for record in records for name in record.point)
    metrics = dict.fromkeys(name for record in records for name in record.result)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*kept, *fields, *metrics])
        for record in sorted(records, key=lambda record: record.number):
            row = [getattr(record, name) for name in kept]
            row += [_csv_value(record.point.get(name)) for name in fields]
            writer.writerow(row + [record.result.get(name) for name in metrics])
    os.replace(part, path)


def _csv_value(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | dict | bool) else value


# ---------------------------------------------------------------- cells


def _empty(title: str | None, caption: str | None = None) -> Table:
    return Table(
        box=None,
        padding=(0, 2, 0, 0),
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
    )


def _metrics(ranked: Sequence[Ranked], objectives: "Sequence[Objective]", primary: str | None) -> list[str]:
    """Objectives, and beside them accuracy and KL where they were measured."""
    kl = points.kl_metric((trial for one in ranked for trial in one.trials), primary)
    also = [ACCURACY] if any(ACCURACY in one.estimates for one in ranked) else []
    return list(dict.fromkeys([*(o.metric for o in objectives), *also, *([kl] if kl else [])]))


def _cells(estimates: Sequence[Estimate | None], *, signed: bool = False) -> list[str]:
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


def _rank(one: Ranked) -> str:
    return ABSENT if one.rank is None else f"{one.rank}{'*' if one.front else ''}"


def _field(one: Ranked, name: str) -> str:
    return points.text(points.flat(one.point).get(name, ABSENT))


def _loss_fields(one: Ranked) -> dict[str, Any]:
    return {field: value for field, value in points.flat(one.point).items() if field.startswith("loss.")}


def _about(one: Ranked, names: Mapping[str, str]) -> str:
    about = "" if one.control_of is None else f"control of {one.control_of}: "
    return about + points.described(one.point, names)


def _steps(one: Ranked) -> str:
    """Of the trials that count."""
    steps = [trial.step for trial in one.trials if one.rank is None or trial.status != "failed"]
    return str(min(steps)) if min(steps) == max(steps) else f"{min(steps)}–{max(steps)}"


def _status(one: Ranked) -> str:
    counts = Counter(trial.status for trial in one.trials)
    if len(counts) == 1:
        return one.trials[0].status
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _counts(records: Sequence[TrialRecord]) -> str:
    counts: Counter[str] = Counter(record.status for record in records)
    order = ("running", "finished", "stopped", "failed", "pending")
    return ", ".join(f"{counts[status]} {status}" for status in order if counts[status])


def _footnotes(ranked: Sequence[Ranked], rows: int | None, same: Mapping[str, str]) -> str:
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
