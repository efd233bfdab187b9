"""Settings, tags and metrics of a run in MLflow: one MLflow run per training run, restarts included.

`metrics.jsonl` in the run's folder is the record; a background thread sends it to MLflow. The training loop
only appends a line to a file, so a server that is down for an hour costs neither a step nor a metric: the
thread resumes where the server stopped answering. The position is not stored in a file, since MLflow knows
the last step that it has of every metric: after a restart, points up to that step are not sent again. A
resumed run first removes the steps after its checkpoint from `metrics.jsonl`; it repeats those steps exactly,
so the values that MLflow already has for them stay correct.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UsageError
from orchestrator.files import replace_text
from orchestrator.redaction import redact, summarize_error
from orchestrator.tracking.data_inputs import TrackedData, build_dataset_inputs
from orchestrator.tracking.metrics_file import (
    FINDING,
    METRICS_FILE,
    SCALES_FILE,
    cut_metrics_after,
    drop_torn_line,
    parse_lines,
    read_scales,
)
from orchestrator.tracking.mlflow import (
    connect_to_mlflow,
    fail_fast,
    flatten_settings,
    get_or_create_experiment,
    log_settings,
    to_metric_key,
)
from orchestrator.tracking.origin import NOTE_TAG, cut_note, read_origin_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_MAX_SCALES = 20_000
_KEY_TAG = "polyref.key"
_METRICS_PER_BATCH = 1000  # MLflow's limit
_SEND_SECONDS, _MAX_BACKOFF_SECONDS = 1.0, 60.0


class Tracker:
    """Tracking of one training run: `metrics.jsonl` in `folder`, and an MLflow run.

    The driver creates it with `resume_or_start` and stores `run_id` in the run's record; the worker of rank 0
    creates its own with the constructor. Only `resume_or_start` raises if the server does not answer.
    """

    def __init__(self, uri: str, run_id: str, folder: Path, *, resume_step: int | None = None) -> None:
        """Open the run's `metrics.jsonl` and remove the metrics after `resume_step`.

        `resume_step` is the checkpoint's step, or -1 for a start from scratch; with None nothing is removed.
        """
        self.uri, self.run_id, self.folder = uri, run_id, folder
        self._path = folder / METRICS_FILE
        self._sender: _MetricSender | None = None
        self._scales: list[float] | None = None
        self._scales_written = 0
        self._misses_something = False
        folder.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            cut_metrics_after(self._path, resume_step)
        if resume_step == -1:
            (folder / SCALES_FILE).unlink(missing_ok=True)

    @classmethod
    def resume_or_start(
        cls,
        run_id: str | None,
        *,
        name: str,
        uri: str,
        folder: Path,
        experiment: str = "polyref",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
        key: str | None = None,
    ) -> "Tracker":
        """Reopen the run `run_id`, or start one if it is None or no longer on the server.

        `params` may be nested. MLflow parameters cannot change: a value that differs from the first start's
        is written to the tag `changed.<key>`. `parent` is the MLflow run that this one is nested under. A run
        that was started with the same `key` is reopened even if its id was not recorded.

        Raises UsageError if the server does not answer or the experiment was deleted.
        """
        client = connect_to_mlflow(uri)
        existing = _find_run(client, run_id)
        experiment_id = get_or_create_experiment(client, uri, experiment)
        if existing is None and key is not None:
            same_key = f"tags.`{_KEY_TAG}` = '{key}'"
            existing = next(iter(client.search_runs([experiment_id], same_key, max_results=1)), None)
        if existing is None:
            initial_tags = {"mlflow.parentRunId": parent} if parent else {}
            initial_tags |= {_KEY_TAG: key} if key else {}
            initial_tags |= read_origin_tags()
            run = client.create_run(experiment_id, run_name=name, tags=initial_tags)
            run_id, logged = run.info.run_id, {}
        else:
            run_id, logged = existing.info.run_id, existing.data.params
            client.update_run(run_id, status="RUNNING")
        flat = flatten_settings(params or {})
        changed = {f"changed.{key}": flat[key] for key in flat if key in logged and logged[key] != flat[key]}
        new = {key: value for key, value in flat.items() if key not in logged}
        log_settings(client, run_id, new, {**(tags or {}), **changed})
        return cls(uri, run_id, folder)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to `metrics.jsonl`, which is sent later; a value that is not finite becomes null."""
        values = {key: float(value) for key, value in metrics.items()}
        self._append_line(
            step, {key: value if math.isfinite(value) else None for key, value in values.items()}
        )

    def log_finding(self, step: int, name: str, message: str) -> None:
        """Append a finding of the numerical watch to `metrics.jsonl`; it is sent as tag `watch.<name>`."""
        self._append_line(step, {FINDING: name, "message": message})

    def _append_line(self, step: int, content: Mapping[str, Any]) -> None:
        line = {"step": step, "time": round(time.time(), 3), **content}
        if self._sender is None:
            self._sender = _MetricSender(self.uri, self.run_id, self._path)
        self._sender.append(json.dumps(line, allow_nan=False) + "\n")

    def log_scales(self, scales: Sequence[float]) -> None:
        """Add a step's dispersion scales, one per pair, to `dispersion.json`, up to 20,000 of the run.

        Pairs come in shuffled order, so the first ones are a random sample of all.
        """
        if self._scales is None:
            self._scales = read_scales(self.folder)
            self._scales_written = len(self._scales)
        room = _MAX_SCALES - len(self._scales)
        self._scales += [round(float(scale), 6) for scale in scales[: max(room, 0)]]
        if len(self._scales) >= 2 * self._scales_written + 100:  # few writes, for any number of steps
            self._write_scales()

    def _write_scales(self) -> None:
        if self._scales is not None and len(self._scales) > self._scales_written:
            replace_text(self.folder / SCALES_FILE, json.dumps(self._scales))
            self._scales_written = len(self._scales)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the MLflow run."""
        with self._warn_on_failure("tags"):
            log_settings(connect_to_mlflow(self.uri), self.run_id, {}, tags)

    def log_files(self, paths: Iterable[Path], under: str | None = None) -> None:
        """Copy files (plots, tables) to the MLflow run's artifacts, in their folder `under`."""
        with self._warn_on_failure("files"):
            client = connect_to_mlflow(self.uri)
            for path in paths:
                client.log_artifact(self.run_id, str(path), under)

    def describe(self, note: str, *, replaces: str | None = None) -> None:
        """Set the text that MLflow's page of the run shows, in Markdown.

        A description that is neither empty nor `replaces` is somebody's own, and stays.
        """
        with self._warn_on_failure("the description", is_needed=False):
            client = connect_to_mlflow(self.uri)
            with fail_fast():
                shown = client.get_run(self.run_id).data.tags.get(NOTE_TAG)
                if not shown or (replaces is not None and shown == cut_note(replaces)):
                    client.set_tag(self.run_id, NOTE_TAG, cut_note(note))

    def log_data(self, data: Sequence[TrackedData]) -> None:
        """Name the data on the run's page, once however often the run is resumed; no data is uploaded."""
        with self._warn_on_failure("the data sets", is_needed=False):
            client = connect_to_mlflow(self.uri)
            with fail_fast():
                logged = client.get_run(self.run_id).inputs
                if logged is None or not logged.dataset_inputs:
                    client.log_inputs(self.run_id, build_dataset_inputs(data))

    def catch_up(self) -> None:
        """Start to send the metrics that a killed process left unsent; `close` waits for it."""
        if self._sender is None and self._path.exists():
            self._sender = _MetricSender(self.uri, self.run_id, self._path)

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until MLflow has all logged metrics; return False if it has not within `timeout` seconds."""
        return self._sender is None or self._sender.flush(timeout)

    def close(self, timeout: float = 30.0) -> None:
        """Send the remaining metrics and stop the thread; unsent metrics are still in `metrics.jsonl`."""
        self._write_scales()
        if self._sender is not None and not self._sender.close(timeout):
            log.warning("MLflow at %s misses the last metrics; %s has them all", redact(self.uri), self._path)
            self._misses_something = True
        self._sender = None

    def finish(self, status: str = "FINISHED") -> bool:
        """Close, and set the MLflow run's final status: FINISHED, FAILED or KILLED.

        A run of which MLflow misses metrics, tags or files is not marked as FINISHED.

        Returns:
            Whether MLflow has all of these that this tracker was given.
        """
        self.close()
        if status == "FINISHED" and self._misses_something:
            return False
        with self._warn_on_failure("the run's end"):
            connect_to_mlflow(self.uri).set_terminated(self.run_id, status)
        return not self._misses_something

    @contextmanager
    def _warn_on_failure(self, content: str, *, is_needed: bool = True) -> Iterator[None]:
        """Warn if MLflow does not take some content; without what is needed, the run is not finished."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (UsageError, MlflowException, OSError) as error:
            self._misses_something |= is_needed
            log.warning("MLflow did not take %s of run %s: %s", content, self.run_id, summarize_error(error))


