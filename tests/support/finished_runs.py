"""A run from its file to its registered version without Ray: what the workers would leave is put there."""

import json
import shutil
from pathlib import Path
from typing import Any

from orchestrator.config.run import load_run
from orchestrator.driver.execute import open_tracker
from orchestrator.driver.finish import finish_run
from orchestrator.driver.prepare import PreparedRun, prepare_run
from orchestrator.driver.record import RunRecord, open_record
from orchestrator.redaction import hide_secrets
from orchestrator.worker.result import WorkerResult
from tests.support.policies import Exported

PAIRS, HELD_OUT = 12, 8


def write_pairs(path: Path, count: int = PAIRS) -> Path:
    rows = [
        {"prompt": f"Film {n} is ", "chosen": "good", "rejected": "dull", "soft_label": 0.8}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def begin_run(
    policy: Exported, folder: Path, name: str = "films", **sections: Any
) -> tuple[PreparedRun, RunRecord]:
    """Prepare a run of the exported policy's base on a few pairs, and open its record."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "name": name,
        "storage_path": str(folder / "runs"),
        "policy": {"model": str(policy.base), "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
        "references": {"primary": "base", "models": {"base": {"model": "policy"}}},
        "data": {
            "train": str(write_pairs(folder / "pairs.jsonl")),
            "eval": str(write_pairs(folder / "held-out.jsonl", HELD_OUT)),
        },
        "loss": {"preset": "dpo"},
        "tracking": {"registered_model": "films"},
    }
    prepared = prepare_run(load_run(settings | sections)).for_device("cpu")
    new = RunRecord(
        config=hide_secrets(prepared.config.model_dump(mode="json")),
        device_type="cpu",
        identity=prepared.identity,
        pins=prepared.pins,
        counts=dict(prepared.counts),
    )
    return prepared, open_record(prepared.config.folder, new)


def train_and_finish(prepared: PreparedRun, record: RunRecord, policy: Exported, accuracy: float) -> None:
    """Leave what training leaves, the exported policy and its metrics, and finish the run."""
    tracker = open_tracker(prepared, record)
    for step, value in ((0, 0.5), (10, accuracy)):
        evaluation = {"eval/accuracy": value, "eval/accuracy_interval": 0.043, "eval/loss": 1 - value}
        tracker.log(step, evaluation | {"eval/label_nll": 1.1 - value})
    tracker.close()
    export = prepared.config.folder / "export"
    shutil.copytree(policy.merged, export / "model")
    shutil.copytree(policy.adapter, export / "adapter")
    policy.probe.save(export / "probe.safetensors")
    record.result = WorkerResult(
        status="done", step=10, exported_step=10, metrics={"eval/accuracy": accuracy}
    )
    finish_run(prepared, record)
