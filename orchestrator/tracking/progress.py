"""Progress of long tasks: bars on a terminal, plain lines in a job's log."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from orchestrator.tracking.progress_lines import (
    FIRST_LINE_S,
    ROWS,
    Task,
    Unit,
    find_next_line_time,
    format_bars,
    format_last_lines,
    format_log_line,
)

_DRAWS_PER_S = 4
_FREE_COLUMNS = 2
"""At the end of a bar's line, for the `^C` that a terminal writes there: a line that wraps is not removed."""


def make_plain_console() -> Console:
    """Return a console without decoration on standard output: its text can be copied and searched."""
    return Console(soft_wrap=True, highlight=False, markup=False)


class ProgressMeter:
    """Progress of named tasks on `console`. A context manager: leaving it prints each task's last line.

    Args:
        console: where bars are drawn while the tasks run if it is a terminal that can, else a line now and
            then is printed.
        unit: what the tasks count.
        prefix: put before each task's name.
        clock: returns seconds.
    """

    def __init__(
        self, console: Console, unit: Unit, prefix: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console
        self._unit, self._prefix, self._clock = unit, prefix, clock
        self._lock = threading.Lock()  # bars are drawn by a thread of their own
        self._tasks: dict[str, Task] = {}
        self._line_due_at: dict[str, float] = {}  # by name, the age at which a log gets the task's next line
        self._began_at = clock()
        self._live = Live(
            console=console, get_renderable=self._draw, refresh_per_second=_DRAWS_PER_S, transient=True
        )

    def __enter__(self) -> Self:
        self._began_at = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def age(self) -> float:
        """Seconds since the tasks began."""
        return self._clock() - self._began_at

    def close(self, *, last_lines: bool = True) -> None:
        """Remove the bars, and print each task's last line."""
        self._live.stop()
        tasks, self._tasks = list(self._tasks.values()), {}
        if last_lines:
            for task in tasks:
                self._print_last_lines(task)

    def begin(self, name: str, unit: Unit) -> None:
        """Add a task that begins now and counts another unit than the others."""
        with self._lock:
            self._tasks[name] = Task(self._prefix + name, unit, self._clock())
            self._line_due_at[name] = FIRST_LINE_S

    def end(self, name: str) -> None:
        """Remove a task before the others end; a log gets its last line if it took `FIRST_LINE_S` or more."""
        with self._lock:
            task = self._tasks.pop(name)
        if self._clock() - task.started_at >= FIRST_LINE_S and not self.console.is_interactive:
            self._print_last_lines(task)

    def update(
        self,
        name: str,
        done: float,
        total: float | None,
        notes: Sequence[str] = (),
        *,
        waits: bool = False,
        notes_below: bool = False,
    ) -> None:
        """Show that `done` of `total` items of a task are done, with `notes`; `total` may not be known.

        What the first call reports as done counts as done before, and is in no rate. With `waits` the task
        has not begun, and no rate is measured until a call without it.
        """
        now = self._clock()
        with self._lock:
            if name not in self._tasks:
                # Tasks of a meter run side by side: all began when it did.
                self._tasks[name] = Task(self._prefix + name, self._unit, self._began_at)
                self._line_due_at[name] = FIRST_LINE_S
            task = self._tasks[name]
            task.report(done, total, now, waits=waits)
            task.notes, task.notes_below = notes, notes_below
        if self.console.is_interactive:
            self._live.start()
        else:
            self.print_due_lines()

    def print_due_lines(self) -> None:
        """Print the lines that a log is due; tasks that are all done get theirs at the end."""
        now = self._clock()
        for name, task in self._tasks.items():
            age = now - task.started_at
            if age >= self._line_due_at[name] and not task.is_complete and not self.console.is_interactive:
                self._line_due_at[name] = find_next_line_time(age)
                self.console.print(format_log_line(task, now))

    def _print_last_lines(self, task: Task) -> None:
        width = self.console.width if self.console.is_interactive else None
        for line in format_last_lines(task, self._clock(), width):
            self.console.print(line)

    def _draw(self) -> Group:
        with self._lock:
            ascii_only = self.console.options.ascii_only
            width = max(self.console.width - _FREE_COLUMNS, 1)
            lines = format_bars(list(self._tasks.values()), self._clock(), width, ascii_only=ascii_only)
        texts = [Text(line, no_wrap=True, overflow="crop") for line in lines]
        for text in texts:
            text.highlight_regex("━+", "cyan")
            text.highlight_regex("─+", "bright_black")
        return Group(*texts)


class RowCounter:
    """Counts rows that are read, of one source after the other whose number of rows is not known.

    A context manager. A source that is read within `FIRST_LINE_S` leaves no line.

    Args:
        console: where progress is shown.
        verb: what is done to the rows, put before the source's name.
        clock: returns seconds.
    """

    def __init__(self, console: Console, verb: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._verb, self._clock = console, verb, clock
        self._source: str | None = None
        self._meter = self._open_meter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._meter.close(last_lines=self._meter.age >= FIRST_LINE_S)

    def update(self, source: str, rows: int) -> None:
        """Show how many rows of a source are read."""
        if source != self._source:
            self.__exit__()
            self._source, self._meter = source, self._open_meter()
        self._meter.update(source, rows, None)

    def _open_meter(self) -> ProgressMeter:
        return ProgressMeter(self._console, ROWS, f"{self._verb} ", self._clock)
