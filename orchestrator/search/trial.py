"""Run one trial under Ray Tune: a training run that reports its evaluations and exports nothing.

A single worker runs in Tune's own process; several workers are a group of Ray Train, started from there.
"""

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.config.functions import check_link
from orchestrator.config.run import RunConfig
from orchestrator.config.sections import METRICS
from orchestrator.config.sweep import Point, SweepConfig, build_trial_run
from orchestrator.errors import RunFailed, UsageError
from orchestrator.search.journal import read_trial
from orchestrator.tracking.metrics_file import METRICS_FILE, read_new_lines
from orchestrator.worker.result import WorkerResult
from orchestrator.worker.setup import WorkerSetup

ReportMetrics = Callable[..., None]
"""(metrics, checkpoint folder or None) -> None."""

NUMBER_KEY = "number"
"""Key of the trial's number in its Tune config, beside the point's fields; all else is in the journal."""


@dataclass(frozen=True, kw_only=True)
class TrialSetup:
    """The setup that all trials of a search share.

    Attributes:
        sweep: the sweep file.
        worker: setup of the run file that all trials start from, with paths resolved and every reference
            served; a trial replaces the fields that depend on its point.
        secrets: environment variables of the trials' processes.
        total_steps: optimizer steps of a trial.
    """

    sweep: SweepConfig
    worker: WorkerSetup
    secrets: dict[str, str]
    total_steps: int


def build_trial_config(
    sweep: SweepConfig, base: RunConfig, point: Point, *, repeat: int, name: str
) -> RunConfig:
    """Build the trial's run, with the models and data that the search has resolved.

    Raises:
        UsageError: the point makes no valid run.
    """
    run = build_trial_run(sweep, point, repeat=repeat, name=name)
    models = {}
    for name in run.references.models:
        if name not in base.references.models:
            raise UsageError(
                f"references.use names {name!r}, which the run file's own references.use leaves out"
            )
        models[name] = base.references.models[name]
    return run.model_copy(
        update={
            "policy": base.policy.model_copy(update={"adapter": run.policy.adapter}),
            "references": run.references.model_copy(update={"models": models}),
            "data": base.data,
            "storage_path": str(find_trials_folder(sweep, base)),
            "tracking": base.tracking,
        }
    )


def find_trials_folder(sweep: SweepConfig, base: RunConfig) -> Path:
    """Return the folder of the search's trials."""
    return Path(base.storage_path) / sweep.name / "trials"


def run_trial(config: dict[str, Any], shared: TrialSetup) -> None:
    """Start or resume a trial and report every evaluation, or why it gives up: Tune's trainable."""
    os.environ.update(shared.secrets)
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it logs every checkpoint at INFO
    logging.getLogger("ray.tune").setLevel(logging.WARNING)
    from ray import tune

    setup = _build_worker_setup(config, shared)
    reported: dict[str, Any] = {}

    def report_metrics(metrics: Mapping[str, Any], folder: Path | None = None) -> None:
        if any(name.startswith("eval/") for name in metrics):
            reported.update(metrics)
            # Only population based training copies checkpoints between trials; a trial's folder has its own.
            is_shared = folder is not None and shared.sweep.scheduler.type == "pbt"
            checkpoint = tune.Checkpoint.from_directory(folder) if is_shared else None
            tune.report(dict(metrics), checkpoint=checkpoint)

    result = (
        _run_in_process(setup, report_metrics)
        if setup.config.parallel.workers == 1
        else _run_worker_group(setup, report_metrics, total_steps=shared.total_steps)
    )
    if result.status != "done":
        tune.report({"failed": result.reason})
    elif reported.get("step") != result.step or setup.config.evaluation.keep == "best":
        # The trial was killed after its last step, or its best evaluation may be of an earlier start.
        report_metrics({"step": result.step, "total": result.step, **result.metrics})


def _build_worker_setup(config: Mapping[str, Any], shared: TrialSetup) -> WorkerSetup:
    """Build the workers' setup of one trial from the setup that all trials share and the trial's config."""
    point = {field: value for field, value in config.items() if "." in field}
    name = f"{config[NUMBER_KEY]:04d}"
    worker = shared.worker
    record = read_trial(find_trials_folder(shared.sweep, worker.config) / name)
    run = build_trial_config(shared.sweep, worker.config, point, repeat=record.repeat, name=name)
    used = run.references.ordered
    initial = worker.initial_policy_reference
    functions = check_link(run, worker.code_folder)
    identity = {name: value for name, value in worker.identity.items() if name != "functions"}
    return replace(
        worker,
        config=run,
        routers={name: worker.routers[name] for name in used},
        identity={
            **identity,
            "references": {name: worker.identity["references"][name] for name in used},
            **({"functions": functions} if functions else {}),
        },
        initial_policy_reference=initial if initial in used else None,
        folder=str(run.folder),
        tracking_run=str(record.mlflow_run),
    )


def _run_in_process(setup: WorkerSetup, report_metrics: ReportMetrics) -> WorkerResult:
    """Train in this process, as the trial's only worker."""
    import torch
    from ray import tune

    from orchestrator.worker.loop import train_worker
    from orchestrator.worker.session import LocalSession

    session = LocalSession(
        Path(setup.folder),
        device=torch.device("cuda", 0) if setup.bundle.get("GPU", 0) > 0 else torch.device("cpu"),
        keep_last=setup.config.training.keep_last,
        on_report=report_metrics,
    )
    # Tune has a checkpoint only under population based training, which copies them between trials.
    if (tune_checkpoint := tune.get_checkpoint()) is not None:
        with tune_checkpoint.as_directory() as folder:
            session.adopt_checkpoint(Path(folder))
    return train_worker(setup, session)


def _run_worker_group(setup: WorkerSetup, report_metrics: ReportMetrics, *, total_steps: int) -> WorkerResult:
    """Train with a group of workers, and report their evaluations from the metrics file that rank 0 writes.

    Tune's own callback for this passes reports from Train's controller through a queue of length one, and a
    report that finds the queue full at the trial's end waits for ever.
    """
    from orchestrator.worker.launch import run_workers

    evaluation, path = setup.config.evaluation, Path(setup.folder) / METRICS_FILE
    position = path.stat().st_size if path.exists() else 0
    sign, best = 1 if METRICS[evaluation.metric] == "max" else -1, dict[str, float]()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_workers, setup)
        while True:
            ended = not wait([running], timeout=0.5).not_done
            position, lines = read_new_lines(path, position)
            for line in lines:
                value = line.get(evaluation.metric)
                if line["step"] == 0 or value is None:
                    continue
                if evaluation.keep == "last" or not best or sign * value > sign * best[evaluation.metric]:
                    best = line
                report_metrics({**best, "step": line["step"], "total": total_steps})
            if ended:
                break
        try:
            return running.result()
        except RunFailed as error:  # Train has tried it again already
            return WorkerResult(status="failed", reason=str(error))
