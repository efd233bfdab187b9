"""Whole runs on a real Ray: one trajectory however they are spread, and scores that are made once."""

import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator.driver.record import RunRecord, read_record
from orchestrator.driver.train import train_run
from orchestrator.errors import RunFailed, UsageError
from orchestrator.tracking.metrics_file import read_metrics

pytestmark = pytest.mark.usefixtures("cluster")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model" / "model.safetensors")


def counts(record: RunRecord, key: str) -> dict[str, int]:
    return {name: stats[key] for name, stats in record.reference_counts.items()}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of runs that several tests share, with the first run's scores in it."""
    return str(tmp_path_factory.mktemp("storage"))


@pytest.fixture
def first(run_of: Any, storage: str) -> RunRecord:
    """The record of a run of two references; the run is trained once for all tests."""
    return train_run(run_of("first", storage_path=storage))


def test_ranks_and_microbatches_and_precompute_follow_one_trajectory(
    run_of: Any, first: RunRecord, storage: str
) -> None:
    one = run_of("first", storage_path=storage)
    expected = losses(one.folder)
    assert len(expected) == 6
    assert counts(first, "replicas_started") == {"base": 1, "other": 1}

    two = run_of("two", parallel={"workers": 2}, storage_path=storage)
    train_run(two)
    assert losses(two.folder) == pytest.approx(expected, rel=1e-5)

    micro = run_of(
        "micro",
        training={"tokens_per_microbatch": 40},
        references=one.references.model_copy(update={"mode": "precompute"}).model_dump(),
    )
    train_run(micro)
    assert losses(micro.folder) == pytest.approx(expected, rel=1e-5)
    last = read_metrics(one.folder)[-1]
    assert read_metrics(micro.folder)[-1]["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    left = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert not [name for name in left if "router" in name], "every actor of a run ends with it"


def test_another_loss_on_the_same_data_starts_no_replica_and_scores_nothing(
    run_of: Any, first: RunRecord, storage: str
) -> None:
    pairs = [json.loads(line) for line in Path(first.config["data"]["train"]).read_text().splitlines()]
    responses = {(p["prompt"], p[side]) for p in pairs for side in ("chosen", "rejected")}
    assert counts(first, "scored") == {"base": len(responses), "other": len(responses)}

    loss = {
        "preset": "mallows_theta",
        "references": {"combine": "geometric"},
        "dispersion": {"phi_star": "auto"},
    }
    second = run_of(
        "second", loss=loss, training={"seed": 1}, data={"eval_fraction": 0.25}, storage_path=storage
    )
    record = train_run(second)
    assert counts(record, "scored") == {"base": 0, "other": 0}
    assert counts(record, "replicas_started") == {"base": 0, "other": 0}
    tags = MlflowClient(f"sqlite:///{second.folder.parent}/mlflow.db").get_run(record.mlflow_run).data.tags
    assert float(tags["loss.dispersion.phi_star"]) == pytest.approx(record.result.phi_star, rel=1e-5)
    assert tags["scores.base.scored"] == "0"
    scales = json.loads((second.folder / "dispersion.json").read_text())
    assert np.mean(scales) == pytest.approx(1, abs=0.05)


def test_the_policy_itself_as_reference_starts_at_log_2_and_equals_the_served_one(run_of: Any) -> None:
    loss = {"preset": "dpo"}
    own = run_of("own", loss=loss, references={"primary": "self", "models": {"self": {"model": "policy"}}})
    assert train_run(own).training_result.findings == {}
    base = {"model": own.policy.model}
    served = run_of("served", loss=loss, references={"primary": "base", "models": {"base": base}})
    record = train_run(served)
    assert record.training_result.findings == {}
    assert losses(own.folder)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(served.folder) == pytest.approx(losses(own.folder), rel=1e-5)
    assert counts(record, "scored") == {"base": 0}, "what the worker scored itself is in the store"


def test_full_training_without_references_exports_what_was_trained(
    run_of: Any, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(
        "full",
        policy={"adapter": None},
        references={},
        loss={"preset": "simpo"},
        data={
            "eval": {"whole": str(pairs_file), "few": {"source": str(pairs_file), "count": 12}},
            "eval_fraction": None,
        },
        evaluation={"set": "few"},
    )
    metrics = train_run(run).training_result.metrics
    assert metrics["eval/few/accuracy"] == metrics["eval/accuracy"]
    assert metrics["eval/whole/loss"] != metrics["eval/loss"] == metrics["eval/few/loss"]
    by_set = [f"{name} {metrics[f'eval/{name}/accuracy']:.2f}" for name in ("whole", "few")]
    assert f"accuracy by set: {', '.join(by_set)}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(run.folder / "export" / "model")
    start = AutoModelForCausalLM.from_pretrained(run.policy.model)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert all(moved)
    kept = load_file(max((run.folder / "checkpoints").glob("checkpoint_*/state-*.safetensors")))
    found = {f"model.{name}/weight": weight for name, weight in exported(run.folder).items()}
    assert all(torch.equal(kept[name], found[name]) for name in found)
    assert (
        not list(run.folder.rglob("*.bin")) + list(run.folder.rglob("*.pt")) + list(run.folder.rglob("*.pkl"))
    )


def test_a_finished_run_is_not_trained_again_and_a_changed_one_is_refused(run_of: Any) -> None:
    alone = {"references": {}, "loss": {"preset": "simpo", "beta": 0.1}}
    run = run_of("again", training={"max_steps": 2}, **alone)
    train_run(run)
    before = (run.folder / "metrics.jsonl").read_text()
    train_run(run)
    assert (run.folder / "metrics.jsonl").read_text() == before
    with pytest.raises(UsageError, match=r"loss.beta: 0.1 -> 0.3.*--fresh"):
        train_run(
            run_of("again", training={"max_steps": 2}, **alone | {"loss": alone["loss"] | {"beta": 0.3}})
        )
    other = run_of("again", training={"max_steps": 2, "seed": 3}, **alone)
    assert train_run(other, fresh=True).result.step == 2
    assert (run.folder / "metrics.jsonl").read_text() != before


def test_what_mlflow_missed_at_the_end_is_sent_by_the_same_command(
    run_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server takes nothing from the last step on; the model is kept, and delivered later, once."""
    run = run_of(
        "late",
        references={},
        loss={"preset": "simpo"},
        training={"max_steps": 2},
        tracking={"registered_model": "late"},
    )

    def away(*_: Any, **__: Any) -> None:
        raise MlflowException("away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", away)
        with pytest.raises(RunFailed, match=r"has not taken all.*kept in .*late/export/model, and the same"):
            train_run(run)
    record = read_record(run.folder)
    client = MlflowClient(f"sqlite:///{run.folder.parent / 'mlflow.db'}")
    assert record is not None
    assert (record.finished, client.get_run(record.mlflow_run).info.status) == (False, "RUNNING")
    with sqlite3.connect(run.folder.parent / "mlflow.db") as database:  # as if the workers' never arrived
        database.execute("DELETE FROM metrics WHERE step > 0")
        database.execute("DELETE FROM latest_metrics WHERE step > 0")
    record = train_run(run)
    assert (record.finished, client.get_run(record.mlflow_run).info.status) == (True, "FINISHED")
    assert [point.step for point in client.get_metric_history(record.mlflow_run, "loss")] == [1, 2]
    assert client.list_artifacts(record.mlflow_run, "plots")
    assert len(client.search_model_versions("name='late'")) == 1


def test_a_diverging_run_stops_names_the_step_and_keeps_the_last_checkpoint(run_of: Any) -> None:
    run = run_of(
        "diverges",
        policy={"adapter": None},
        references={},
        loss={"preset": "cpo", "beta": 1e4},
        training={"learning_rate": 1e30, "save_every": 1, "warmup": 0.2},
    )
    with pytest.raises(RunFailed, match=r"not finite at step \d+, pairs .*pairs.jsonl:\d+"):
        train_run(run)
    assert list((run.folder / "checkpoints").glob("checkpoint_*"))
    assert not (run.folder / "export").exists()
