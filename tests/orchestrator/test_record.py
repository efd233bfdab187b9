"""A run's record: which changes are refused, what stays pinned, and who may hold the folder."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver.record import RunRecord, find_pin, lock_run, open_record, read_record
from orchestrator.errors import UsageError


def record(**config: Any) -> RunRecord:
    settings: dict[str, Any] = {
        "name": "a",
        "loss": {"beta": 0.1},
        "parallel": {"workers": 1},
        "references": {"mode": "live", "models": {"replicas": {"model": "models:/m@x", "replicas": 1}}},
    }
    return RunRecord(
        config=settings | config,
        device_type="cpu",
        identity={"policy": "p", "references": {"replicas": "f"}, "data": {"train": "d"}},
        pins={"references.models.replicas": "models:/m/3"},
        counts={},
    )


def test_how_a_run_is_spread_may_change_and_what_it_computes_may_not(tmp_path: Path) -> None:
    open_record(tmp_path, record())
    models = {"replicas": {"model": "models:/m@x", "replicas": 4}}
    spread = record(parallel={"workers": 2}, references={"mode": "precompute", "models": models})
    assert open_record(tmp_path, spread).config["parallel"] == {"workers": 2}
    with pytest.raises(UsageError, match=r"loss.beta: 0.1 -> 0.2.*another name.*--fresh"):
        open_record(tmp_path, record(loss={"beta": 0.2}))
    moved = {"replicas": {"model": "elsewhere", "replicas": 1}}
    with pytest.raises(UsageError, match=r"references.models.replicas.model"):
        open_record(tmp_path, record(references={"mode": "live", "models": moved}))


def test_another_reference_behind_the_same_name_is_refused(tmp_path: Path) -> None:
    open_record(tmp_path, record())
    changed = record()
    changed.identity["references"]["replicas"] = "g"
    with pytest.raises(UsageError, match=r"references.replicas: \"f\" -> \"g\""):
        open_record(tmp_path, changed)


def test_a_pin_holds_for_the_name_it_was_made_for() -> None:
    field = "references.models.replicas"
    assert find_pin(record(), field, "models:/m@x") == "models:/m/3"
    assert find_pin(record(), field, "models:/m@y") is None
    assert find_pin(None, field, "models:/m@x") is None


def test_a_torn_record_is_not_mistaken_for_none(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run.json: is not a run's record.*--fresh"):
        read_record(tmp_path)


def _hold(folder: Path, held: Any, done: Any) -> None:
    with lock_run(folder):
        held.set()
        done.wait(30)


def test_one_process_at_a_time_and_the_lock_dies_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run", held, done))
    other.start()
    assert held.wait(30)
    with pytest.raises(UsageError, match="is being trained by another process"), lock_run(tmp_path / "run"):
        pass
    other.kill()
    other.join()
    with lock_run(tmp_path / "run"):
        pass