class _MetricSender:
    """A thread that sends `metrics.jsonl` to MLflow: the file is the queue, so memory use is bounded."""

    def __init__(self, uri: str, run_id: str, path: Path) -> None:
        self._uri, self._run_id, self._path = uri, run_id, path
        self._file = path.open("ab")
        drop_torn_line(path)
        self._changed = threading.Condition()
        self._written = path.stat().st_size
        self._sent = 0
        self._closing = False
        self._backoff = 0.0
        self._client: MlflowClient | None = None
        self._last_steps: dict[str, int] = {}  # the last step that MLflow has, by metric
        self._thread = threading.Thread(target=self._send_repeatedly, name="mlflow-metrics", daemon=True)
        self._thread.start()

    def append(self, line: str) -> None:
        data = line.encode()
        self._file.write(data)
        self._file.flush()
        with self._changed:
            self._written += len(data)

    def flush(self, timeout: float) -> bool:
        with self._changed:
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._sent >= self._written, timeout)

    def close(self, timeout: float) -> bool:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        self._file.close()
        return self._sent >= self._written

    def _send_repeatedly(self) -> None:
        while True:
            with self._changed:
                self._changed.wait(self._backoff or _SEND_SECONDS)
                closing, has_unsent = self._closing, self._sent < self._written
            if has_unsent:
                self._try_send()
            if closing:
                return

    def _try_send(self) -> None:
        try:
            if self._client is None:
                client = connect_to_mlflow(self._uri)
                self._last_steps = _find_last_steps(client, self._run_id)
                self._client = client
            self._send_batches()
            self._backoff = 0.0
        except Exception as error:  # no failure of the server may stop the training
            if not self._backoff:
                log.warning("MLflow takes no metrics (kept in %s): %s", self._path, summarize_error(error))
            self._backoff = min(max(2 * self._backoff, _SEND_SECONDS), _MAX_BACKOFF_SECONDS)

    def _send_batches(self) -> None:
        assert self._client is not None
        while self._sent < self._written:
            lines, end = self._read_next_lines()
            findings = {f"watch.{line[FINDING]}": line["message"] for line in lines if FINDING in line}
            if findings:
                log_settings(self._client, self._run_id, {}, findings)
            points = self._list_unsent_points([line for line in lines if FINDING not in line])
            for start in range(0, len(points), _METRICS_PER_BATCH):
                self._client.log_batch(self._run_id, metrics=points[start : start + _METRICS_PER_BATCH])
            self._last_steps |= {point.key: point.step for point in points}
            with self._changed:
                self._sent = end
                self._changed.notify_all()

    def _read_next_lines(self) -> tuple[list[dict[str, Any]], int]:
        """Read about one batch of lines after the last one sent; return them and the position after them."""
        lines, values = [], 0
        with self._path.open("rb") as file:
            file.seek(self._sent)
            while file.tell() < self._written and values < _METRICS_PER_BATCH:
                lines += parse_lines([file.readline()])
                values += len(lines[-1]) if lines else 0
            return lines, file.tell()

    def _list_unsent_points(self, lines: list[dict[str, Any]]) -> list[Any]:
        from mlflow.entities import Metric

        points = []
        for line in lines:
            step, stamp = int(line.pop("step")), int(1000 * line.pop("time", 0))
            for key, value in line.items():
                if step > self._last_steps.get(to_metric_key(key), -1):
                    points.append(
                        Metric(to_metric_key(key), math.nan if value is None else value, stamp, step)
                    )
        return points


def _find_last_steps(client: "MlflowClient", run_id: str) -> dict[str, int]:
    keys = client.get_run(run_id).data.metrics
    return {key: max(point.step for point in client.get_metric_history(run_id, key)) for key in keys}


def _find_run(client: "MlflowClient", run_id: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage != "active":
        log.warning("MLflow no longer has run %s: a new one is started", run_id)
        return None
    return run
