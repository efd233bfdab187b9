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


@pytest.mark.usefixtures("cluster", "whole")
@pytest.mark.parametrize(("what", "leave"), [("a checkpoint", 12288), ("a line of metrics", 0)])
def test_a_disk_is_full_while_training(
    what: str, leave: int, make_run: MakeRun, whole: Path, place: Path, small_disk: Path, report: Report
) -> None:
    shutil.copytree(place / "runs" / "scores", small_disk / "scores")
    config = make_run("full-" + what.split()[-1], storage_path=str(small_disk))

    def fill() -> bool:
        if not 0 < find_saved_step(config.folder) < find_step(config.folder):
            return False
        fill_disk(small_disk, leave=leave)
        return True

    with (
        sabotage(fill),
        pytest.raises(RunFailed, match=r"a disk is full .*the same command") as refusal,
    ):
        train_run(config)
    assert str(small_disk) in str(refusal.value)
    assert "MiB free" in str(refusal.value)
    (small_disk / "filler").unlink()
    train_run(config)
    assert_same_outcome(config.folder, whole)
    report(f"disk full at {what}", survived="same command", message=hide(refusal.value, small_disk))


@pytest.mark.usefixtures("cluster", "whole")
def test_a_disk_is_full_while_scores_are_saved(
    make_run: MakeRun, whole: Path, small_disk: Path, report: Report
) -> None:
    config = make_run("full-scores", storage_path=str(small_disk))

    def fill() -> bool:
        if not find_actor_processes("Replica.score"):
            return False
        fill_disk(small_disk, leave=0)
        return True

    with sabotage(fill), pytest.raises(RunFailed, match=r"a disk is full") as refusal:
        train_run(config)
    assert str(small_disk / "scores") in str(refusal.value)
    (small_disk / "filler").unlink()
    train_run(config)
    assert_same_outcome(config.folder, whole)
    report(
        "disk full when scores are saved", survived="same command", message=hide(refusal.value, small_disk)
    )


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
