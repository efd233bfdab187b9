"""Show a search's progress, as a live table or plain lines, and end its trials' runs in MLflow."""

import time
from collections.abc import Sequence
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.console import Console
from rich.live import Live

from orchestrator.config.sweep import Objective
from orchestrator.search.journal import Journal, TrialRecord
from orchestrator.search.limits import InterruptibleSearch, SearchLimits
from orchestrator.search.report.labels import describe_point, find_varied_fields, shorten_field_names
from orchestrator.search.report.tables import build_live_table
from orchestrator.search.trial import NUMBER_KEY
from orchestrator.tracking.metrics_file import METRICS_FILE, read_new_lines
from orchestrator.tracking.tracker import Tracker

REFRESH_S, LINE_EVERY_S = 1.0, 20.0
"""How often the table is drawn on a terminal, and a line printed in a log."""
_MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
"""The status of a trial's MLflow run, by how the trial ended."""


class ProgressCallback(Callback):
    """Tune's callback: shows the trials' progress on the console and in MLflow.

    Args:
        journal: the search's trials; the search writes it.
        search: gets the fields that population based training changes.
        limits: gets notice that trials run.
        objectives: the metrics that are shown of a trial.
        tracking_uri: the MLflow server or file of the trials' runs.
        console: where a live table is shown if it is a terminal, else a line per event.
    """

    def __init__(
        self,
        journal: Journal,
        search: InterruptibleSearch,
        limits: SearchLimits,
        objectives: Sequence[Objective],
        tracking_uri: str,
        console: Console,
    ) -> None:
        self._journal, self._search, self._objectives = journal, search, objectives
        self._limits = limits
        self._uri, self._console = tracking_uri, console
        self._started_at: dict[int, float] = {}
        self._positions: dict[int, int] = {}  # up to which byte each trial's metrics file has been read
        self._live = (
            Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
        )
        self._last_shown_at = 0.0

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Note when a trial starts; record its fields if it restarts with others than before."""
        record = self._journal[trial.config[NUMBER_KEY]]
        self._started_at.setdefault(record.number, time.monotonic())
        point = {field: value for field, value in trial.config.items() if "." in field}
        if point != record.point:
            self._search.change_point(record.number, point)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the reason of a trial's error, which Tune does not pass to the searcher."""
        record = self._journal[trial.config[NUMBER_KEY]]
        error = trial.get_error()
        message = str(getattr(error, "cause", None) or error or "").strip()
        if message:
            self._journal.note_reason(record.number, message.splitlines()[-1])

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Finish the trials that have ended since the last step, and update the table."""
        if any(trial.status == Trial.RUNNING for trial in trials):
            self._limits.note_running()
        self._finish_ended_trials()
        if time.monotonic() - self._last_shown_at >= (REFRESH_S if self._live else LINE_EVERY_S):
            self._show_progress()

    def close(self) -> None:
        """Remove the table, and mark the MLflow runs of unfinished trials as killed."""
        if self._live is not None:
            self._live.stop()
        self._finish_ended_trials()
        for number in self._started_at:
            if not self._journal[number].end_reported:
                self._finish_trial(self._journal[number], "KILLED")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks, and they are never read back

    def _finish_ended_trials(self) -> None:
        for record in self._journal:
            if record.ended and not record.end_reported:
                self._finish_trial(record, _MLFLOW_STATUS[record.status])
                if self._live is None:
                    self._console.print(self._format_trial_end(record))

    def _finish_trial(self, record: TrialRecord, status: str) -> None:
        """End a trial's MLflow run with `status`, and record that in the journal."""
        started_at = self._started_at.get(record.number)
        seconds = 0.0 if started_at is None else time.monotonic() - started_at
        if record.mlflow_run is not None:
            tracker = Tracker(self._uri, record.mlflow_run, self._journal.trial_folder(record))
            reason = {"search.reason": record.reason} if record.reason else {}
            tracker.set_tags({"search.status": record.status} | reason)
            tracker.catch_up()
            tracker.finish(status)
        self._journal.report_end(record.number, seconds=seconds)

    def _format_trial_end(self, record: TrialRecord) -> str:
        if record.status == "failed":
            return f"trial {record.number} failed: {record.reason}"
        values = ", ".join(
            f"{objective.metric} {record.result[objective.metric]:.4g}"
            for objective in self._objectives
            if objective.metric in record.result
        )
        names = shorten_field_names(find_varied_fields(trial.point for trial in self._journal))
        point = describe_point(record.point, names)
        return f"trial {record.number} {record.status} at step {record.step}: {values} ({point})"

    def _show_progress(self) -> None:
        """Update the table or print a line; steps are read from the trials' metrics files."""
        self._last_shown_at = time.monotonic()
        for number in self._started_at:  # Tune has a trial's step only at its evaluations
            metrics = self._journal.trial_folder(self._journal[number]) / METRICS_FILE
            self._positions[number], lines = read_new_lines(metrics, self._positions.get(number, 0))
            if lines and self._journal[number].status == "running":
                self._journal.show_step(number, int(lines[-1]["step"]))
        if self._live is not None:
            self._live.start()
            self._live.update(build_live_table(list(self._journal), self._objectives), refresh=True)
            return
        running = ", ".join(
            f"{trial.number} at step {trial.step}" for trial in self._journal if trial.status == "running"
        )
        ended_count = sum(trial.ended for trial in self._journal)
        self._console.print(f"{ended_count} trial(s) ended; running: {running or 'none'}")
