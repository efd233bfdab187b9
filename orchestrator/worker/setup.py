"""The settings that the command hands to every training worker, and the numbers that follow from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from models.config import ModelConfig
from orchestrator.config.run import RunConfig
from orchestrator.tracking.metrics_file import METRICS_FILE, SCALES_FILE
from orchestrator.worker.rewards import RewardScorer
from preferences.batches import BatchPlan

CALIBRATION_PAIRS = 2048
"""Largest number of training pairs in the sample that a mean over all pairs is estimated from."""

EXPORT_FOLDER, BEST_FILE = "export", "best.safetensors"
METRIC_FILES = (METRICS_FILE, SCALES_FILE)
"""In the run's folder; rank 0 writes them."""


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """Everything a worker needs, built once by the command that starts the run.

    Attributes:
        config: the run file.
        policy: the initial policy, pinned; every worker locates it on its own node.
        train, eval: object references to what `send_split` sends.
        routers: handles of the references' routers by name.
        identity: fingerprints and digests that a checkpoint must share to be resumed.
        initial_policy_reference: the name of the reference that equals the initial policy, if one does.
        bundle: the resources of each worker; decided by the command, which sees what an autoscaler may start.
        folder: the run's folder, or its URI on an object store.
        tracking_uri, tracking_run: the MLflow run that rank 0 sends metrics to.
        probe_path: a file that the command wrote to the storage; a worker that does not see it has other
            storage.
        code_folder: where the command was started; modules of functions that the run file names are searched
            there.
        reward_scorer: gives rewards to sampled responses, if the run file sets a reward.
        export: whether the trained policy is exported; a search exports only the one it promotes.
        vocabulary_sizes: of the references' tokenizers, by name.
        trials_per_node: runs that train on a machine at the same time and share its cores.
        stop_sign: name of the `StopSign` that asks training to stop, if anything can.
    """

    config: RunConfig
    policy: ModelConfig
    train: ray.ObjectRef
    eval: ray.ObjectRef | None
    routers: Mapping[str, Any]
    identity: dict[str, Any]
    initial_policy_reference: str | None
    bundle: Mapping[str, float]
    folder: str
    tracking_uri: str
    tracking_run: str
    probe_path: str | None = None
    code_folder: str = ""
    reward_scorer: RewardScorer | None = None
    export: bool = True
    vocabulary_sizes: Mapping[str, int] = field(default_factory=dict)
    trials_per_node: int = 1
    stop_sign: str | None = None


def count_total_steps(config: RunConfig, pairs: int) -> int:
    """Count the optimizer steps of a run over this many training pairs."""
    training = config.training
    plan = BatchPlan(pairs, training.pairs_per_step, training.seed)
    return training.max_steps or training.epochs * plan.steps_per_epoch


def sample_calibration_rows(pairs: int, seed: int) -> np.ndarray:
    """Draw a seeded sample of training rows to estimate a mean over all of them.

    Args:
        pairs: number of training pairs.
        seed: of the sample.

    Returns:
        (at most `CALIBRATION_PAIRS`,) row indices, sorted.
    """
    count = min(CALIBRATION_PAIRS, pairs)
    return np.sort(np.random.default_rng(seed).choice(pairs, size=count, replace=False))
