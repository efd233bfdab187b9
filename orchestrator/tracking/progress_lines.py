"""The text of progress: a bar's line for a terminal of any width, and plain lines for a log."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.tracking.rates import RecentRate

NOTES_BESIDE_WIDTH = 120
"""Columns from which a task's notes have room beside its bar; else they are on a line below it."""
FIRST_LINE_S, EARLY_LINES_S, LATE_LINES_S = 5.0, 20.0, 60.0
"""When a log gets its first line of a task, and the time between its lines in the first minutes and later."""
EARLY_S = 120.0

_GAP = "  "
_LEAST_BAR, _MOST_BAR = 5, 60
_LEAST_NAME = 10
_BARS = {False: ("━", "─"), True: ("#", "-")}
_DROPPED = ((), ("bar",), ("bar", "elapsed"), ("bar", "elapsed", "rate"))
"""Columns that are left out, the first choice that fits: narrow terminals lose bars first."""


@dataclass(frozen=True)
class Unit:
    """What a task counts, and what its rate is measured in: `rate_scale` of `rate_name` per counted item."""

    name: str
    rate_name: str
    rate_scale: float = 1.0


RESPONSES = Unit("responses", "responses/s")
ROWS = Unit("rows", "rows/s")


def count_steps(pairs_per_step: int) -> Unit:
    """Return the unit of training: optimizer steps, at a rate of pairs."""
    return Unit("steps", "pairs/s", pairs_per_step)


@dataclass
class Task:
    """The progress of a task. Times are seconds of one clock.

    Attributes:
        name: shown before the count.
        unit: what is counted.
        started_at: when the task began.
        done: items that are done.
        total: items in all; None if that is not known.
        notes: what else is shown, in short parts.
        notes_below: whether a terminal of any width has the notes on a line of their own.
    """

    name: str
    unit: Unit
    started_at: float
    done: float = 0
    total: float | None = None
    notes: Sequence[str] = ()
    notes_below: bool = False
    _recent: RecentRate = field(default_factory=RecentRate)
    _worked_from: tuple[float, float] | None = None
    _reported_at: float = 0.0

    def report(self, done: float, total: float | None, now: float, *, waits: bool = False) -> None:
        """Note what is done at time `now`; while the task waits to begin, no rate is measured."""
        if self._worked_from is None or done < self.done:
            self._worked_from = (now, done)
        self.done, self.total, self._reported_at = done, total, now
        if waits:
            self._recent.clear()
            self._worked_from = None
        else:
            self._recent.observe(done, now)

    @property
    def is_complete(self) -> bool:
        """Whether all items are done; never where their number is not known."""
        return self.total is not None and self.done >= self.total

    def compute_rate(self, now: float) -> float | None:
        """Return the recent items per second."""
        return self._recent.compute(now)

    def compute_remaining_seconds(self, now: float) -> float | None:
        """Return the seconds left at the recent rate; None while there is no rate, or no known end."""
        rate = self.compute_rate(now)
        return None if self.total is None or not rate else max(self.total - self.done, 0) / rate

    def compute_mean_rate(self) -> float | None:
        """Return the items per second of all that was done here; None if that took no time."""
        if self._worked_from is None:
            return None
        began, first = self._worked_from
        seconds, done = self._reported_at - began, self.done - first
        return done / seconds if seconds > 0 and done > 0 else None


