"""Ray Tune's searcher: it hands out the next trial and records each trial's result.

The journal is the whole state: a search that was killed at any place resumes when a new searcher is built
over the same journal.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from orchestrator.config.sweep import Objective, Point, SearchConfig
from orchestrator.search.journal import Journal, TrialRecord, TrialReport
from orchestrator.search.samplers import GridSource, OptunaSource, PointSource, Proposal, to_key
from tune_spaces.domains import SpaceError
from tune_spaces.spaces import Space


class JournalSearcher(Searcher):
    """Hands out the pending trials of the journal, and adds new points when none is left.

    Trials that an earlier process left running are handed out again before all others, and repeats and
    controls that it had not added yet are added. The first point of a new search is added at construction, so
    that a space without any valid point is refused before anything starts.

    Args:
        space: the space that points are drawn from.
        config: algorithm, number of points, repeats, whether controls are added, seed.
        objectives: the metrics that TPE learns from; one, or several for a multi-objective search.
        journal: the search's trials.
        explain_refusal: returns why a point may not be run, None if it may.
        find_control: returns the point's matched control, None if it needs none.

    Raises:
        SpaceError: no point of the space may be run, or too many in a row may not; or the space has no grid.
    """

    def __init__(
        self,
        space: Space,
        config: SearchConfig,
        objectives: Sequence[Objective],
        journal: Journal,
        *,
        explain_refusal: Callable[[Point], str | None],
        find_control: Callable[[Point], Point | None],
    ) -> None:
        # Without a metric: Tune would refuse the last report of a diverged trial, which has none.
        super().__init__()
        self._config = config
        self._metrics = [objective.metric for objective in objectives]
        self._journal = journal
        self._explain_refusal = explain_refusal
        self._find_control = find_control
        is_grid = config.algorithm == "grid"
        self._source: PointSource = GridSource(space) if is_grid else OptunaSource(space, config, objectives)
        self._numbers: dict[str, int] = {}
        self._point_count = 0
        self._point_keys: set[str] = set()
        self._control_keys: set[str] = set()
        self._resume_journal()
        if not self._point_count:
            self._add_point()

    @property
    def point_count(self) -> int:
        """Number of points that the search has, without controls."""
        return self._point_count

    def next_trial(self) -> TrialRecord | None:
        """Return the trial to hand out next, of a new point if none is pending; None if there is no more."""
        return self._find_pending() or (self._find_pending() if self._add_point() else None)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial as `{"number": its number, **its point}`, or `Searcher.FINISHED`."""
        record = self.next_trial()
        if record is None:
            return Searcher.FINISHED
        self._journal.start(record.number)
        self._numbers[trial_id] = record.number
        return {"number": record.number, **record.point}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Record a trial's latest step and metrics in the journal."""
        record = self._journal[self._numbers[trial_id]]
        self._journal.update(record.number, _read_report(record, result))

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record that a trial has ended, at its last step, by the scheduler or by an error.

        The last trial of a point reports the point's result to the source of points. `result` may have
        `total`, the planned steps, and `failed`, the reason why the trial gave up.
        """
        record = self._journal[self._numbers[trial_id]]
        if record.ended:
            return
        result = result or {}
        report = _read_report(record, result)
        if reason := _explain_failure(record, report, result, error):
            self._journal.fail(record.number, report, reason)
        # Tune passes no result for a trial that the scheduler stopped while it waited between two steps.
        elif not result or report.step < result.get("total", 0):
            self._journal.stop(record.number, report)
        else:
            self._journal.finish(record.number, report)
        self._report_to_source(self._journal.group_by_point()[record.point_id])

    def change_point(self, number: int, point: Point) -> None:
        """Record that a scheduler changed a trial's fields while it runs."""
        self._journal.change_point(number, point)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the journal is the state."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its own settings, this object among them, and they are never read back.
        return {}

    def _resume_journal(self) -> None:
        """Requeue an earlier process's running trials, complete its points and restore the source."""
        for record in self._journal:
            if record.status == "running":
                self._journal.mark_pending(record.number)
        for point_id in self._journal.group_by_point():
            self._journal.complete_repeats(point_id, self._config.repeats)
        groups = list(self._journal.group_by_point().values())
        controls = [group[0] for group in groups if group[0].control_of is not None]
        self._control_keys = {to_key(record.drawn) for record in controls}
        points = [group for group in groups if group[0].control_of is None]
        self._point_count = len(points)
        for group in points:
            self._point_keys.add(to_key(group[0].drawn))
            self._source.restore_point(group[0].point_id, group[0].params)
            self._report_to_source(group)
        for first in (group[0] for group in points):
            if first.control is None or to_key(first.control) not in self._control_keys:
                self._add_control(first.point_id, first.drawn)

    def _find_pending(self) -> TrialRecord | None:
        return next((record for record in self._journal if record.status == "pending"), None)

    def _add_point(self) -> bool:
        """Add another point with its repeats and control; return False when the search has all its points."""
        if self._config.trials is not None and self._point_count >= self._config.trials:
            return False
        refusal, refusal_count = None, 0
        exhausted = self._point_count > 0 and self._config.algorithm == "grid"
        for proposal in self._source.propose_points(self._point_count):
            if proposal.refusal is None and to_key(proposal.point) in self._point_keys:
                exhausted = True
                continue
            refusal = proposal.refusal or self._explain_refusal(proposal.point)
            if refusal is None:
                self._add_proposal(proposal)
                return True
            refusal_count += 1
        if refusal_count and not exhausted:
            raise SpaceError(
                f"{refusal_count} points of the space in a row cannot be run; the last: {refusal}"
            )
        return False

    def _add_proposal(self, proposal: Proposal) -> None:
        first, *_ = self._journal.add_point(
            proposal.point, repeats=self._config.repeats, params=proposal.params
        )
        self._point_count += 1
        self._point_keys.add(to_key(proposal.point))
        self._source.accept_proposal(first.number, proposal)
        self._add_control(first.number, proposal.point)

    def _add_control(self, point_id: int, point: Point) -> None:
        """Add a point's matched control if the search has controls; equal controls are added once."""
        control = self._find_control(point) if self._config.controls else None
        if control is None:
            return
        self._journal.set_control(point_id, control)
        if to_key(control) not in self._control_keys:
            self._control_keys.add(to_key(control))
            self._journal.add_point(control, repeats=self._config.repeats, control_of=point_id)

    def _report_to_source(self, repeats: Sequence[TrialRecord]) -> None:
        """Report a point's mean objectives to the source, once all its repeats have ended."""
        if repeats[0].control_of is not None or not all(record.ended for record in repeats):
            return
        results = [record.result for record in repeats if record.status != "failed"]
        complete = [
            [result[metric] for metric in self._metrics]
            for result in results
            if result.keys() >= {*self._metrics}
        ]
        self._source.record_result(repeats[0].point_id, [*np.mean(complete, axis=0)] if complete else None)


