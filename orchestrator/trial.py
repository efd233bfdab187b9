"""What Ray Tune runs: one trial, a training run that reports its evaluations and exports nothing.

A trial of one worker is that worker, in Tune's process; several are a group of Ray Train, started from it.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from models.config import ModelConfig
from orchestrator.config import RunConfig
from orchestrator.rewards import Judge
from orchestrator.sweep import Point, SweepConfig, trial_run
from orchestrator.trials import read_trial

NUMBER = "number"
"""What a trial's config has besides its point; the rest of it is in the journal."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Everything that is the same for all trials of a search.

    Attributes:
        sweep: the sweep file.
        base: its run file with paths resolved, every reference served.
        policy: the policy's start, pinned.
        train, held_out: object references to the tokenised rows.
        routers: of all references, by name.
        identity: fingerprints and digests that a checkpoint must share to be resumed.
        start_is: the reference that equals the policy's start, if one does.
        tracking_uri: the MLflow server.
        judge: what rewards sampled responses, if a reward is set.
        secrets: environment of the trials' processes.
        gpus: whether the cluster has any.
        at_once: trials that run side by side.
    """

    sweep: SweepConfig
    base: RunConfig
    policy: ModelConfig
    train: ray.ObjectRef
    held_out: ray.ObjectRef
    routers: Mapping[str, Any]
    identity: dict[str, Any]
    start_is: str | None
    tracking_uri: str
    judge: Judge | None
    secrets: dict[str, str]
    gpus: bool
    at_once: int


def trial_config(sweep: SweepConfig, base: RunConfig, point: Point, *, repeat: int, name: str) -> RunConfig:
    """The trial's run over the models and data that the search has found and resolved.

    Raises:
        UsageError: the point makes no valid run.
    """
    run = trial_run(sweep, point, repeat=repeat, name=name)
    models = {name: base.references.models[name] for name in run.references.models}
    return run.model_copy(
        update={
            "policy": base.policy.model_copy(update={"adapter": run.policy.adapter}),
            "references": run.references.model_copy(update={"models": models}),
            "data": base.data,
            "storage_path": str(trials_folder(sweep, base)),
            "tracking": base.tracking,
        }
    )


def trials_folder(sweep: SweepConfig, base: RunConfig) -> Path:
    """Where the search's trials are."""
    return Path(base.storage_path) / sweep.name / "trials"


def run_trial(config: dict[str, Any], shared: Shared) -> None:
    """Tune's trainable: go on where the trial was, report every evaluation, tell why if it gives up."""
    os.environ.update(shared.secrets)
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # which tells of every checkpoint at INFO
    logging.getLogger("ray.tune").setLevel(logging.WARNING)
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from orchestrator.fit import run_workers
    from orchestrator.worker import train_worker

    setup = _setup(config, shared)
    told: dict[str, Any] = {}

    def tell(metrics: Mapping[str, float], written: Path | None) -> None:
        if not any(name.startswith("eval/") for name in metrics):
            return
        told.update(metrics)
        # Only population based training hands checkpoints around; otherwise the trial's folder has its own.
        passed_on = written is not None and shared.sweep.scheduler.type == "pbt"
        tune.report(dict(metrics), checkpoint=tune.Checkpoint.from_directory(written) if passed_on else None)

    if setup.config.parallel.workers > 1:
        result = run_workers(setup, gpus=shared.gpus, callbacks=[TuneReportCallback()])
    else:
        result = train_worker(setup, _alone(setup, shared, tell))
    if result["status"] != "done":
        tune.report({"failed": result["reason"]})
    elif told.get("step") != result["step"]:  # a trial that was killed after its last step
        tune.report({"step": result["step"], "total": result["step"], **result["metrics"]})


def _setup(config: Mapping[str, Any], shared: Shared) -> Any:
    from orchestrator.worker import WorkerSetup

    point = {field: value for field, value in config.items() if "." in field}
    name = f"{config[NUMBER]:04d}"
    record = read_trial(trials_folder(shared.sweep, shared.base) / name)
    run = trial_config(shared.sweep, shared.base, point, repeat=record.repeat, name=name)
    used = run.references.ordered
    references = {name: shared.identity["references"][name] for name in used}
    return WorkerSetup(
        config=run,
        policy=shared.policy,
        train=shared.train,
        held_out=shared.held_out,
        routers={name: shared.routers[name] for name in used},
        identity={**shared.identity, "references": references},
        start_is=shared.start_is if shared.start_is in used else None,
        folder=str(run.folder),
        tracking_uri=shared.tracking_uri,
        tracking_run=str(record.mlflow_run),
        judge=shared.judge,
        export=False,
    )


def _alone(setup: Any, shared: Shared, tell: Any) -> Any:
    import torch
    from ray import tune

    from orchestrator.session import Alone

    handed = tune.get_checkpoint()
    return Alone(
        Path(setup.folder),
        device=torch.device("cuda", 0) if shared.gpus and torch.cuda.is_available() else torch.device("cpu"),
        neighbours=shared.at_once,
        keep_last=setup.config.training.keep_last,
        tell=tell,
        start=None if handed is None else Path(handed.to_directory()),
    )
