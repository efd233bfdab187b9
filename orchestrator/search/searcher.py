"""A search as Ray Tune asks for it: which trial next, and what came of each.

The journal is the whole state: a search that was killed at any place is made anew over the same journal, and
goes on.
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
    """Hands out the trials of the journal, and enters new points when none is left.

    Trials that an earlier process left running are handed out again, first of all; repeats and controls that
    it did not come to enter are entered. The first point of a new search is entered at construction, so that
    a space without any is refused before something starts.

    Args:
        space: where points come from.
        config: algorithm, number of points, repeats, whether controls are added, seed.
        objectives: what TPE learns from; one, or several for a multi-objective search.
        trials: the journal.
        allowed: why a point may not be run, None if it may.
        control: the point's matched control, None if it needs none.

    Raises:
        SpaceError: no point of the space is allowed, or too many in a row are not; or it has no grid.
    """

    def __init__(
        self,
        space: Space,
        config: SearchConfig,
        objectives: Sequence[Objective],
        trials: Journal,
        *,
        allowed: Callable[[Point], str | None],
        control: Callable[[Point], Point | None],
    ) -> None:
        # Without a metric: Tune would refuse the last report of a diverged trial, which has none.
        super().__init__()
        self._config = config
        self._metrics = [objective.metric for objective in objectives]
        self._journal = trials
        self._allowed = allowed
        self._control = control
        grid = config.algorithm == "grid"
        self._source: PointSource = GridSource(space) if grid else OptunaSource(space, config, objectives)
        self._numbers: dict[str, int] = {}
        self._entered = 0
        self._points: set[str] = set()
        self._controls: set[str] = set()
        self._resume_journal()
        if not self._entered:
            self._enter_point()

    @property
    def entered(self) -> int:
        """Points that were entered."""
        return self._entered

    def next_trial(self) -> TrialRecord | None:
        """The trial that is handed out next, entered if need be; None when the search has all its trials."""
        return self._find_pending() or (self._find_pending() if self._enter_point() else None)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial: `{"number": its number, **its point}`, or `Searcher.FINISHED`."""
        record = self.next_trial()
        if record is None:
            return Searcher.FINISHED
        self._journal.start(record.number)
        self._numbers[trial_id] = record.number
        return {"number": record.number, **record.point}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A trial's latest step and metrics go into the journal."""
        record = self._journal[self._numbers[trial_id]]
        self._journal.update(record.number, _read_report(record, result))

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """A trial has ended by itself, by the scheduler or by an error; its point's last tells the source.

        `result` may tell `total`, the planned steps, and `failed`, why the trial gave up.
        """
        record = self._journal[self._numbers[trial_id]]
        if record.ended:
            return
        result = result or {}
        last = _read_report(record, result)
        if reason := _explain_failure(record, last, result, error):
            self._journal.fail(record.number, last, reason)
        # Tune gives no result of a trial that the scheduler gave up while it waited between two steps.
        elif not result or last.step < result.get("total", 0):
            self._journal.stop(record.number, last)
        else:
            self._journal.finish(record.number, last)
        self._report_to_source(self._journal.group_by_point()[record.point_id])

    def change_point(self, number: int, point: Point) -> None:
        """A scheduler changed a trial's fields while it runs."""
        self._journal.change_point(number, point)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the state."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its own settings, this object among them, and we never read them back.
        return {}

    def _resume_journal(self) -> None:
        for record in self._journal:
            if record.status == "running":
                self._journal.put_back(record.number)
        for point_id in self._journal.group_by_point():
            self._journal.complete_repeats(point_id, self._config.repeats)
        groups = list(self._journal.group_by_point().values())
        controls = [group[0] for group in groups if group[0].control_of is not None]
        self._controls = {to_key(record.drawn) for record in controls}
        points = [group for group in groups if group[0].control_of is None]
        self._entered = len(points)
        for group in points:
            self._points.add(to_key(group[0].drawn))
            self._source.restore_point(group[0].point_id, group[0].params)
            self._report_to_source(group)
        for first in (group[0] for group in points):
            if first.control is None or to_key(first.control) not in self._controls:
                self._enter_control(first.point_id, first.drawn)

    def _find_pending(self) -> TrialRecord | None:
        return next((record for record in self._journal if record.status == "pending"), None)

    def _enter_point(self) -> bool:
        """Enter another point with its repeats and control; False when the search has all its points."""
        if self._config.trials is not None and self._entered >= self._config.trials:
            return False
        refusal, refused = None, 0
        exhausted = self._entered > 0 and self._config.algorithm == "grid"
        for proposal in self._source.propose_points(self._entered):
            if proposal.refusal is None and to_key(proposal.point) in self._points:
                exhausted = True
                continue
            refusal = proposal.refusal or self._allowed(proposal.point)
            if refusal is None:
                self._enter_proposal(proposal)
                return True
            refused += 1
        if refused and not exhausted:
            raise SpaceError(f"{refused} points of the space in a row cannot be run; the last: {refusal}")
        return False

    def _enter_proposal(self, proposal: Proposal) -> None:
        repeats = self._config.repeats
        point_id = self._journal.enter_point(proposal.point, repeats=repeats, params=proposal.params)[
            0
        ].number
        self._entered += 1
        self._points.add(to_key(proposal.point))
        self._source.accept_proposal(point_id, proposal)
        self._enter_control(point_id, proposal.point)

    def _enter_control(self, point_id: int, point: Point) -> None:
        control = self._control(point) if self._config.controls else None
        if control is None:
            return
        self._journal.set_control(point_id, control)
        if to_key(control) not in self._controls:
            self._controls.add(to_key(control))
            self._journal.enter_point(control, repeats=self._config.repeats, control_of=point_id)

    def _report_to_source(self, repeats: Sequence[TrialRecord]) -> None:
        """Tell the source what a point gave, once all its repeats have ended."""
        if repeats[0].control_of is not None or not all(record.ended for record in repeats):
            return
        results = [record.result for record in repeats if record.status != "failed"]
        whole = [
            [result[metric] for metric in self._metrics]
            for result in results
            if result.keys() >= {*self._metrics}
        ]
        self._source.record_result(repeats[0].point_id, [*np.mean(whole, axis=0)] if whole else None)


def sample_points(space: Space, count: int, *, seed: int) -> list[dict[str, Any]]:
    """Points drawn at random, whatever a search's algorithm draws; some may be equal.

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
    record: TrialRecord, last: TrialReport, result: Mapping[str, Any], error: bool
) -> str | None:
    if "failed" in result:
        return str(result["failed"])
    if error:
        return record.reason or "the trial's process ended with an error"
    measured = record.result if last.metrics is None else last.metrics
    return None if measured else "it ended without a result"


def _read_report(record: TrialRecord, result: Mapping[str, Any]) -> TrialReport:
    """Pick step and metrics out of Tune's result, which holds much else; NaN and infinity are no metrics."""
    metrics = {
        name: float(value)
        for name, value in result.items()
        if name.startswith("eval/") and isinstance(value, Real)
    }
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return TrialReport(int(result.get("step", record.step)), finite if metrics else None)
