"""Commands that are killed, stopped or started twice: the same command resumes, and nothing is lost."""

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
from safetensors.torch import load_file, save_file

from tests.support.driver import Driver
from tests.support.faults import (
    SAVE_EVERY,
    STEPS,
    assert_nothing_left,
    assert_same_outcome,
    find_saved_step,
    find_step,
    list_steps,
)

Start = Callable[..., Driver]
Report = Callable[..., None]


def test_the_command_is_killed(whole: Path, place: Path, start_command: Start, report: Report) -> None:
    folder = place / "runs" / "killed"
    first = start_command("killed")
    first.until(lambda: 0 < find_saved_step(folder) < find_step(folder))
    first.kill()
    saved = find_saved_step(folder)
    times = {line["step"]: line["time"] for line in list_steps(folder)}
    assert SAVE_EVERY <= saved < STEPS

    second = start_command("killed")
    assert second.end() == 0, second.log.read_text()
    assert "0 responses scored" in second.log.read_text()
    assert_same_outcome(folder, whole)
    assert_nothing_left(folder)
    again = {line["step"]: line["time"] for line in list_steps(folder)}
    assert all(again[step] == times[step] for step in range(1, saved + 1)), "no saved step is taken again"
    report("SIGKILL of the command; the same command", message="")


def test_sigterm_stops_after_a_checkpoint(
    whole: Path, place: Path, start_command: Start, report: Report
) -> None:
    folder = place / "runs" / "stopped"
    first = start_command("stopped", training={"save_every": STEPS})
    first.until(lambda: find_step(folder) > 1)
    assert first.interrupt(signal.SIGTERM) == 143
    stopped = find_step(folder)
    assert 1 < stopped < STEPS
    assert find_saved_step(folder) == stopped, "no step is lost"
    message = f"stopped by SIGTERM after step {stopped} of {STEPS}; the same command resumes"
    assert message in first.log.read_text()
    assert "Traceback" not in first.log.read_text()

    second = start_command("stopped", training={"save_every": STEPS})
    assert second.end() == 0, second.log.read_text()
    assert_same_outcome(folder, whole)
    report("SIGTERM to the command (exit 143); the same command", message=message.split(" after")[0])


def test_sigterm_reaches_commands_that_ignore_ctrl_c(place: Path, start_command: Start) -> None:
    """A shell's script starts `polyref train &` with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        driver = start_command(
            "background", references={"mode": "live"}, storage_path=str(place / "background")
        )
    finally:
        signal.signal(signal.SIGINT, before)
    driver.until(lambda: any(is_router(process) for process in driver.family()))
    assert driver.interrupt(signal.SIGTERM) in (130, 143), driver.log.read_text()


def is_router(process: psutil.Process) -> bool:
    """Return whether a process is a reference's router."""
    with contextlib.suppress(psutil.Error):
        return "ray::Router" in "".join(process.cmdline())
    return False


def test_two_identical_commands(whole: Path, place: Path, start_command: Start, report: Report) -> None:
    pair = [start_command("twice"), start_command("twice")]
    codes = [driver.end() for driver in pair]
    assert sorted(codes) == [0, 2], [driver.log.read_text() for driver in pair]
    assert_same_outcome(place / "runs" / "twice", whole)
    refused = pair[codes.index(2)].log.read_text().splitlines()[-1]
    assert refused.startswith("polyref: ")
    report(
        "two identical commands at once", message=refused.removeprefix("polyref: ").replace(str(place), "…")
    )


def test_a_reference_whose_weights_changed_is_refused(whole: Path, place: Path, start_command: Start) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    weights = load_file(place / "movie" / "model.safetensors")
    changed = weights | {"model.norm.weight": weights["model.norm.weight"] + 0.25}
    save_file(changed, place / "movie" / "model.safetensors", {"format": "pt"})
    try:
        driver = start_command("whole")
        assert driver.end() == 2
    finally:
        save_file(weights, place / "movie" / "model.safetensors", {"format": "pt"})
    printed = driver.log.read_text()
    assert "Traceback" not in printed
    assert "polyref: run 'whole'" in printed
    assert "references.movie" in printed
    assert "references.base" not in printed
    assert "--fresh" in printed
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
