"""What Ray Tune runs: one trial, a training run that reports its evaluations and exports nothing.

A trial of one worker is that worker, in Tune's process; several are a group of Ray Train, started from it.
"""

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.config.functions import check_functions
from orchestrator.config.run import RunConfig
from orchestrator.config.sections import METRICS
from orchestrator.config.sweep import Point, SweepConfig, build_trial_run
from orchestrator.errors import RunFailed, UsageError
from orchestrator.search.journal import read_trial
from orchestrator.tracking.metrics_file import METRICS_FILE, read_new_lines
from orchestrator.worker.result import WorkerResult
from orchestrator.worker.setup import WorkerSetup

Tell = Callable[..., None]
"""Gets a report's metrics, and the checkpoint written with it."""

NUMBER = "number"
"""What a trial's config has besides its point; the rest of it is in the journal."""


@dataclass(frozen=True, kw_only=True)
class TrialSetup:
    """Everything that is the same for all trials of a search.

    Attributes:
        sweep: the sweep file.
        worker: of the run file that all trials start from, with paths resolved and every reference served; a
            trial replaces what depends on its point.
        secrets: environment variables of the trials' processes.
        total: optimizer steps of a trial.
    """

    sweep: SweepConfig
    worker: WorkerSetup
    secrets: dict[str, str]
    total: int


def build_trial_config(
    sweep: SweepConfig, base: RunConfig, point: Point, *, repeat: int, name: str
) -> RunConfig:
    """The trial's run over the models and data that the search has found and resolved.

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
    """Where the search's trials are."""
    return Path(base.storage_path) / sweep.name / "trials"


def run_trial(config: dict[str, Any], shared: TrialSetup) -> None:
    """Tune's trainable: go on where the trial was, report every evaluation, tell why if it gives up."""
    os.environ.update(shared.secrets)
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # which tells of every checkpoint at INFO
    logging.getLogger("ray.tune").setLevel(logging.WARNING)
    from ray import tune

    setup = _build_worker_setup(config, shared)
    told: dict[str, Any] = {}

    def tell(metrics: Mapping[str, Any], written: Path | None = None) -> None:
        if any(name.startswith("eval/") for name in metrics):
            told.update(metrics)
            # Only population based training hands checkpoints around; a trial's folder has its own.
            passed_on = written is not None and shared.sweep.scheduler.type == "pbt"
            checkpoint = tune.Checkpoint.from_directory(written) if passed_on else None
            tune.report(dict(metrics), checkpoint=checkpoint)

    result = (
        _run_in_process(setup, shared, tell)
        if setup.config.parallel.workers == 1
        else _run_worker_group(setup, shared, tell)
    )
    if result.status != "done":
        tune.report({"failed": result.reason})
    elif told.get("step") != result.step or setup.config.evaluation.keep == "best":
        # A trial that was killed after its last step; or whose best was before the start that told the last.
        tell({"step": result.step, "total": result.step, **result.metrics})


def _build_worker_setup(config: Mapping[str, Any], shared: TrialSetup) -> WorkerSetup:
    point = {field: value for field, value in config.items() if "." in field}
    name = f"{config[NUMBER]:04d}"
    worker = shared.worker
    record = read_trial(find_trials_folder(shared.sweep, worker.config) / name)
    run = build_trial_config(shared.sweep, worker.config, point, repeat=record.repeat, name=name)
    used = run.references.ordered
    initial = worker.initial_policy_reference
    functions = check_functions(run, worker.code_folder)
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


def _run_in_process(setup: WorkerSetup, shared: TrialSetup, tell: Tell) -> WorkerResult:
    """The trial's only worker is this process."""
    import torch
    from ray import tune

    from orchestrator.worker.loop import train_worker
    from orchestrator.worker.session import LocalSession

    session = LocalSession(
        Path(setup.folder),
        device=torch.device("cuda", 0) if setup.bundle.get("GPU", 0) > 0 else torch.device("cpu"),
        keep_last=setup.config.training.keep_last,
        on_report=tell,
    )
    if (handed := tune.get_checkpoint()) is not None:
        with handed.as_directory() as folder:
            session.adopt_checkpoint(Path(folder))
    return train_worker(setup, session)


def _run_worker_group(setup: WorkerSetup, shared: TrialSetup, tell: Tell) -> WorkerResult:
    """A group of workers; their evaluations are read from the file that rank 0 writes.

    Tune's own callback for this passes reports through a queue of one place from Train's controller, and a
    report that finds it full at the trial's end waits for ever.
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
                tell({**best, "step": line["step"], "total": shared.total})
            if ended:
                break
        try:
            return running.result()
        except RunFailed as error:  # Train has tried it again already
            return WorkerResult(status="failed", reason=str(error))