def sample_points(space: Space, count: int, *, seed: int) -> list[dict[str, Any]]:
    """Draw points at random, independent of a search's algorithm; some may be equal.

    Raises:
        SpaceError: the space's fields do not fit together.
    """
    config = SearchConfig(algorithm="random", trials=count, seed=seed)
    source = OptunaSource(space, config, [Objective(metric="eval/accuracy", mode="max")])
    points = []
    for number in range(count):
        proposal = next(source.propose_points(number))
        if proposal.refusal:
            raise SpaceError(proposal.refusal)
        source.accept_proposal(number, proposal)
        points.append(proposal.point)
    return points


def _explain_failure(
    record: TrialRecord, report: TrialReport, result: Mapping[str, Any], error: bool
) -> str | None:
    """Return why a trial that has ended failed, None if it did not fail."""
    if "failed" in result:
        return str(result["failed"])
    if error:
        return record.reason or "the trial's process ended with an error"
    measured = record.result if report.metrics is None else report.metrics
    return None if measured else "it ended without a result"


def _read_report(record: TrialRecord, result: Mapping[str, Any]) -> TrialReport:
    """Read step and metrics from Tune's result, which has much else; NaN and infinity are left out."""
    metrics = {
        name: float(value)
        for name, value in result.items()
        if name.startswith("eval/") and isinstance(value, Real)
    }
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return TrialReport(int(result.get("step", record.step)), finite if metrics else None)