def format_duration(seconds: float) -> str:
    """Return `m:ss`, `h:mm:ss` or `d d h:mm:ss`."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not days and not hours:
        return f"{minutes}:{rest:02}"
    return f"{f'{days} d ' if days else ''}{hours}:{minutes:02}:{rest:02}"


def format_rate(rate: float | None, unit: Unit) -> str:
    """Return a rate with two digits or more and its unit; nothing where there is none."""
    if rate is None:
        return ""
    value = rate * unit.rate_scale
    # Digits do not come and go while a rate changes a little.
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    text = f"{value:,.{decimals}f}" if value >= 1 else f"{value:.2g}"
    return f"{text} {unit.rate_name}"


def cut_middle(text: str, width: int) -> str:
    """Return `text` in at most `width` columns; a longer one loses its middle."""
    if len(text) <= width:
        return text
    if width < 1:
        return ""
    head = width * 3 // 5  # what is done comes first, and matters more than the end of a model's name
    tail = width - head - 1
    return f"{text[:head]}…{text[len(text) - tail :]}"


def _format_count(task: Task) -> str:
    done = f"{task.done:,.0f}"
    if task.total is None:
        return f"{done} {task.unit.name}"
    count = f"{done}/{task.total:,.0f}"
    # A rate names what is counted, unless it tells something else.
    return count if task.unit.rate_name == f"{task.unit.name}/s" else f"{count} {task.unit.name}"


# ---- bars ----


def format_bars(tasks: Sequence[Task], now: float, width: int, *, ascii_only: bool = False) -> list[str]:
    """Return the lines of tasks for a terminal of `width` columns: bar, count, rate, elapsed, ETA, notes.

    No line is wider than that. Columns of several tasks are aligned. Names that are too long lose their
    middle.
    """
    beside = width >= NOTES_BESIDE_WIDTH
    columns = {
        "count": [_format_count(task) for task in tasks],
        "rate": [format_rate(task.compute_rate(now), task.unit) for task in tasks],
        "elapsed": [format_duration(now - task.started_at) for task in tasks],
        "eta": [_format_eta(task, now) for task in tasks],
        "notes": [", ".join(task.notes) if beside and not task.notes_below else "" for task in tasks],
    }
    # Room for a rate and an ETA from the start: the bar need not shrink when they come.
    longest_unit = max((len(task.unit.rate_name) for task in tasks), default=0)
    least = {"rate": len("1,234 ") + longest_unit, "eta": len("ETA 00:00")}
    widths = {name: max([*map(len, texts), least.get(name, 0)]) for name, texts in columns.items()}
    names = max((len(task.name) for task in tasks), default=0)
    name_width, bar_width = 0, 0
    has_bars = any(task.total is not None for task in tasks)
    for dropped in _DROPPED if has_bars else _DROPPED[1:]:
        kept = [name for name, size in widths.items() if size and name not in dropped]
        room = width - sum(widths[name] + len(_GAP) for name in kept)
        bar = 0 if "bar" in dropped else _LEAST_BAR + len(_GAP)
        name_width = min(names, max(_LEAST_NAME, room * 2 // 3) if bar else room, room - bar)
        if name_width >= min(names, _LEAST_NAME):
            bar_width = min(room - name_width - len(_GAP), _MOST_BAR) if bar else 0
            break
    lines = []
    for index, task in enumerate(tasks):
        cells = [cut_middle(task.name, max(name_width, 0)).ljust(name_width)]
        if bar_width:
            cells.append(_format_bar(task, bar_width, ascii_only))
        for name in kept:
            text = columns[name][index]
            cells.append(text.ljust(widths[name]) if name == "notes" else text.rjust(widths[name]))
        lines.append(_GAP.join(cells).rstrip()[:width])
        if task.notes and (task.notes_below or not beside):
            lines.append(f"{_GAP}{_GAP.join(task.notes)}"[:width])
    return lines


def _format_eta(task: Task, now: float) -> str:
    remaining = task.compute_remaining_seconds(now)
    return "" if remaining is None else f"ETA {format_duration(remaining)}"


def _format_bar(task: Task, width: int, ascii_only: bool) -> str:
    if task.total is None:
        return " " * width
    full, empty = _BARS[ascii_only]
    filled = int(width * min(task.done / task.total, 1)) if task.total else width
    return full * filled + empty * (width - filled)


# ---- plain lines ----


def find_next_line_time(elapsed: float) -> float:
    """Return the age of a task, in seconds, at which its next line is due after one at age `elapsed`."""
    return elapsed + (EARLY_LINES_S if elapsed < EARLY_S else LATE_LINES_S)


def format_log_line(task: Task, now: float) -> str:
    """Return a task's line in a log: count, per cent, rate, elapsed, ETA, notes."""
    parts = [
        _format_counted(task),
        format_rate(task.compute_rate(now), task.unit),
        f"{format_duration(now - task.started_at)} elapsed",
        _format_eta(task, now),
        *task.notes,
    ]
    return f"{task.name}: {', '.join(filter(None, parts))}"


def format_last_lines(task: Task, now: float, width: int | None = None) -> list[str]:
    """Return a task's end: count, per cent, total time, mean rate, notes.

    It is one line, but where a terminal of `width` columns has no room for the notes beside the others.
    """
    seconds = now - task.started_at
    duration = f"{seconds:.1f} s" if seconds < 10 else format_duration(seconds)
    parts = [f"{_format_counted(task)} in {duration}", format_rate(task.compute_mean_rate(), task.unit)]
    text, notes = ", ".join(filter(None, parts)), ", ".join(task.notes)
    line = f"{task.name}: {text}{f', {notes}' if notes else ''}"
    if width is None or len(line) <= width:
        return [line]
    name = cut_middle(task.name, max(width - len(text) - 2, _LEAST_NAME))
    return [f"{name}: {text}"[:width], *([f"{_GAP}{notes}"[:width]] if notes else [])]


def _format_counted(task: Task) -> str:
    if task.total is None:
        return _format_count(task)
    share = int(100 * task.done / task.total) if task.total else 100
    return f"{task.done:,.0f}/{task.total:,.0f} {task.unit.name} ({share} %)"
