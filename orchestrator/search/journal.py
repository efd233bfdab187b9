"""A search's journal: one JSON file per trial, replaced atomically, so that a kill loses nothing.

It is the whole state of a search. Ray Tune's own state is deleted at every start: a trial's point, status and
result are read back from here.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import UsageError
from orchestrator.files import RecordError, dump_record, load_record, read_regular_file, replace_text

TRIAL_FILE = "trial.json"
VERSION = 2
"""Version of the record's fields. Version 1 had another name for `end_reported`."""

Status = Literal["pending", "running", "finished", "stopped", "failed"]
"""A trial's status; "stopped" means ended early by the scheduler or a stopping rule, with a result."""
END_STATUSES = ("finished", "stopped", "failed")


@dataclass(kw_only=True)
class TrialRecord:
    """The record of one trial.

    Attributes:
        number: from 1, in the order in which trials were added.
        point_id: number of the first trial of the same point; repeats share it.
        repeat: 0, 1, ...; added to the run file's seed.
        control_of: the point whose matched control this is.
        control: the point's matched control; one control may serve several points.
        point: dotted run-file fields that the trial runs with.
        drawn: the fields that it was added with; a scheduler may change `point` while the trial runs.
        params: the sampler's own names and values for the point.
        status: pending, running or how it ended.
        step: optimizer steps taken at its last report.
        result: its last reported metrics.
        reason: why it failed.
        seconds: wall time over all its starts.
        mlflow_run: id of its MLflow run, a child of the search's.
        end_reported: whether its end is in MLflow.
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
        """The name of its folder and its MLflow run, such as `0007`."""
        return f"{self.number:04d}"

    @property
    def ended(self) -> bool:
        """Whether it will not be started again."""
        return self.status in END_STATUSES


@dataclass(frozen=True)
class TrialReport:
    """A trial's report: its step, and its held-out metrics unless the report has none."""

    step: int
    metrics: Mapping[str, float] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the trial's record that the report replaces."""
        return {"step": self.step} | ({} if self.metrics is None else {"result": dict(self.metrics)})


class Journal:
    """All trials of a search, in memory and under `folder/<name>/trial.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records: dict[int, TrialRecord] = {}
        for path in sorted(trial / TRIAL_FILE for trial in folder.glob("*/")):
            if not os.path.lexists(path):
                continue
            record = read_trial(path.parent)
            if record.name != path.parent.name:
                raise UsageError(f"{path}: is the record of trial {record.name}; move the folder away")
            self._records[record.number] = record

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(sorted(self._records.values(), key=lambda record: record.number))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> TrialRecord:
        return self._records[number]

    def add_point(
        self,
        point: Mapping[str, Any],
        *,
        repeats: int = 1,
        params: Mapping[str, Any] | None = None,
        control_of: int | None = None,
    ) -> list[TrialRecord]:
        """Add a point: pending trials of it, one per repeat."""
        first = TrialRecord(
            number=self._next_number,
            point_id=self._next_number,
            control_of=control_of,
            point=dict(point),
            params=dict(params or {}),
        )
        self._write(first)
        return self.complete_repeats(first.number, repeats)

    def complete_repeats(self, point_id: int, repeats: int) -> list[TrialRecord]:
        """Return a point's trials, after adding missing repeats (as after a kill between two) as pending."""
        trials = [record for record in self if record.point_id == point_id]
        for repeat in sorted(set(range(repeats)) - {record.repeat for record in trials}):
            record = TrialRecord(
                number=self._next_number,
                point_id=point_id,
                repeat=repeat,
                control_of=trials[0].control_of,
                point=dict(trials[0].drawn),
                params=dict(trials[0].params),
            )
            self._write(record)
            trials.append(record)
        return trials

    def start(self, number: int) -> TrialRecord:
        """Mark a trial as running; a reason from an earlier start is dropped."""
        return self._change(number, status="running", reason=None)

    def mark_pending(self, number: int) -> TrialRecord:
        """Mark a trial as pending again, because its process is gone or because it shall be run again."""
        return self._change(number, status="pending", reason=None)

    def update(self, number: int, report: TrialReport) -> TrialRecord:
        """Record a running trial's latest report."""
        return self._change(number, **report.fields)

    def finish(self, number: int, report: TrialReport) -> TrialRecord:
        """Mark a trial as run to its last step."""
        return self._change(number, status="finished", **report.fields)

    def stop(self, number: int, report: TrialReport) -> TrialRecord:
        """Mark a trial as ended before its last step by the scheduler or a stopping rule."""
        return self._change(number, status="stopped", **report.fields)

    def fail(self, number: int, report: TrialReport, reason: str) -> TrialRecord:
        """Mark a trial as failed."""
        return self._change(number, status="failed", reason=reason, **report.fields)

    def note_reason(self, number: int, reason: str) -> TrialRecord:
        """Record the error that a trial raised; whether the trial has failed for good is not known yet."""
        return self._change(number, reason=reason)

    def change_point(self, number: int, point: Mapping[str, Any]) -> TrialRecord:
        """Replace the fields that a trial runs with; the fields that it was added with stay as `drawn`."""
        return self._change(number, point=dict(point))

    def set_control(self, number: int, control: Mapping[str, Any]) -> TrialRecord:
        """Record a point's matched control in its first trial."""
        return self._change(number, control=dict(control))

    def set_mlflow_run(self, number: int, run_id: str) -> TrialRecord:
        """Record a trial's MLflow run."""
        return self._change(number, mlflow_run=run_id)

    def report_end(self, number: int, *, seconds: float) -> TrialRecord:
        """Add the wall time of a start, and record whether MLflow has the trial's end."""
        record = self._records[number]
        return self._change(number, seconds=record.seconds + seconds, end_reported=record.ended)

    def show_step(self, number: int, step: int) -> None:
        """Set a running trial's step for the live table, in memory only: its next report writes it."""
        self._records[number].step = step

    @property
    def _next_number(self) -> int:
        return max(self._records, default=0) + 1

    def _change(self, number: int, **fields: Any) -> TrialRecord:
        record = self._records[number]
        for name, value in fields.items():
            setattr(record, name, value)
        self._write(record)
        return record

    def _write(self, record: TrialRecord) -> None:
        self._records[record.number] = record
        replace_text(self.trial_folder(record) / TRIAL_FILE, dump_record(record, version=VERSION))

    def trial_folder(self, record: TrialRecord) -> Path:
        """Return the trial's own folder, which has its metrics, checkpoints and record."""
        return self.folder / record.name

    def group_by_point(self) -> dict[int, list[TrialRecord]]:
        """Group the trials by point: repeats together, controls as points of their own."""
        grouped: dict[int, list[TrialRecord]] = {}
        for record in self:
            grouped.setdefault(record.point_id, []).append(record)
        return grouped


def read_trial(folder: Path) -> TrialRecord:
    """Read the record in a trial's folder.

    Raises:
        UsageError: the record is damaged, or a newer polyref wrote it.
    """
    path = folder / TRIAL_FILE
    try:
        return load_record(TrialRecord, read_regular_file(path), version=VERSION, convert=_convert_fields)
    except (RecordError, OSError) as error:
        raise UsageError(
            f"{path}: is not a trial's record that can be read: {error}. Give the search another name, or "
            "start over with --fresh"
        ) from None


def _convert_fields(version: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a record, of version 1 too, to those of TrialRecord."""
    if version == 1:
        fields["end_reported"] = fields.pop("told", False)
    return fields
