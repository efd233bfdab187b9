"""Searches that are killed or stopped: the same command resumes, and no finished trial is repeated."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from orchestrator.search.journal import Journal, TrialRecord, read_trial
from orchestrator.tracking.metrics_file import read_metrics
from tests.support.driver import Driver

pytestmark = pytest.mark.long
STEPS = 40


@pytest.fixture
def sweep_file(pairs_file: Path, tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """Two trials that compute the same, one after the other: how often they save changes no weight."""
    run = {
        "name": "base",
        "policy": {"model": str(tiny_llama_folder), "adapter": {"r": 4, "alpha": 8, "dropout": 0.1}},
        "references": {"primary": "self", "mode": "precompute", "models": {"self": {"model": "policy"}}},
        "data": {"train": str(pairs_file), "eval_fraction": 0.25, "max_length": 256, "max_prompt_length": 64},
        "loss": {"preset": "gdpo"},
        "training": {
            "max_steps": STEPS,
            "pairs_per_step": 8,
            "tokens_per_microbatch": 512,
            "learning_rate": 1e-2,
        },
        "evaluation": {"every_steps": 10},
        "storage_path": str(tmp_path / "runs"),
    }
    sweep = {
        "name": "sweep",
        "run": run,
        "space": {"training.save_every": {"grid": [5, 4]}},
        "search": {"algorithm": "grid"},
        "max_concurrent": 1,
        "promote": None,
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


@pytest.fixture
def started(sweep_file: Path) -> Iterator[Callable[[], Driver]]:
    """`started()`: the command, which surely ends with the test."""
    drivers: list[Driver] = []

    def start() -> Driver:
        drivers.append(Driver("tune", sweep_file))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()


def trial(folder: Path, number: int) -> TrialRecord | None:
    path = folder / f"{number:04d}" / "trial.json"
    return read_trial(path.parent) if path.exists() else None


def saved(folder: Path, number: int) -> int:
    found = sorted((folder / f"{number:04d}" / "checkpoints").glob("checkpoint_*"))
    return int(found[-1].name.split("_")[1]) if found else 0


def computed(folder: Path, number: int) -> list[dict[str, Any]]:
    lines = read_metrics(folder / f"{number:04d}")
    return [{k: v for k, v in line.items() if k != "time" and "perf/" not in k} for line in lines]


def test_a_search_that_is_killed_and_then_stopped_goes_on_and_repeats_nothing(
    sweep_file: Path, started: Callable[[], Driver]
) -> None:
    folder = sweep_file.parent / "runs" / "sweep" / "trials"
    first = started()
    first.until(lambda: saved(folder, 2) > 0)
    first.kill()
    done = trial(folder, 1)
    assert done is not None
    assert (done.status, done.step) == ("finished", STEPS)
    before = {path: path.read_bytes() for path in (folder / "0001").rglob("*") if path.is_file()}
    at = saved(folder, 2)

    second = started()
    second.until(lambda: at < saved(folder, 2) < STEPS)
    assert second.interrupt(signal.SIGTERM) == 130
    assert "the same command resumes" in second.log.read_text()
    stopped = trial(folder, 2)
    assert stopped is not None
    assert stopped.status == "running"

    third = started()
    assert third.end() == 0, third.log.read_text()
    assert "0 responses scored" in third.log.read_text()
    assert {path: path.read_bytes() for path in (folder / "0001").rglob("*") if path.is_file()} == before
    records = list(Journal(folder))
    assert [(record.number, record.status, record.step) for record in records] == [
        (1, "finished", STEPS),
        (2, "finished", STEPS),
    ]
    assert computed(folder, 2) == computed(folder, 1), "bit for bit what an uninterrupted trial computes"
    assert records[1].result == records[0].result
    client = MlflowClient(f"sqlite:///{sweep_file.parent / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("polyref").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert runs.keys() == {"sweep", "sweep-0001", "sweep-0002"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    history = client.get_metric_history(runs["sweep-0002"].info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, STEPS + 1))
