"""Run a group of workers with Ray Train, from the command's process or from a trial's."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.cluster.connection import keep_ctrl_c_handler
from orchestrator.cluster.worker_environment import collect_secrets
from orchestrator.config.run import RunConfig
from orchestrator.errors import RunFailed
from orchestrator.storage.object_store import ray_storage_arguments
from orchestrator.storage.paths import is_uri
from orchestrator.worker.checkpoint import quarantine_corrupt_index
from orchestrator.worker.entry import run_worker
from orchestrator.worker.result import WorkerResult
from orchestrator.worker.session import CHECKPOINTS_FOLDER
from orchestrator.worker.setup import WorkerSetup


def run_workers(setup: WorkerSetup, *, callbacks: Sequence[Any] = ()) -> WorkerResult:
    """Run `train_worker` on all workers and return its result.

    Ray Train restarts the workers from the last checkpoint when one of them is lost.

    Raises:
        RunFailed: a worker raised, or was lost too often.
    """
    config = setup.config
    bundle = dict(setup.bundle)
    if not is_uri(setup.folder):  # an object store replaces the list in one move
        quarantine_corrupt_index(Path(setup.folder) / CHECKPOINTS_FOLDER)
    filesystem, path = ray_storage_arguments(setup.folder)
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"setup": ray.put(setup), "secrets": ray.put(collect_secrets(os.environ))},
        torch_config=TorchConfig(backend=_choose_backend(config, gpu=bundle.get("GPU", 0) > 0)),
        scaling_config=ScalingConfig(
            num_workers=config.parallel.workers,
            use_gpu=bundle.get("GPU", 0) > 0,
            resources_per_worker=bundle,
        ),
        run_config=RayRunConfig(
            name=CHECKPOINTS_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=config.parallel.max_failures, controller_failure_limit=0
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=config.training.keep_last),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
        ),
    )
    try:
        with keep_ctrl_c_handler():
            return trainer.fit().return_value
    except SystemExit:  # raised by Ray's own handler of Ctrl-C
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        raise RunFailed(_describe_cause(error)) from error


def _choose_backend(config: RunConfig, *, gpu: bool) -> str:
    """Return the backend of torch.distributed; offloaded shards are reduced on the CPU too."""
    if not gpu:
        return "gloo"
    return "cpu:gloo,cuda:nccl" if config.parallel.offload else "nccl"


def _describe_cause(error: ray.train.TrainingFailedError) -> str:
    """Describe the workers' own error in one line; the full traces are in the log of Ray."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    causes = {rank: getattr(failure, "cause", None) or failure for rank, failure in failures.items()}
    # A worker's RunFailed comes first: the others then only fail because that worker is gone.
    rank, cause = min(causes.items(), key=lambda item: (not isinstance(item[1], RunFailed), item[0]))
    message = str(cause).strip() or type(cause).__name__
    return f"worker {rank} failed: {message.splitlines()[-1]}"
