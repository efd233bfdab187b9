"""Files that were cut short or in which a bit flipped, between two starts of a run: none is used unseen."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.config.run import RunConfig
from orchestrator.driver import train
from orchestrator.driver.train import train_run
from orchestrator.errors import RunFailed, RunStopped, UsageError
from tests.support.faults import (
    assert_nothing_left,
    assert_same_outcome,
    find_saved_step,
    find_step,
    list_steps,
    sabotage,
)

pytestmark = pytest.mark.usefixtures("cluster", "whole")

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


DAMAGE = pytest.mark.parametrize("damage", [cut, flip_bit], ids=["cut", "flipped"])


def stop_run(config: RunConfig) -> None:
    """Train until there are two checkpoints, and stop."""

    def stop() -> bool:
        if find_saved_step(config.folder) < 8 or find_step(config.folder) <= find_saved_step(config.folder):
            return False
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    with sabotage(stop), pytest.raises(RunStopped):
        train_run(config)


@DAMAGE
def test_a_damaged_checkpoint(
    damage: Callable[[Path], None], make_run: MakeRun, whole: Path, report: Report
) -> None:
    config = make_run(f"checkpoint-{damage.__name__}")
    stop_run(config)
    newest, older = sorted((config.folder / "checkpoints").glob("checkpoint_*/"), reverse=True)[:2]
    (state,) = newest.glob("state-*.safetensors")
    damage(state)
    times = {line["step"]: line["time"] for line in list_steps(config.folder)}
    train_run(config)
    assert_same_outcome(config.folder, whole)
    assert_nothing_left(config.folder)
    kept = json.loads((older / "progress.json").read_text())["step"] if older.exists() else 8
    again = {line["step"]: line["time"] for line in list_steps(config.folder)}
    assert all(again[step] == times[step] for step in range(1, kept + 1)), "the older checkpoint is used"
    report(
        f"newest checkpoint {'cut short' if damage is cut else 'with a flipped bit'}",
        message="checkpoint … is set aside, and an older one is looked for",
    )


@DAMAGE
def test_a_damaged_score_file(
    damage: Callable[[Path], None], make_run: MakeRun, whole: Path, place: Path, report: Report
) -> None:
    config = make_run(f"scores-{damage.__name__}", storage_path=str(place / f"scores-{damage.__name__}"))
    stop_run(config)
    files = list(Path(config.storage_path).glob("scores/*/scores-*.parquet"))
    for file in files:
        damage(file)
    record = train_run(config)
    assert_same_outcome(config.folder, whole)
    assert all(file.with_name(f"{file.name}.damaged").exists() for file in files)
    report(
        f"score files {'cut short' if damage is cut else 'with a flipped bit'}",
        repeated=sum(counts["forwards"] for counts in record.reference_counts.values()),
        message="… is not what was written: it is set aside, and what it held is scored again",
    )


@DAMAGE
def test_a_damaged_record(
    damage: Callable[[Path], None], make_run: MakeRun, whole: Path, report: Report
) -> None:
    """A flipped bit in a record leaves no JSON here; the run is refused until the file is put right."""
    config = make_run(f"record-{damage.__name__}")
    stop_run(config)
    record = config.folder / "run.json"
    content = record.read_bytes()
    damage(record)
    with pytest.raises(UsageError, match=r"run\.json") as refusal:
        train_run(config)
    record.write_bytes(content)
    train_run(config)
    assert_same_outcome(config.folder, whole)
    report(
        f"record run.json {'cut short' if damage is cut else 'with a flipped bit'}",
        survived="refused (exit 2)",
        message=str(refusal.value).replace(str(config.folder.parent), "…"),
    )


def test_a_damaged_line_of_metrics(make_run: MakeRun, whole: Path, report: Report) -> None:
    config = make_run("metrics")
    stop_run(config)
    file = config.folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], b"\0" * len(lines[3]), *lines[4:]]))
    train_run(config)
    steps = [line["step"] for line in list_steps(config.folder)]
    assert sorted({*range(1, 25)} - {*steps}) != [], "what a damaged line said is lost, and nothing else"
    assert len(steps) == 23
    report("a damaged line in metrics.jsonl", message="1 damaged line is passed over")


@DAMAGE
def test_a_damaged_export(
    damage: Callable[[Path], None],
    make_run: MakeRun,
    whole: Path,
    report: Report,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_run(f"export-{damage.__name__}")
    finish = train.finish_run

    def damage_and_finish(*arguments: object) -> None:
        damage(config.folder / "export" / "model" / "model.safetensors")
        finish(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "finish_run", damage_and_finish)
        with pytest.raises(RunFailed, match=r"model\.safetensors is not what training wrote") as refusal:
            train_run(config)
    train_run(config)
    assert_same_outcome(config.folder, whole)
    report(
        f"exported model {'cut short' if damage is cut else 'with a flipped bit'} before it is registered",
        survived="same command",
        message=str(refusal.value).replace(str(config.folder.parent), "…"),
    )
