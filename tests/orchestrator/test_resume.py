"""Runs that are killed: the same command goes on, and what comes out is what would have come out anyway."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from orchestrator.tracking.metrics_file import read_metrics
from tests.support.driver import Driver

STEPS, SAVE_EVERY = 40, 4


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed") / "runs"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_llama_b_folder: Path) -> Path:
    """A reference's folder that a test may change."""
    return shutil.copytree(tiny_llama_b_folder, tmp_path_factory.mktemp("models") / "movie")


@pytest.fixture(scope="module")
def run_file(pairs_file: Path, tiny_llama_folder: Path, reference: Path, storage: Path) -> Run:
    """`run_file(name)`: the same run under another name; the runs share the store of scores."""

    def write(name: str) -> Path:
        models = {"base": {"model": str(tiny_llama_folder)}, "movie": {"model": str(reference)}}
        run: dict[str, Any] = {
            "name": name,
            "policy": {"model": str(tiny_llama_folder), "adapter": {"r": 4, "alpha": 8, "dropout": 0.1}},
            "references": {"primary": "base", "models": models},
            "data": {
                "train": str(pairs_file),
                "eval_fraction": 0.25,
                "max_length": 256,
                "max_prompt_length": 64,
            },
            "loss": {"preset": "mrpo", "soft_label": {"type": "geometric"}},
            "training": {
                "max_steps": STEPS,
                "pairs_per_step": 8,
                "tokens_per_microbatch": 512,
                "learning_rate": 1e-2,
                "save_every": SAVE_EVERY,
            },
            "evaluation": {"every_steps": 10},
            "tracking": {"registered_model": name},
            "storage_path": str(storage),
        }
        path = storage.parent / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run))
        return path

    return write


@pytest.fixture
def started(run_file: Run) -> Iterator[Callable[[str], Driver]]:
    """`started(name)`: a command that surely ends with the test."""
    drivers: list[Driver] = []

    def start(name: str) -> Driver:
        drivers.append(Driver("train", run_file(name)))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()


@pytest.fixture(scope="module")
def whole(run_file: Run, storage: Path) -> Path:
    """Folder of the run that nothing interrupted."""
    driver = Driver("train", run_file("whole"))
    assert driver.end() == 0, driver.log.read_text()
    return storage / "whole"


def steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder) if "loss" in line]


def step(folder: Path) -> int:
    return max((line["step"] for line in steps(folder)), default=0)


def saved(folder: Path) -> int:
    """The step that a restart would go on from."""
    snapshot = folder / "checkpoints" / "checkpoint_manager_snapshot.json"
    try:
        found = json.loads(snapshot.read_text())["checkpoint_results"]
    except (OSError, ValueError):  # not yet, or being written
        return 0
    return max((checkpoint["metrics"]["step"] for checkpoint in found), default=0)


def computed(folder: Path) -> list[dict[str, Any]]:
    """The metrics that do not measure time."""
    return [
        {k: v for k, v in line.items() if k != "time" and "perf/" not in k} for line in read_metrics(folder)
    ]


def assert_same_outcome(folder: Path, whole: Path) -> None:
    """Bit for bit the same weights and metrics, each step once, one MLflow run and one version."""
    for part in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        found, expected = load_file(folder / "export" / part), load_file(whole / "export" / part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert [line["step"] for line in steps(folder)] == list(range(1, STEPS + 1))
    assert computed(folder) == computed(whole)
    record = json.loads((folder / "run.json").read_text())
    assert record["registered"] == f"models:/{folder.name}/1"
    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("polyref")
    runs = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == folder.name]
    assert [(run.info.run_id, run.info.status) for run in runs] == [(record["mlflow_run"], "FINISHED")]
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, STEPS + 1))
    assert [point.value for point in history] == [line["loss"] for line in steps(whole)]
    assert len(client.search_model_versions(f"name='{folder.name}'")) == 1


def test_the_command_and_then_its_worker_are_killed_and_nothing_is_lost(
    whole: Path, storage: Path, started: Callable[[str], Driver]
) -> None:
    folder = storage / "killed"
    first = started("killed")
    first.until(lambda: 0 < saved(folder) < step(folder))
    first.kill()
    first_save, at = saved(folder), time.time()
    assert SAVE_EVERY <= first_save < STEPS

    second = started("killed")
    second.until(lambda: first_save < saved(folder) < step(folder))
    second_save = saved(folder)
    workers = [process for process in second.family() if "RayTrainWorker" in "".join(process.cmdline())]
    assert len(workers) == 1
    workers[0].kill()
    once_more = time.time()
    assert second.end() == 0, second.log.read_text()

    assert "0 responses scored" in second.log.read_text()
    assert_same_outcome(folder, whole)
    made = {line["step"]: line["time"] for line in steps(folder)}
    assert made[first_save] < at < made[first_save + 1], "it went on from the checkpoint, and no sooner"
    assert made[second_save] < once_more < made[STEPS]


def test_a_reference_whose_weights_changed_is_refused(
    whole: Path, reference: Path, started: Callable[[str], Driver]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    weights = load_file(reference / "model.safetensors")
    weights["model.norm.weight"][3] += 0.25
    save_file(weights, reference / "model.safetensors", {"format": "pt"})
    driver = started("whole")
    assert driver.end() == 2
    printed = driver.log.read_text()
    assert "Traceback" not in printed
    assert "polyref: run 'whole'" in printed
    assert "references.movie" in printed
    assert "references.base" not in printed
    assert "--fresh" in printed
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
