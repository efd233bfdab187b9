"""Disks that are full: the run stops with the place and the room it needs, and the same command resumes."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.config.run import RunConfig
from orchestrator.driver.train import train_run
from orchestrator.errors import RunFailed
from tests.support.driver import Driver
from tests.support.faults import (
    assert_same_outcome,
    find_actor_processes,
    find_saved_step,
    find_step,
    sabotage,
)

MakeRun = Callable[..., RunConfig]
Report = Callable[..., None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill_disk(folder: Path, *, leave: int) -> None:
    """Write a file that leaves so many bytes free."""
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - leave)


@pytest.mark.usefixtures("whole_cluster")
def test_a_disk_is_full_again_and_again(
    make_run: MakeRun, whole: Path, small_disk: Path, report: Report
) -> None:
    """While scores are saved; then at a checkpoint; then at a line of metrics."""
    config = make_run("full", storage_path=str(small_disk))

    def train_until_full(is_time: Callable[[], bool], *, leave: int) -> str:
        def fill() -> bool:
            if not is_time():
                return False
            fill_disk(small_disk, leave=leave)
            return True

        full = r"a disk is full .*the same command"
        with sabotage(fill), pytest.raises(RunFailed, match=full) as refusal:
            train_run(config)
        (small_disk / "filler").unlink()
        assert "MiB free" in str(refusal.value)
        return str(refusal.value)

    def is_between_checkpoints() -> bool:
        return began < find_saved_step(config.folder) < find_step(config.folder)

    message = train_until_full(lambda: bool(find_actor_processes("Replica.score")), leave=0)
    assert str(small_disk / "scores") in message
    report("disk full when scores are saved", survived="same command", message=hide(message, small_disk))

    for what, leave in (("a checkpoint", 12288), ("a line of metrics", 0)):
        began = find_saved_step(config.folder)
        message = train_until_full(is_between_checkpoints, leave=leave)
        assert str(small_disk) in message
        report(f"disk full at {what}", survived="same command", message=hide(message, small_disk))
    train_run(config)
    assert_same_outcome(config.folder, whole)


def test_a_nodes_scratch_disk_is_full(
    whole: Path,
    place: Path,
    small_disk: Path,
    start_command: Callable[..., Driver],
    report: Report,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = place / "runs" / "full-scratch"
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(small_disk))
        first = start_command("full-scratch")
        first.until(lambda: find_step(folder) > 0)
        fill_disk(small_disk, leave=8192)
        assert first.end() == 1, first.log.read_text()
    message = first.log.read_text().splitlines()[-1]
    assert message.startswith("polyref: a disk is full")
    assert f"{small_disk} has 0 MiB free" in message
    assert start_command("full-scratch").end() == 0
    assert_same_outcome(folder, whole)
    report(
        "a node's scratch disk full at a checkpoint",
        survived="same command",
        message=hide(message, small_disk),
    )


def hide(message: object, folder: Path) -> str:
    """Return a message without the path of a test's folder."""
    return str(message).removeprefix("polyref: ").replace(str(folder), "/disk")
