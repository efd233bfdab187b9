"""Progress of long tasks: bars on a terminal, plain lines in a job's log."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from orchestrator.tracking.metrics_file import FINDING, METRICS_FILE, read_findings, read_new_lines

LINE_EVERY_S = 20.0
_SHOWN_METRICS = ("loss", "rewards/margins", "eval/accuracy", "grad_norm")


def make_plain_console() -> Console:
    """Return a console without decoration on standard output: its text can be copied and searched."""
    return Console(soft_wrap=True, highlight=False, markup=False)


class ProgressMeter:
    """Progress of named tasks on `console`, each with `prefix` before its name."""

    def __init__(self, console: Console, prefix: str = "") -> None:
        self.console, self._prefix = console, prefix
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}

    def __enter__(self) -> "ProgressMeter":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` items of a task are done, with `note` behind the count."""
        task = self._prefix + task
        if self.console.is_terminal:
            if task not in self._tasks:
                self._tasks[task] = self._bars.add_task(task, total=total, note=note)
            self._bars.update(self._tasks[task], completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if done >= total or now - self._last_line.get(task, float("-inf")) >= LINE_EVERY_S:
            self._last_line[task] = now
            self.console.print(f"{task}: {done}/{total} {note}".rstrip())


class RowCounter:
    """Counts rows that are read, of sources whose number of rows is not known, in lines on `console`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_line = time.monotonic()

    def update(self, source: str, rows: int) -> None:
        """Print how many rows of a source are read, if the last line is some seconds old."""
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self._console.print(f"reading {source}: {rows:,} rows")


@contextlib.contextmanager
def follow_steps(folder: Path, total: int, console: Console) -> Iterator[None]:
    """Inside the block, show the steps and findings that a run's workers write to its metrics file.

    Findings that an earlier start has written are not shown again.
    """
    stop, shown = threading.Event(), set(read_findings(folder).values())
    thread = threading.Thread(
        target=_follow_metrics,
        args=(folder / METRICS_FILE, total, console, stop, shown),
        name="progress",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow_metrics(
    path: Path, total: int, console: Console, stop: threading.Event, shown_findings: set[str]
) -> None:
    latest: dict[str, float] = {}
    position, shown = 0, -1
    with ProgressMeter(console) as meter:
        while True:
            ended = stop.wait(0.5)
            position, lines = read_new_lines(path, position)
            for line in lines:
                if FINDING in line and line["message"] not in shown_findings:
                    shown_findings.add(line["message"])
                    console.print(f"watch: {line['message']}")
                latest |= {
                    name: line[name] for name in ("step", *_SHOWN_METRICS) if line.get(name) is not None
                }
            step = int(latest.get("step", -1))
            if step != shown:
                note = "  ".join(f"{name} {latest[name]:.4g}" for name in _SHOWN_METRICS if name in latest)
                meter.update("training", step, total, note)
                shown = step
            if ended:
                return
