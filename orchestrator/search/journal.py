"""A search's journal: one JSON file per trial, replaced in one move, so that a kill loses nothing.

It is the whole state of a search. Ray Tune's own is thrown away at every start: what a trial was asked,
what came of it and where it lies is read back from here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import UsageError
from orchestrator.files import RecordError, dump_record, load_record, replace_text

TRIAL = "trial.json"
VERSION = 2
"""Of the record's fields. 1 called `end_reported` by another name."""

Status = Literal["pending", "running", "finished", "stopped", "failed"]
"""stopped: ended early by the scheduler or a stopping rule, with a result all the same."""
ENDED = ("finished", "stopped", "failed")


@dataclass(kw_only=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: from 1, in the order they were entered.
        point_id: number of the first trial of the same point; repeats share it.
        repeat: 0, 1, ...; added to the run file's seed.
        control_of: the point whose matched control this is.
        control: the point's matched control; one control may serve several points.
        point: dotted run-file fields that the trial runs with.
        drawn: the same as they were entered; a scheduler may change `point` while the trial runs.
        params: the sampler's own names and values for the point.
        status: where it stands.
        step: optimizer steps taken at its last report.
        result: its last reported metrics.
        reason: why it failed.
        seconds: wall time over all its starts.
        mlflow_run: its child run.
        told: whether its end is in MLflow.
    """

    number: int
    point_id: int
    repeat: int = 0
    control_of: int | None = None
    control: dict[str, Any] | None = None
    point: dict[str, Any] = field(default_factory=dict)
    drawn: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    status: Status = "pending"
    step: int = 0
    result: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    seconds: float = 0.0
    mlflow_run: str | None = None
    end_reported: bool = False

    def __post_init__(self) -> None:
        self.drawn = self.drawn or dict(self.point)

    @property
    def name(self) -> str:
        """`0007`: the trial's folder and its name in MLflow."""
        return f"{self.number:04d}"

    @property
    def ended(self) -> bool:
        """Whether it will not be started again."""
        return self.status in ENDED


@dataclass(frozen=True)
class TrialReport:
    """What a trial has reported: its step, and its held-out metrics unless the report has none."""

    step: int
    metrics: Mapping[str, float] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The record's fields that it replaces."""
        return {"step": self.step} | ({} if self.metrics is None else {"result": dict(self.metrics)})


class Journal:
    """All trials of a search, in memory and under `folder/<name>/trial.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records: dict[int, TrialRecord] = {}
        for path in sorted(folder.glob(f"*/{TRIAL}")):
            record = read_trial(path.parent)
            self._records[record.number] = record

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(sorted(self._records.values(), key=lambda record: record.number))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> TrialRecord:
        return self._records[number]

    def enter_point(
        self,
        point: Mapping[str, Any],
        *,
        repeats: int = 1,
        params: Mapping[str, Any] | None = None,
        control_of: int | None = None,
    ) -> list[TrialRecord]:
        """New pending trials of one point, one per repeat."""
        first = TrialRecord(
            number=self._next,
            point_id=self._next,
            control_of=control_of,
            point=dict(point),
            params=dict(params or {}),
        )
        self._write(first)
        return self.complete_repeats(first.number, repeats)

    def complete_repeats(self, point_id: int, repeats: int) -> list[TrialRecord]:
        """A point's trials; repeats it lacks, as after a kill between two of them, are entered as pending."""
        there = [record for record in self if record.point_id == point_id]
        for repeat in sorted(set(range(repeats)) - {record.repeat for record in there}):
            record = TrialRecord(
                number=self._next,
                point_id=point_id,
                repeat=repeat,
                control_of=there[0].control_of,
                point=dict(there[0].drawn),
                params=dict(there[0].params),
            )
            self._write(record)
            there.append(record)
        return there

    def start(self, number: int) -> TrialRecord:
        """Mark a trial as running; a reason from an earlier start is dropped."""
        return self._change(number, status="running", reason=None)

    def put_back(self, number: int) -> TrialRecord:
        """Mark a trial as pending again, because what ran it is gone or is to run it anew."""
        return self._change(number, status="pending", reason=None)

    def update(self, number: int, last: TrialReport) -> TrialRecord:
        """Keep a running trial's last report."""
        return self._change(number, **last.fields)

    def finish(self, number: int, last: TrialReport) -> TrialRecord:
        """Mark a trial as run to its last step."""
        return self._change(number, status="finished", **last.fields)

    def stop(self, number: int, last: TrialReport) -> TrialRecord:
        """Mark a trial as ended before its last step by the scheduler or a stopping rule."""
        return self._change(number, status="stopped", **last.fields)

    def fail(self, number: int, last: TrialReport, reason: str) -> TrialRecord:
        """Mark a trial as failed."""
        return self._change(number, status="failed", reason=reason, **last.fields)

    def note_reason(self, number: int, reason: str) -> TrialRecord:
        """Keep the error that a trial raised; whether it has failed for good is not known yet."""
        return self._change(number, reason=reason)

    def change_point(self, number: int, point: Mapping[str, Any]) -> TrialRecord:
        """Replace the fields that a trial runs with; the fields it was entered with stay as `drawn`."""
        return self._change(number, point=dict(point))

    def set_control(self, number: int, control: Mapping[str, Any]) -> TrialRecord:
        """Keep a point's matched control with its first trial."""
        return self._change(number, control=dict(control))

    def set_mlflow_run(self, number: int, run_id: str) -> TrialRecord:
        """Keep the MLflow run that belongs to a trial."""
        return self._change(number, mlflow_run=run_id)

    def report_end(self, number: int, *, seconds: float) -> TrialRecord:
        """Add the wall time of a start, and note whether MLflow has the trial's end."""
        record = self._records[number]
        return self._change(number, seconds=record.seconds + seconds, end_reported=record.ended)

    def show_step(self, number: int, step: int) -> None:
        """Show a running trial's step in the live table, without writing it: its next report will."""
        self._records[number].step = step

    @property
    def _next(self) -> int:
        return max(self._records, default=0) + 1

    def _change(self, number: int, **fields: Any) -> TrialRecord:
        record = self._records[number]
        for name, value in fields.items():
            setattr(record, name, value)
        self._write(record)
        return record

    def _write(self, record: TrialRecord) -> None:
        self._records[record.number] = record
        replace_text(self.trial_folder(record) / TRIAL, dump_record(record, version=VERSION))

    def trial_folder(self, record: TrialRecord) -> Path:
        """The trial's own folder: metrics, checkpoints, its record."""
        return self.folder / record.name

    def group_by_point(self) -> dict[int, list[TrialRecord]]:
        """Trials by point, repeats together, controls under points of their own."""
        grouped: dict[int, list[TrialRecord]] = {}
        for record in self:
            grouped.setdefault(record.point_id, []).append(record)
        return grouped


def read_trial(folder: Path) -> TrialRecord:
    """The record in a trial's folder. Raises UsageError when it is none."""
    path = folder / TRIAL
    try:
        return load_record(TrialRecord, path.read_text(), version=VERSION, convert=_convert_fields)
    except RecordError as error:
        raise UsageError(
            f"{path}: is not a trial's record that can be read: {error}. Give the search another name, or "
            "start over with --fresh"
        ) from None


def _convert_fields(version: int, fields: dict[str, Any]) -> dict[str, Any]:
    if version == 1:
        fields["end_reported"] = fields.pop("told", False)
    return fields
