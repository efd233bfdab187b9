"""Runs whose storage is an object store: killed on one machine, gone on with on another that has nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load

from orchestrator.config.run import load_run
from orchestrator.driver.train import train_run
from tests.support.bucket import Bucket, object_store
from tests.support.driver import Driver

pytestmark = pytest.mark.long

STEPS, SAVE_EVERY = 40, 4


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    with object_store() as environment:
        yield environment


@pytest.fixture
def bucket(store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    return Bucket()


def run_file(folder: Path, data: str, model: Path, **changes: Any) -> Path:
    run: dict[str, Any] = {
        "name": "far",
        "policy": {"model": str(model), "adapter": {"r": 4, "alpha": 8, "dropout": 0.1}},
        "references": {"primary": "base", "models": {"base": {"model": "policy"}}},
        "data": {"train": data, "eval_fraction": 0.25, "max_length": 256, "max_prompt_length": 64},
        "loss": {"preset": "dpo"},
        "training": {
            "max_steps": STEPS,
            "pairs_per_step": 8,
            "tokens_per_microbatch": 512,
            "learning_rate": 1e-3,
            "save_every": SAVE_EVERY,
        },
        "parallel": {"workers": 2, "resources": {"cpu": 0.5}},
        "evaluation": {"every_steps": 10, "keep": "best", "metric": "eval/loss"},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "registered_model": "far"},
    }
    folder.mkdir(exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run | changes))
    return path


def saved(bucket: Bucket) -> int:
    """The step that a restart would go on from."""
    key = "runs/far/checkpoints/checkpoint_manager_snapshot.json"
    if key not in bucket.keys("runs/far/checkpoints/"):
        return 0
    results = json.loads(bucket.get(key))["checkpoint_results"]
    return max((checkpoint["metrics"]["step"] for checkpoint in results), default=0)


def computed(metrics: bytes) -> list[dict[str, float]]:
    """The metrics that do not measure time."""
    lines = [json.loads(line) for line in metrics.splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and "perf/" not in k} for line in lines]


def test_a_killed_run_goes_on_from_the_store_on_another_machine(
    bucket, pairs_file, tiny_llama_folder, tmp_path, monkeypatch, capsys
):
    data = bucket.put("data/pairs.jsonl", pairs_file.read_bytes())
    near = run_file(tmp_path / "near", data, tiny_llama_folder, storage_path=str(tmp_path / "near" / "runs"))
    whole = Driver("train", near)
    assert whole.end() == 0, whole.log.read_text()

    far = run_file(tmp_path / "far", data, tiny_llama_folder, storage_path=f"{bucket.uri}/runs")
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "one machine"))
    first = Driver("train", far)
    try:
        first.until(lambda: saved(bucket) >= 2 * SAVE_EVERY, every=0.2)  # a look costs the store time
    finally:
        first.kill()
    assert saved(bucket) < STEPS, "killed too late to show anything"
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "another machine"))
    second = Driver("train", far)
    assert second.end() == 0, second.log.read_text()

    folder = tmp_path / "near" / "runs" / "far"
    pairs = zip(
        computed(bucket.get("runs/far/metrics.jsonl")),
        computed((folder / "metrics.jsonl").read_bytes()),
        strict=True,
    )
    for line, expected in pairs:  # live scores are made in other batches after a restart
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for part in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (
            load(bucket.get(f"runs/far/export/{part}")),
            load((folder / "export" / part).read_bytes()),
        )
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
        assert ours.keys() == theirs.keys()
    record = json.loads(bucket.get("runs/far/run.json"))
    assert (record["finished"], record["registered"]) == (True, "models:/far/1")
    kept = {key.split("/")[2] for key in bucket.keys("runs/far/")}
    assert kept == {path.name for path in folder.iterdir()}
    assert bucket.keys("runs/scores/")
    left = {path.parent.name for path in (tmp_path / "another machine").rglob("*.*")}
    assert left == {"data"}, "nothing but the data's tokens is left on the machine"
    for said in (f"plots: {bucket.uri}/runs/far/plots", "registered as models:/far/1", f"{STEPS}/{STEPS}"):
        assert said in second.log.read_text()

    train_run(load_run(str(far), ()))  # told again, without a cluster
    assert "registered as models:/far/1" in capsys.readouterr().out
