"""A search's results: points ranked, with confidence intervals, and compared with their controls."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from orchestrator.search.journal import TrialRecord
from orchestrator.search.report.labels import read_result

if TYPE_CHECKING:
    from orchestrator.config.sweep import Objective

ACCURACY = "eval/accuracy"


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` trials and the half-width of its 95 % interval, None where it is not known."""

    mean: float
    half_width: float | None
    count: int


@dataclass(frozen=True)
class RankedPoint:
    """One point, or one control, with all its repeats.

    Attributes:
        rank: from 1; None if an objective has no value from any repeat.
        trials: its repeats.
        estimates: by metric; those that at least one repeat measured.
        front: with several objectives, whether it is on the Pareto front: no other point dominates it.
    """

    rank: int | None
    trials: tuple[TrialRecord, ...]
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    front: bool = False

    @property
    def point(self) -> Mapping[str, Any]:
        """The fields that the point drew."""
        return self.trials[0].point

    @property
    def point_id(self) -> int:
        """The number of the point's first trial."""
        return self.trials[0].point_id

    @property
    def control_of(self) -> int | None:
        """The point whose control this is, or None."""
        return self.trials[0].control_of


@dataclass(frozen=True)
class Difference:
    """A point minus its control, by objective; `paired` if the interval is over seeds that both have."""

    point: RankedPoint
    control: RankedPoint
    estimates: Mapping[str, Estimate]
    paired: bool


def rank_points(records: Sequence[TrialRecord], objectives: "Sequence[Objective]") -> list[RankedPoint]:
    """Rank points and controls, best first, by the mean of the first objective over repeats with a result.

    The interval of a mean is Student's t over the repeats; a point with one trial has that trial's interval
    of `eval/accuracy` over the held-out pairs, and none for other metrics. With several objectives the points
    on the Pareto front come first. Points without a result come last, without a rank.
    """
    grouped: dict[int, list[TrialRecord]] = {}
    for record in sorted(records, key=lambda record: record.number):
        grouped.setdefault(record.point_id, []).append(record)
    candidates = [RankedPoint(None, tuple(trials), _estimate_metrics(trials)) for trials in grouped.values()]
    complete = [one for one in candidates if all(o.metric in one.estimates for o in objectives)]
    scores = {one.point_id: _objective_scores(one, objectives) for one in complete}
    front = {
        point_id
        for point_id, own in scores.items()
        if not any(_is_dominating(other, own) for other in scores.values())
    }
    several = len(objectives) > 1
    ordered = sorted(
        complete, key=lambda one: (several and one.point_id not in front, -scores[one.point_id][0])
    )
    ranked = [
        RankedPoint(place, one.trials, one.estimates, several and one.point_id in front)
        for place, one in enumerate(ordered, start=1)
    ]
    return ranked + [one for one in candidates if one.point_id not in scores]


def compare_with_controls(
    ranked: Sequence[RankedPoint],
    objectives: "Sequence[Objective]",
    control: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None,
) -> list[Difference]:
    """Compare each point with its control, in the order of the ranking.

    `control` returns the fields of a point's control, so that one control can serve many points; without it
    a control serves the point that it was entered for.
    """
    found = []
    for one in ranked:
        own = None if one.control_of is not None else _find_control(one, ranked, control)
        if own is not None and one.rank is not None and own.rank is not None:
            estimates = {o.metric: _estimate_difference(one, own, o.metric) for o in objectives}
            paired = all(estimate.count > 1 for estimate in estimates.values())
            found.append(Difference(one, own, estimates, paired))
    return found


def _find_control(
    one: RankedPoint,
    ranked: Sequence[RankedPoint],
    control: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None,
) -> RankedPoint | None:
    if control is None:
        return next((other for other in ranked if other.control_of == one.point_id), None)
    fields = control(one.point)
    if fields is None:
        return None
    return next((o for o in ranked if o.control_of is not None and o.point == fields), None)


def _estimate_difference(one: RankedPoint, control: RankedPoint, metric: str) -> Estimate:
    """Estimate the difference over the seeds that both have, or of the means with fewer than two of them.

    The interval of the latter is the root of the sum of both squared: too wide where the same held-out pairs
    are easy for both, never too narrow.
    """
    ours, theirs = _values_by_repeat(one, metric), _values_by_repeat(control, metric)
    common = sorted(ours.keys() & theirs.keys())
    if len(common) > 1:
        return _estimate_mean([ours[repeat] - theirs[repeat] for repeat in common])
    left, right = one.estimates[metric], control.estimates[metric]
    known = left.half_width is not None and right.half_width is not None
    half = math.hypot(left.half_width or 0, right.half_width or 0) if known else None
    return Estimate(left.mean - right.mean, half, 1)


def _values_by_repeat(one: RankedPoint, metric: str) -> dict[int, float]:
    values = ((trial.repeat, read_result(trial, metric)) for trial in one.trials)
    return {repeat: value for repeat, value in values if value is not None}


def _estimate_metrics(trials: Sequence[TrialRecord]) -> dict[str, Estimate]:
    found = {}
    for metric in dict.fromkeys(metric for trial in trials for metric in trial.result):
        values = [value for trial in trials if (value := read_result(trial, metric)) is not None]
        if values:
            found[metric] = _estimate_mean(values)
    accuracy = found.get(ACCURACY)
    if accuracy is not None and accuracy.count == 1:
        result = next(t for t in trials if read_result(t, ACCURACY) is not None).result
        found[ACCURACY] = Estimate(accuracy.mean, result.get(f"{ACCURACY}_interval"), 1)
    return found


def _estimate_mean(values: Sequence[float]) -> Estimate:
    from scipy.special import stdtrit  # slow to import, and only the end of a search needs it

    count = len(values)
    if count == 1:
        return Estimate(values[0], None, 1)
    half = float(stdtrit(count - 1, 0.975)) * stdev(values) / math.sqrt(count)
    return Estimate(fmean(values), half, count)


def _objective_scores(one: RankedPoint, objectives: "Sequence[Objective]") -> tuple[float, ...]:
    """Return the means of the objectives, negated where less is better."""
    return tuple(one.estimates[o.metric].mean * (1 if o.mode == "max" else -1) for o in objectives)


def _is_dominating(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))
