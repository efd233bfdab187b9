"""A run's record: which changes are refused, what stays pinned, and who may hold the folder."""

import json
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver.record import (
    RunRecord,
    find_pin,
    lock_run,
    open_record,
    read_record,
    remove_run,
)
from orchestrator.errors import UsageError
from orchestrator.worker.result import WorkerResult


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


def test_tokens_are_pinned_when_a_run_from_before_is_resumed_and_compared_from_then_on(
    tmp_path: Path,
) -> None:
    open_record(tmp_path, record(data={}))  # its identity has no tokens, and its settings no date
    resumed = record(data={"template_date": "2026-02-28"})
    resumed.identity["tokens"] = {"train, policy": "t"}
    assert open_record(tmp_path, resumed).identity == resumed.identity
    found = read_record(tmp_path)
    assert found is not None
    assert (found.identity["tokens"], found.key) == (
        {"train, policy": "t"},
        open_record(tmp_path, resumed).key,
    )
    changed = record(data={"template_date": "2026-02-28"})
    changed.identity["tokens"] = {"train, policy": "u"}
    with pytest.raises(
        UsageError, match=r"tokens.train, policy: \"t\" -> \"u\" \(a tokenizer, .* other tokens"
    ):
        open_record(tmp_path, changed)
    later = record(data={"template_date": "2026-03-01"})
    later.identity["tokens"] = resumed.identity["tokens"]
    with pytest.raises(UsageError, match=r"data.template_date: \"2026-02-28\" -> \"2026-03-01\""):
        open_record(tmp_path, later)


def test_a_pin_holds_for_the_name_it_was_made_for() -> None:
    field = "references.models.replicas"
    assert find_pin(record(), field, "models:/m@x") == "models:/m/3"
    assert find_pin(record(), field, "models:/m@y") is None
    assert find_pin(None, field, "models:/m@x") is None


def test_a_record_without_a_version_is_read_with_its_old_names(tmp_path: Path) -> None:
    now = record()
    now.write(tmp_path)
    old = json.loads((tmp_path / "run.json").read_text())
    for name in ("version", "sha256", "reference_counts", "best_trial"):
        del old[name]
    old["counts"] = {"train": {"pairs": 3, "turned_round": 1, "skipped": {}}}
    old["result"] = {
        "status": "done",
        "step": 4,
        "exported_step": 3,
        "metrics": {"eval/loss": 0.5},
        "phi_star": None,
        "sharing_refused": "it is off",
        "scores": {"base": {"scored": 7}},
    }
    (tmp_path / "run.json").write_text(json.dumps(old))
    found = read_record(tmp_path)
    assert found is not None
    assert found.counts == {"train": {"pairs": 3, "swapped": 1, "skipped": {}}}
    assert found.result == WorkerResult(
        status="done", step=4, exported_step=3, metrics={"eval/loss": 0.5}, plain_rows_reason="it is off"
    )
    assert found.reference_counts == {"base": {"scored": 7}}
    found.write(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["version"] == 3
    assert read_record(tmp_path) == found


def test_a_search_that_is_on_its_way_has_no_result_in_an_old_record(tmp_path: Path) -> None:
    record().write(tmp_path)
    old = json.loads((tmp_path / "run.json").read_text())
    del old["version"], old["sha256"], old["reference_counts"], old["best_trial"]
    old |= {"counts": {}, "result": {"scores": {"base": {"scored": 7}}, "best": 5}}
    (tmp_path / "run.json").write_text(json.dumps(old))
    found = read_record(tmp_path)
    assert found is not None
    assert (found.result, found.best_trial, found.reference_counts) == (None, 5, {"base": {"scored": 7}})


def test_a_record_of_a_newer_version_is_refused_in_one_sentence(tmp_path: Path) -> None:
    record().write(tmp_path)
    newer = json.loads((tmp_path / "run.json").read_text()) | {"version": 4, "more": 1}
    (tmp_path / "run.json").write_text(json.dumps(newer))
    with pytest.raises(UsageError, match="has version 4 and this polyref reads up to 3: use the polyref"):
        read_record(tmp_path)


def test_a_torn_record_is_not_mistaken_for_none(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    for action in (read_record, partial(remove_run, kind="run")):
        with pytest.raises(UsageError, match=r"run.json: is not a run's record.*move its folder away"):
            action(tmp_path)
    assert (tmp_path / "run.json").exists()


def test_starting_over_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    remove_run(folder, kind="run")  # nothing there: nothing to refuse
    record().write(folder)
    for name in ("checkpoints/checkpoint_1/progress.json", "export/model/config.json", "plots/learning.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    (folder / "metrics.jsonl").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (folder / "trials").symlink_to(elsewhere)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is the folder of a run, which --fresh does not remove"):
        remove_run(folder, kind="search")
    remove_run(folder, kind="run")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert (elsewhere / "kept").exists()
    with pytest.raises(UsageError, match=r"no run.json is there, but notes.txt; move that away"):
        remove_run(folder, kind="run")


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
