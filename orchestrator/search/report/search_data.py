"""The numbers behind a search's figures, from its trials' records and their `metrics.jsonl`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.search.journal import TrialRecord
from orchestrator.search.report.importance import Importance, estimate_importance
from orchestrator.search.report.labels import (
    find_kl_metric,
    flatten_point,
    list_shown_fields,
    loss_family,
    read_result,
    shorten_field_names,
)
from orchestrator.search.report.ranking import RankedPoint, rank_points
from orchestrator.tracking.metrics_file import read_metrics
from orchestrator.tracking.plots import COLOURS

if TYPE_CHECKING:
    from orchestrator.config.sweep import Objective

_MARKERS = ("o", "s", "^", "D", "v", "P", "p")  # one per colour
_OTHER_MARKER, _OTHER_COLOUR, _BASELINE = "*", "#999999", "dpo"


@dataclass(frozen=True)
class Curve:
    """One metric of one trial: its values and the steps they were measured at, along `x`."""

    record: TrialRecord
    steps: list[int]
    x: list[float]
    values: list[float]


@dataclass(frozen=True)
class EndedTrial:
    """An ended trial: seconds since the search began, its result, and the best result until then."""

    record: TrialRecord
    seconds: float
    value: float
    best: float


@dataclass(frozen=True)
class LossFamily:
    """The label, colour and marker (by matplotlib's name) of a family of losses; no two share any of them."""

    label: str
    colour: str
    marker: str


@dataclass(frozen=True)
class SearchData:
    """The records of a search, its objectives and the metrics of its trials by trial number."""

    records: Sequence[TrialRecord]
    objectives: "Sequence[Objective]"
    lines: Mapping[int, Sequence[Mapping[str, Any]]]
    primary: str | None = None

    @classmethod
    def read(
        cls,
        records: Iterable[TrialRecord],
        objectives: "Sequence[Objective]",
        folders: Mapping[int, Path],
        primary: str | None = None,
    ) -> "SearchData":
        """Read the metrics in the trials' folders; a trial without a folder has none."""
        records = sorted(records, key=lambda record: record.number)
        lines = {r.number: read_metrics(folders[r.number]) for r in records if r.number in folders}
        return cls(records, objectives, lines, primary)

    @cached_property
    def ranked(self) -> list[RankedPoint]:
        """Points and controls with a result, best first."""
        return [point for point in rank_points(self.records, self.objectives) if point.rank is not None]

    @property
    def ranked_points(self) -> list[RankedPoint]:
        """Points with a result, best first, without the controls."""
        return [point for point in self.ranked if point.control_of is None]

    @property
    def best(self) -> RankedPoint | None:
        """The first of the ranking that is no control."""
        return next(iter(self.ranked_points), None)

    @cached_property
    def field_names(self) -> dict[str, str]:
        """Fields that vary, with their short names."""
        return shorten_field_names(list_shown_fields(self.records))

    @cached_property
    def families(self) -> dict[str, LossFamily]:
        """Families by their loss, the best first.

        DPO and the best families have a colour each; where colours are too few, the others share one family.
        """
        ranked = [trial for point in self.ranked for trial in point.trials]
        losses = list(dict.fromkeys(loss_family(record) for record in [*ranked, *self.records]))
        named = losses
        if len(losses) > len(COLOURS):
            best = [loss for loss in losses if loss != _BASELINE][: len(COLOURS) - (_BASELINE in losses)]
            named = [loss for loss in losses if loss in (*best, _BASELINE)]
        families = {
            loss: LossFamily(loss, colour, marker)
            for loss, colour, marker in zip(named, COLOURS, _MARKERS, strict=False)
        }
        others = [loss for loss in losses if loss not in named]
        label = f"{len(others)} other{'s' * (len(others) > 1)}"
        return families | dict.fromkeys(others, LossFamily(label, _OTHER_COLOUR, _OTHER_MARKER))

    def find_family(self, record: TrialRecord) -> LossFamily:
        """Return the family of a trial's loss."""
        return self.families[loss_family(record)]

    @cached_property
    def importances(self) -> dict[str, Importance]:
        """Importances of the fields by objective; empty where there are too few points."""
        drawn = [
            {field: value for field, value in flatten_point(point.point).items() if field in self.field_names}
            for point in self.ranked
        ]
        found = {
            o.metric: estimate_importance(drawn, [point.estimates[o.metric].mean for point in self.ranked])
            for o in self.objectives
        }
        return {metric: importance for metric, importance in found.items() if importance is not None}

    @property
    def kl_metric(self) -> str | None:
        """The metric of the divergence from the primary reference, if it was measured."""
        return find_kl_metric(self.records, self.primary)

    def collect_curves(self, metric: str, over: str = "step") -> list[Curve]:
        """Return a curve per trial that measured `metric` and `over`, controls and failed trials included."""
        curves = []
        for record in self.records:
            lines = self.lines.get(record.number, ())
            lines = [line for line in lines if line.get(metric) is not None and line.get(over) is not None]
            if lines:
                steps, x, values = ([line[key] for line in lines] for key in ("step", over, metric))
                curves.append(Curve(record, steps, x, values))
        return curves

    def list_ended_trials(self, objective: "Objective") -> list[EndedTrial]:
        """Return trials with a result in the order they ended; a control is never the best."""
        times = {
            number: [line["time"] for line in lines if "time" in line] for number, lines in self.lines.items()
        }
        started = min((min(own) for own in times.values() if own), default=0.0)
        ended = [
            (max(times[record.number]) - started, record, value)
            for record in self.records
            if times.get(record.number) and (value := read_result(record, objective.metric)) is not None
        ]
        better = max if objective.mode == "max" else min
        best: float | None = None
        found = []
        for seconds, record, value in sorted(ended, key=lambda item: item[0]):
            if record.control_of is None:
                best = value if best is None else better(best, value)
            found.append(EndedTrial(record, seconds, value, math.nan if best is None else best))
        return found


def compute_frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points whose value none with less divergence reaches, by rising divergence."""
    best, found = -math.inf, []
    for divergence, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if value > best:
            best = value
            found.append((divergence, value))
    return found
