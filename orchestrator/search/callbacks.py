"""Watching a search: a live table or plain lines, child runs ended in MLflow, limits that end it."""

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
from orchestrator.search.trial import NUMBER
from orchestrator.tracking.metrics_file import METRICS_FILE, read_new_lines
from orchestrator.tracking.progress import LINE_EVERY_S
from orchestrator.tracking.tracker import Tracker

REFRESH_S = 1.0
_ENDS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


class ProgressCallback(Callback):
    """Tune's callback: tells the person and MLflow how the trials go.

    Args:
        trials: the journal, which the search keeps.
        search: told of fields that population based training changes.
        limits: told that trials run.
        objectives: what is shown of a trial.
        tracking_uri: where the trials' MLflow runs are.
        console: a table that moves on a terminal, else a line per event.
    """

    def __init__(
        self,
        trials: Journal,
        search: InterruptibleSearch,
        limits: "SearchLimits",
        objectives: Sequence[Objective],
        tracking_uri: str,
        console: Console,
    ) -> None:
        self._journal, self._search, self._objectives = trials, search, objectives
        self._limits = limits
        self._uri, self._console = tracking_uri, console
        self._started: dict[int, float] = {}
        self._read: dict[int, int] = {}
        self._live = (
            Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
        )
        self._shown = 0.0

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial begins, begins again after a crash, or goes on with other fields."""
        record = self._journal[trial.config[NUMBER]]
        self._started.setdefault(record.number, time.monotonic())
        point = {field: value for field, value in trial.config.items() if "." in field}
        if point != record.point:
            self._search.change_point(record.number, point)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """The reason, which the search does not get to see."""
        record = self._journal[trial.config[NUMBER]]
        error = trial.get_error()
        said = str(getattr(error, "cause", None) or error or "").strip()
        if said:
            self._journal.note_reason(record.number, said.splitlines()[-1])

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """After everything Tune did: whoever has ended since, and the table."""
        if any(trial.status == Trial.RUNNING for trial in trials):
            self._limits.note_running()
        self._finish_ended_trials()
        if time.monotonic() - self._shown >= (REFRESH_S if self._live else LINE_EVERY_S):
            self._show_progress()

    def close(self) -> None:
        """The table goes; runs of trials that did not come to an end are marked as killed."""
        if self._live is not None:
            self._live.stop()
        self._finish_ended_trials()
        for number in self._started:
            if not self._journal[number].end_reported:
                self._finish_trial(self._journal[number], "KILLED")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks, and we never read them back

    def _finish_ended_trials(self) -> None:
        for record in self._journal:
            if record.ended and not record.end_reported:
                self._finish_trial(record, _ENDS[record.status])
                if self._live is None:
                    self._console.print(self._format_trial_end(record))

    def _finish_trial(self, record: TrialRecord, status: str) -> None:
        started = self._started.get(record.number)
        seconds = 0.0 if started is None else time.monotonic() - started
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
        values = [
            f"{o.metric} {record.result[o.metric]:.4g}" for o in self._objectives if o.metric in record.result
        ]
        names = shorten_field_names(find_varied_fields(one.point for one in self._journal))
        about = describe_point(record.point, names)
        return f"trial {record.number} {record.status} at step {record.step}: {', '.join(values)} ({about})"

    def _show_progress(self) -> None:
        self._shown = time.monotonic()
        for number in self._started:  # between two evaluations too
            metrics = self._journal.trial_folder(self._journal[number]) / METRICS_FILE
            self._read[number], lines = read_new_lines(metrics, self._read.get(number, 0))
            if lines and self._journal[number].status == "running":
                self._journal.show_step(number, int(lines[-1]["step"]))
        if self._live is not None:
            self._live.start()
            self._live.update(build_live_table(list(self._journal), self._objectives), refresh=True)
            return
        running = [r for r in self._journal if r.status == "running"]
        told = ", ".join(f"{r.number} at step {r.step}" for r in running)
        ended = sum(r.ended for r in self._journal)
        self._console.print(f"{ended} trial(s) ended; running: {told or 'none'}")
