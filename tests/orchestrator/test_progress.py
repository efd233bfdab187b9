"""What a person sees while a command runs: bars that fit a terminal, lines in a log, honest rates."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.tracking.activity import ActivityFile, read_activity
from orchestrator.tracking.follow import TrainingState, follow_steps
from orchestrator.tracking.progress import ProgressMeter, RowCounter
from orchestrator.tracking.progress_lines import (
    RESPONSES,
    ROWS,
    Task,
    Unit,
    count_steps,
    cut_middle,
    format_bars,
    format_duration,
    format_log_line,
    format_rate,
)
from orchestrator.tracking.rates import WINDOW_S, RecentRate

ROOT = Path(__file__).parents[2]
SAMPLES, MEGABYTES = Unit("samples", "samples/s"), Unit("MB", "MB/s")
LONG = "scoring train, HuggingFaceTB-SmolLM2-1.7B-Instruct-of-the-lab"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def task_of(
    name: str, unit: Unit, reports: Sequence[tuple[float, float]], total: float | None, **fields: Any
) -> Task:
    """A task that began at time 0 and has made these reports (time, done)."""
    task = Task(name, unit, 0.0, **fields)
    for now, done in reports:
        task.report(done, total, now)
    return task


# ------------------------------------------------------------ rates


def test_what_was_done_before_is_in_no_rate() -> None:
    task = task_of("scoring", RESPONSES, [(0, 90_000), (10, 90_050), (20, 90_100)], 100_000)
    assert task.compute_rate(20) == pytest.approx(5)
    assert task.compute_remaining_seconds(20) == pytest.approx(9_900 / 5)


def test_a_rate_is_of_the_last_minute() -> None:
    reports = [(float(t), 100.0 * t) for t in range(100)]
    reports += [(100.0 + t, 10_000.0 + t) for t in range(int(2 * WINDOW_S))]
    assert task_of("t", ROWS, reports, None).compute_rate(100 + 2 * WINDOW_S) == pytest.approx(1, rel=0.02)


def test_slow_reports_have_a_rate_too_and_a_standstill_lowers_it() -> None:
    task = task_of("training", count_steps(8), [(0, 0), (100, 1), (200, 2)], 10)
    assert task.compute_rate(200) == task.compute_rate(290) == pytest.approx(0.01)
    assert task.compute_rate(1200) == pytest.approx(1 / 1000)


def test_no_eta_before_there_is_something_to_go_by() -> None:
    for reports in ([(0, 0)], [(0, 50)], [(0, 0), (1, 40)]):
        task = task_of("t", ROWS, reports, 100)
        assert task.compute_remaining_seconds(1) is None
        assert "ETA" not in format_log_line(task, 1)
        assert "ETA" not in format_bars([task], 1, 80)[0]
    assert task_of("t", ROWS, [(0, 0), (5, 40)], None).compute_remaining_seconds(5) is None


def test_a_task_that_waits_is_measured_from_when_it_begins() -> None:
    task = Task("training", count_steps(8), 0.0)
    for now in (0, 60, 120):
        task.report(75, 100, now, waits=True)
    for now, step in ((121, 61), (123, 63), (125, 65)):  # a checkpoint was before the last step
        task.report(step, 100, now)
    assert task.compute_rate(125) == pytest.approx(1)
    assert task.compute_mean_rate() == pytest.approx(1)
    assert format_log_line(task, 125) == "training: 65/100 steps (65 %), 8.00 pairs/s, 2:05 elapsed, ETA 0:35"


def test_many_reports_take_no_memory() -> None:
    rate = RecentRate()
    for number in range(10_000):
        rate.observe(number, number / 100)
    assert len(rate._samples) < 2 * WINDOW_S
    assert rate.compute(100) == pytest.approx(100, rel=0.05)


# ------------------------------------------------------------ lines


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3_600, "1:00:00"), (90_061, "1 d 1:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (12_345, "12,345 rows/s"),
        (12.0, "12.0 rows/s"),
        (1.5, "1.50 rows/s"),
        (0.01234, "0.012 rows/s"),
    ],
)
def test_rates(rate: float, text: str) -> None:
    assert format_rate(rate, ROWS) == text


def test_long_names_lose_their_middle() -> None:
    assert cut_middle("abcdefghij", 10) == "abcdefghij"
    assert cut_middle("abcdefghij", 6) == "abc…ij"
    assert cut_middle("abcdefghij", 1) == "…"


NOTES = ["loss 0.6931", "margin 0.1234", "accuracy 0.625 @1000", "stall 12 %"]
TRAINING = {"notes": NOTES, "notes_below": True}
SCORING = {"notes": ["92 % from store", "queue 14"]}
BUSY = [
    task_of("training", count_steps(64), [(0, 500), (7200, 1250)], 12_500, **TRAINING),
    task_of(LONG, RESPONSES, [(0, 100_000), (7200, 1_234_567)], 2_000_000, **SCORING),
    task_of("sampling @1000", SAMPLES, [(0, 0), (7200, 64)], 512),
    task_of("uploading export", MEGABYTES, [(0, 0), (7200, 12_345)], 70_000),
]


@pytest.mark.parametrize("width", [*range(1, 80, 13), 80, 100, 119, 120, 200])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_no_line_is_wider_than_the_terminal(width: int, ascii_only: bool) -> None:
    for tasks in ([], *([task] for task in BUSY), BUSY):
        lines = format_bars(tasks, 7200, width, ascii_only=ascii_only)
        assert max(map(len, lines), default=0) <= width
        assert not ascii_only or width < 14 or "".join(lines).replace("…", "").isascii()


@pytest.mark.parametrize("task", BUSY, ids=lambda task: task.name)
def test_eighty_columns_show_everything_and_more_columns_a_longer_bar(task: Task) -> None:
    texts = {width: "\n".join(format_bars([task], 7200, width)) for width in (80, 120)}
    bars = {}
    for width, text in texts.items():
        assert "2:00:00" in text
        assert re.search(r" ETA (1 d )?\d+:\d\d:\d\d", text)
        assert f" {task.unit.rate_name}" in text
        assert f"{task.done:,.0f}/{task.total:,.0f}" in text
        assert all(note in text for note in task.notes)
        bars[width] = text.count("━") + text.count("─")
    assert bars[80] >= 5
    # At 120 columns a task's notes may have taken the room on the bar's line.
    assert bars[120] > bars[80] or task.name == LONG


def test_the_lines_of_a_training() -> None:
    task = task_of("training", count_steps(8), [(0, 0), (10, 20)], 100, **TRAINING)
    assert format_bars([task], 10, 80) == [
        "training  ━━━━────────────────────  20/100 steps   16.0 pairs/s  0:10   ETA 0:40",
        "  loss 0.6931  margin 0.1234  accuracy 0.625 @1000  stall 12 %",
    ]


def test_several_tasks_are_aligned() -> None:
    lines = format_bars(BUSY[2:], 7200, 80)
    assert len({len(line) for line in lines}) == 1
    assert lines[0].index("─") == lines[1].index("━")


# ------------------------------------------------------------ a log


def test_a_log_gets_lines_after_seconds_then_every_20_s_then_every_minute() -> None:
    clock, out = Clock(), io.StringIO()
    with ProgressMeter(Console(file=out, width=200), RESPONSES, "scoring train, ", clock) as meter:
        lines_at = []
        for second in range(301):
            clock.now = 1000.0 + second
            before = len(out.getvalue().splitlines())
            meter.update("base", 1_000 + 10 * second, 5_000, ["20 % from store", "queue 14"])
            if len(out.getvalue().splitlines()) > before:
                lines_at.append(second)
    assert lines_at == [5, 25, 45, 65, 85, 105, 125, 185, 245]
    lines = out.getvalue().splitlines()
    assert lines[0] == (
        "scoring train, base: 1,050/5,000 responses (21 %), 10.0 responses/s, 0:05 elapsed, ETA 6:35, "
        "20 % from store, queue 14"
    )
    assert lines[-1] == (
        "scoring train, base: 4,000/5,000 responses (80 %) in 5:00, 10.0 responses/s, "
        "20 % from store, queue 14"
    )


def test_the_last_line_comes_at_once_after_an_error_too() -> None:
    clock, out = Clock(), io.StringIO()

    def read() -> None:
        with ProgressMeter(Console(file=out), ROWS, clock=clock) as meter:
            meter.update("reading", 3, 9)
            clock.now += 0.25
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        read()
    assert out.getvalue() == "reading: 3/9 rows (33 %) in 0.2 s\n"


def test_rows_of_unknown_number_are_counted_source_by_source() -> None:
    clock, out = Clock(), io.StringIO()
    with RowCounter(Console(file=out, width=200), "tokenising", clock) as counter:
        counter.update("small", 1024)
        for second in range(0, 31, 2):
            clock.now = 1000.0 + second
            counter.update("large", 1024 * (1 + second))
    assert out.getvalue().splitlines() == [
        "tokenising large: 7,168 rows, 1,024 rows/s, 0:06 elapsed",
        "tokenising large: 27,648 rows, 1,024 rows/s, 0:26 elapsed",
        "tokenising large: 31,744 rows in 0:30, 1,024 rows/s",
    ]


# ------------------------------------------------------------ a run's training


def line_of(step: int, **metrics: Any) -> dict[str, Any]:
    return {"step": step, "time": 100.5 + step, **metrics}


def step_of(step: int) -> dict[str, Any]:
    perf = {"perf/pairs_per_second": 16.0, "perf/reference_stall": 0.1}
    return {"step": step, "time": 100.0 + step, "loss": 0.5, "rewards/margins": 0.25} | perf


def test_the_notes_of_a_training_say_of_which_step_the_evaluation_is() -> None:
    state = TrainingState([], pairs_per_step=8)
    assert state.list_notes() == ["waiting for the first step"]
    told = state.add_line(
        line_of(0, **{"eval/accuracy": 0.5, "eval/loss": 0.6931, "eval/rewards/margins": 0.0})
    )
    assert told == "evaluation at step 0: accuracy 0.5, loss 0.6931, margin 0"
    for step in range(1, 4):
        assert state.add_line(step_of(step)) is None
    assert state.step == 3
    assert state.list_notes() == ["loss 0.5", "margin 0.25", "accuracy 0.5 @0", "stall 20 %"]
    state.add_line(line_of(3, **{"eval/accuracy": 0.75}))
    assert state.list_notes()[2] == "accuracy 0.75 @3"


def test_supervised_training_shows_the_loss_of_its_evaluations() -> None:
    state = TrainingState([], pairs_per_step=8)
    state.add_line({"step": 1, "time": 101.0, "loss": 2.0})
    state.add_line(line_of(1, **{"eval/loss": 1.5, "eval/accuracy": None}))
    assert state.list_notes() == ["loss 2", "eval loss 1.5 @1"]


def test_a_resumed_training_tells_no_earlier_line_again() -> None:
    earlier = [step_of(1), line_of(1, **{"eval/accuracy": 0.5}), step_of(2), step_of(3)]
    state = TrainingState(earlier, pairs_per_step=8)
    assert (state.step, state.is_training) == (3, False)
    for line in earlier[:3]:  # the file was cut after the checkpoint of step 2, and is read again
        assert state.add_line(line) is None
    assert not state.is_training
    state.add_line(step_of(3) | {"time": 200.0})
    assert (state.step, state.is_training) == (3, True)
    assert state.add_line(line_of(3, **{"eval/accuracy": 0.6}) | {"time": 201.0}) is not None


def test_activities_between_steps_have_their_own_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    left_behind, told, out = ActivityFile(tmp_path), ActivityFile(tmp_path), io.StringIO()
    left_behind.report("sampling @0", "samples", 8, 64)
    console = Console(file=out, width=80, force_terminal=True)
    with follow_steps(tmp_path, 4, 8, console):
        time.sleep(0.6)
        assert "sampling" not in out.getvalue(), "a worker that was killed does nothing"
        told.report("evaluating @2", "pairs", 16, 64)
        wait_until(lambda: "evaluating @2" in out.getvalue())
        told.end()
        told.report("sampling @2", "samples", 8, 32)
        wait_until(lambda: "sampling @2" in out.getvalue())
        told.end()
        assert read_activity(tmp_path) is None
    bars = [line for line in read_screen(out.getvalue()) if " @2 " in line]
    assert any(re.match(r"evaluating @2 .* 16/64 ", line) for line in bars)
    assert any(re.match(r"sampling @2 .* 8/32 ", line) for line in bars)
    ActivityFile(None).report("sampling @2", "samples", 8, 32)
    assert list(tmp_path.iterdir()) == []


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_log_of_a_training_has_evaluations_and_a_last_line(tmp_path: Path) -> None:
    metrics, out = tmp_path / "metrics.jsonl", io.StringIO()
    metrics.write_text(
        json.dumps(step_of(1)) + "\n" + json.dumps(line_of(1, **{"eval/accuracy": 0.5})) + "\n"
    )
    with follow_steps(tmp_path, 4, 8, Console(file=out, width=200)), metrics.open("a") as file:
        for step in (2, 3):
            file.write(json.dumps(step_of(step)) + "\n")
        file.write(json.dumps(line_of(3, **{"eval/accuracy": 0.75})) + "\n")
    evaluation, last = out.getvalue().splitlines()
    assert evaluation == "evaluation at step 3: accuracy 0.75"
    assert re.fullmatch(
        r"training: 3/4 steps \(75 %\) in 0\.\d s, loss 0\.5, margin 0\.25, accuracy 0\.75 @3, stall 20 %",
        last,
    )


# ------------------------------------------------------------ terminals


@pytest.mark.parametrize("width", [80, 120])
def test_bars_are_drawn_within_the_terminal_and_leave_their_last_line(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, soft_wrap=True, highlight=False)
    with ProgressMeter(console, RESPONSES, "scoring train, ", clock) as meter:
        for second in range(10):
            clock.now = 1000.0 + second
            for name in ("base", "HuggingFaceTB-SmolLM2-1.7B-Instruct-of-the-lab"):
                meter.update(name, 1_000 + 10 * second, 5_000, ["20 % from store", "queue 14"])
        meter._live.refresh()
        drawn, end = read_screen(out.getvalue()), len(out.getvalue())
    assert max(map(len, drawn)) <= width
    assert any("ETA" in line and "━" in line and "responses/s" in line for line in drawn)
    left = [line for line in read_screen(out.getvalue()[end:]) if " ETA " not in line]
    assert max(map(len, left)) <= width
    counts = "1,090/5,000 responses (21 %) in 9.0 s, 10.0 responses/s"
    notes = "20 % from store, queue 14"
    if width == 80:
        assert left[-4:] == [
            f"scoring train, base: {counts}",
            f"  {notes}",
            f"scoring train…f-the-lab: {counts}",
            f"  {notes}",
        ]
    else:
        assert left[-3] == f"scoring train, base: {counts}, {notes}"


def test_a_terminal_that_cannot_draw_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    clock, out = Clock(), io.StringIO()
    with ProgressMeter(Console(file=out, force_terminal=True, width=80), ROWS, clock=clock) as meter:
        for second in (0, 6):
            clock.now = 1000.0 + second
            meter.update("reading", 10 + second, 100)
    assert out.getvalue().splitlines() == [
        "reading: 16/100 rows (16 %), 1.00 rows/s, 0:06 elapsed, ETA 1:24",
        "reading: 16/100 rows (16 %) in 6.0 s, 1.00 rows/s",
    ]


def read_screen(text: str) -> list[str]:
    """The lines of a terminal's output without its control sequences."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_a_command_on_a_terminal_draws_a_bar_of_what_it_reads(tmp_path: Path) -> None:
    row = {"prompt": "Film 1 is ", "chosen": "good.", "rejected": "bad!"}
    data = tmp_path / "pairs.jsonl"
    data.write_text((json.dumps(row) + "\n") * 3_000)
    out = run_on_terminal([sys.executable, "-m", "orchestrator", "data", "show", str(data)], columns=80)
    bars = [line for line in read_screen(out) if line.startswith("reading ")]
    assert bars, out
    assert all(re.match(r"reading \S+ .* rows .* \d:\d\d$", line) for line in bars), bars
    assert max(map(len, bars)) <= 80
    assert "3,000 pairs of 3,000 rows" in out


def run_on_terminal(command: list[str], *, columns: int) -> str:
    """Run a command on a terminal of its own and return all that it writes there."""
    main, side = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(main, 65_536)
            except OSError:  # the other side is closed
                return
            chunks.append(chunk)

    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(120) == 0
    reader.join(10)
    os.close(main)
    return b"".join(chunks).decode()
