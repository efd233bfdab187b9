"""A search's journal: one JSON file per trial, replaced in one move, so that a kill loses nothing.

It is the whole state of a search. Ray Tune's own is thrown away at every start: what a trial was asked,
what came of it and where it lies is read back from here.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import UsageError

TRIAL = "trial.json"

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
        self.write(first)
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
            self.write(record)
            there.append(record)
        return there

    @property
    def _next(self) -> int:
        return max(self._records, default=0) + 1

    def write(self, record: TrialRecord) -> None:
        """Keep a record, changed or new."""
        self._records[record.number] = record
        folder = self.trial_folder(record)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{TRIAL}"  # one process writes the journal, so that a kill leaves one at most
        temporary.write_text(json.dumps(asdict(record), indent=1))
        temporary.replace(folder / TRIAL)

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
        return TrialRecord(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: is not a trial's record ({error}); start over with --fresh") from None
