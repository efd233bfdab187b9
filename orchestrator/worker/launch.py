"""Run a group of workers with Ray Train, from the command's process or from a trial's."""

import logging
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
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.object_store import ray_storage_arguments
from orchestrator.storage.paths import is_uri
from orchestrator.worker.checkpoint import quarantine_corrupt_index
from orchestrator.worker.entry import run_worker
from orchestrator.worker.result import WorkerResult
from orchestrator.worker.session import CHECKPOINTS_FOLDER
from orchestrator.worker.setup import WorkerSetup

log = logging.getLogger(__name__)


def run_workers(setup: WorkerSetup, *, callbacks: Sequence[Any] = ()) -> WorkerResult:
    """Run `train_worker` on all workers and return its result.

    Ray Train restarts the workers from the last checkpoint when one of them is lost, and gives up after
    `parallel.max_failures`. It is started again if there was a new checkpoint meanwhile: failures that
    training gets over do not add up.

    Raises:
        RunFailed: a worker raised, or workers were lost too often without a new checkpoint.
    """
    mirror = Mirror(setup.folder)
    while True:
        checkpoints = mirror.list_folders(CHECKPOINTS_FOLDER)
        try:
            with keep_ctrl_c_handler():
                return _make_trainer(setup, callbacks).fit().return_value
        except SystemExit:  # raised by Ray's own handler of Ctrl-C
            raise KeyboardInterrupt from None
        except ray.train.TrainingFailedError as error:
            rank, cause = _find_cause(error)
            reason = f"worker {rank} failed: {_get_last_line(cause)}"
            if isinstance(cause, RunFailed) or mirror.list_folders(CHECKPOINTS_FOLDER) == checkpoints:
                raise RunFailed(reason) from error
            log.warning("%s; there was a new checkpoint before, so it is tried again", reason)


def _make_trainer(setup: WorkerSetup, callbacks: Sequence[Any]) -> TorchTrainer:
    config = setup.config
    bundle = dict(setup.bundle)
    if not is_uri(setup.folder):  # an object store replaces the list in one move
        quarantine_corrupt_index(Path(setup.folder) / CHECKPOINTS_FOLDER)
    filesystem, path = ray_storage_arguments(setup.folder)
    return TorchTrainer(
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


def _choose_backend(config: RunConfig, *, gpu: bool) -> str:
    """Return the backend of torch.distributed; offloaded shards are reduced on the CPU too."""
    if not gpu:
        return "gloo"
    return "cpu:gloo,cuda:nccl" if config.parallel.offload else "nccl"


def _find_cause(error: ray.train.TrainingFailedError) -> tuple[int, BaseException]:
    """Return the rank that failed and its own error; the full traces are in the log of Ray."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    causes = {rank: getattr(failure, "cause", None) or failure for rank, failure in failures.items()}
    # A worker's RunFailed comes first: the others then only fail because that worker is gone.
    return min(causes.items(), key=lambda item: (not isinstance(item[1], RunFailed), item[0]))


def _get_last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
