"""Whole searches on a real Ray: scores made once for all trials, early stopping, failures, promotion."""

import gc
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray._private.state import actors
from ray.util import placement_group_table
from transformers import AutoModelForCausalLM

from orchestrator.config.run import RunConfig
from orchestrator.config.sweep import SweepConfig, parse_sweep
from orchestrator.driver.record import RunRecord
from orchestrator.search.journal import Journal, TrialRecord
from orchestrator.search.tune import run_sweep
from orchestrator.tracking.metrics_file import read_metrics

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("whole_cluster")]


def sweep_of(run: RunConfig, name: str, space: dict[str, Any], **settings: Any) -> SweepConfig:
    content = {
        "name": name,
        "run": run.model_dump(mode="json") | {"loss": {"preset": "mrpo", "beta": 0.1}},
        "space": space,
        "search": {"algorithm": "grid"},
        "promote": None,
    }
    return parse_sweep(content | settings, source=name)


def folder_of(sweep: SweepConfig) -> Path:
    return Path(sweep.base.storage_path) / sweep.name


def trials_of(sweep: SweepConfig) -> list[TrialRecord]:
    return list(Journal(folder_of(sweep) / "trials"))


def scored(record: RunRecord, key: str = "scored") -> dict[str, int]:
    return {name: counts[key] for name, counts in record.reference_counts.items()}


def left_behind() -> list[str]:
    """Actors and placement groups that live, as Ray's control service says; they have some seconds to end."""
    deadline = time.monotonic() + 30
    while True:
        gc.collect()  # handles of actors that ended with their run
        living = [actor["ActorClassName"] for actor in actors().values() if actor["State"] != "DEAD"]
        living = [name for name in living if name != "_AutoscalingCoordinatorActor"]  # Ray's, one per cluster
        groups = [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]
        if not living + groups or time.monotonic() > deadline:
            return living + groups
        time.sleep(0.2)


def test_a_search_scores_each_response_once_and_the_next_one_none(run_of: Any) -> None:
    run = run_of("base", tracking={"registered_model": "found"})
    space = {"loss.preset": {"grid": ["dpo", "gdpo", "mallows_theta", "mrpo"]}}
    sweep = sweep_of(run, "first", space, search={"algorithm": "grid", "controls": True}, promote="best")
    record = run_sweep(sweep)
    pairs = [json.loads(line) for line in Path(run.data.train).read_text().splitlines()]
    responses = {(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")}
    assert scored(record) == {"base": len(responses), "other": len(responses)}
    trials = trials_of(sweep)
    assert [(t.point["loss.preset"], t.control_of) for t in trials] == [
        ("dpo", None),
        ("gdpo", None),
        ("dpo", 2),
        ("mallows_theta", None),
        ("dpo", 4),
        ("mrpo", None),
    ]
    assert {t.status for t in trials} == {"finished"}
    assert {t.step for t in trials} == {6}

    best = max((t for t in trials if t.control_of is None), key=lambda t: t.result["eval/accuracy"])
    assert record.registered == "models:/found/1"
    assert trials[record.best_trial - 1].result["eval/accuracy"] == best.result["eval/accuracy"]
    client = MlflowClient(f"sqlite:///{run.storage_path}/mlflow.db")
    version = client.get_model_version_by_alias("found", "best")
    assert version.tags["search"] == "first"
    assert version.tags["search.trial"] == str(record.best_trial)
    AutoModelForCausalLM.from_pretrained(
        folder_of(sweep) / "trials" / trials[record.best_trial - 1].name / "export" / "model"
    )
    experiment = client.get_experiment_by_name("polyref").experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{record.mlflow_run}'")
    assert {c.info.run_id for c in children} == {t.mlflow_run for t in trials}
    assert len(children) == len(trials)
    assert {c.data.params["loss.link.type"] for c in children} == {"sigmoid"}
    assert left_behind() == []

    other = {"loss.preset": {"grid": ["multi_dpo", "ipo"]}}
    again = run_sweep(sweep_of(run, "second", other, search={"algorithm": "grid", "trials": 2}))
    assert scored(again) == {"base": 0, "other": 0}
    assert scored(again, "replicas_started") == {"base": 0, "other": 0}


def test_bad_trials_are_stopped_or_fail_with_their_reason_and_leave_nothing_behind(run_of: Any) -> None:
    """Trials of two workers each, so that every trial starts a trainer of its own."""
    run = run_of(
        "base",
        training={"max_steps": 8, "save_every": 100},
        evaluation={"every_steps": 2},
        parallel={"workers": 2},
    )
    sweep = sweep_of(
        run,
        "asha",
        {"training.learning_rate": {"grid": [1e-2, 1e-9, 1e30]}},
        scheduler={"type": "asha", "grace_steps": 4, "reduction_factor": 2},
        objective="eval/margin",
        max_concurrent=1,
    )
    run_sweep(sweep)
    learning, idle, broken = trials_of(sweep)  # the second learns nothing, so its margin stays 0
    assert (learning.status, learning.step) == ("finished", 8)
    assert broken.status == "failed"
    assert broken.reason is not None
    assert re.search(r"not finite at step \d, pairs .*pairs.jsonl:\d+", broken.reason)
    assert (idle.status, idle.step) == ("stopped", 4)
    assert [
        line["step"] for line in read_metrics(folder_of(sweep) / "trials" / learning.name) if "loss" in line
    ] == [*range(1, 9)]
    assert left_behind() == []
