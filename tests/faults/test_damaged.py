"""Files that were cut short or in which a bit flipped, between two starts of a run: none is used unseen."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.config.run import RunConfig
from orchestrator.driver import train
from orchestrator.driver.train import train_run
from orchestrator.errors import RunFailed, RunStopped, UsageError
from tests.support.faults import (
    SAVE_EVERY,
    assert_nothing_left,
    assert_same_outcome,
    find_step,
    list_steps,
    sabotage,
)

pytestmark = pytest.mark.usefixtures("whole_cluster", "whole")

MakeRun = Callable[..., RunConfig]
Report = Callable[..., None]


def cut(file: Path) -> None:
    """Cut a file in half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bit(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES = {cut: "cut short", flip_bit: "with a flipped bit"}


def stop_run(config: RunConfig, *, after: int = 0) -> None:
    """Train until a step after this one is taken, and stop; the last step is saved then."""
    began = time.time()

    def stop() -> bool:
        if not any(line["time"] > began and line["step"] > after for line in list_steps(config.folder)):
            return False
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    with sabotage(stop), pytest.raises(RunStopped):
        train_run(config)


def list_whole_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints that were not set aside, the newest last."""
    whole = {path.parent for path in folder.glob("checkpoints/checkpoint_*/progress.json")}
    return sorted(whole - {path.parent for path in folder.rglob("DAMAGED")})


@pytest.fixture(scope="module")
def slow_steps(place: Path) -> Iterator[None]:
    """Steps that take so long that one or two more are taken before a run stops."""
    pace = place / "pace"
    pace.write_text("0.3")
    yield
    pace.unlink()


@pytest.fixture
def config(make_run: MakeRun, place: Path, slow_steps: None) -> RunConfig:
    """The run that is damaged again and again, stopped with at least two checkpoints."""
    config = make_run("damaged", storage_path=str(place / "damaged"))
    if not config.folder.exists():
        stop_run(config, after=SAVE_EVERY)
    return config


@pytest.mark.parametrize("damage", [cut, flip_bit])
def test_a_damaged_checkpoint(damage: Callable[[Path], None], config: RunConfig, report: Report) -> None:
    while len(whole := list_whole_checkpoints(config.folder)) < 2:
        stop_run(config)
    older, newest = whole[-2:]
    (state,) = newest.glob("state-*.safetensors")
    damage(state)
    kept = json.loads((older / "progress.json").read_text())["step"]
    times = {line["step"]: line["time"] for line in list_steps(config.folder)}
    stop_run(config)
    again = {line["step"]: line["time"] for line in list_steps(config.folder)}
    assert all(again[step] == times[step] for step in range(1, kept + 1)), "the older checkpoint is used"
    assert all(again[step] > times[step] for step in times if step > kept)
    report(
        f"newest checkpoint {DAMAGES[damage]}",
        message="checkpoint … is set aside, and an older one is looked for",
    )


@pytest.mark.parametrize("damage", [cut, flip_bit])
def test_a_damaged_record(damage: Callable[[Path], None], config: RunConfig, report: Report) -> None:
    """Nothing is done before the file is put right."""
    record = config.folder / "run.json"
    content = record.read_bytes()
    damage(record)
    with pytest.raises(UsageError, match=r"run\.json") as refusal:
        train_run(config)
    record.write_bytes(content)
    report(
        f"record run.json {DAMAGES[damage]}",
        survived="refused (exit 2)",
        message=str(refusal.value).replace(str(config.folder.parent), "…"),
    )


@pytest.mark.parametrize("damage", [cut, flip_bit])
def test_damaged_score_files(damage: Callable[[Path], None], config: RunConfig, report: Report) -> None:
    files = list(Path(config.storage_path).glob("scores/*/scores-*.parquet"))
    assert files
    for file in files:
        damage(file)
    stop_run(config)
    assert all(file.with_name(f"{file.name}.damaged").exists() for file in files)
    report(
        f"score files {DAMAGES[damage]}",
        repeated="all of them",
        message="… is not what was written: it is set aside, and what it held is scored again",
    )


def test_a_damaged_line_of_metrics(config: RunConfig, report: Report) -> None:
    """The line's numbers are lost, and nothing else; it is put back so that the run's end can be compared."""
    file = config.folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], b"\0" * (len(lines[3]) - 1) + b"\n", *lines[4:]]))
    stop_run(config)
    lost = json.loads(lines[3])["step"]
    assert [line["step"] for line in list_steps(config.folder)] == [
        step for step in range(1, find_step(config.folder) + 1) if step != lost
    ]
    lines = [*file.read_bytes().splitlines(keepends=True), lines[3]]
    file.write_bytes(b"".join(sorted(lines, key=lambda line: json.loads(line)["time"])))
    report("a damaged line in metrics.jsonl", message="1 damaged line is passed over")


def test_the_run_ends_as_if_nothing_had_happened(config: RunConfig, whole: Path) -> None:
    train_run(config)
    assert_same_outcome(config.folder, whole)
    assert_nothing_left(config.folder)


def test_a_damaged_export(
    make_run: MakeRun, whole: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run("export")
    finish = train.finish_run

    def damage_and_finish(*arguments: object) -> None:
        flip_bit(config.folder / "export" / "model" / "model.safetensors")
        finish(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "finish_run", damage_and_finish)
        with pytest.raises(RunFailed, match=r"model\.safetensors is not what training wrote") as refusal:
            train_run(config)
    train_run(config)
    assert_same_outcome(config.folder, whole)
    report(
        "exported model with a flipped bit before it is registered",
        survived="same command",
        message=str(refusal.value).replace(str(config.folder.parent), "…"),
    )
