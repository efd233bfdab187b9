"""What every training worker is given, and the numbers that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from models.config import ModelConfig
from orchestrator.config.run import RunConfig
from orchestrator.tracking.metrics_file import METRICS_FILE, SCALES_FILE
from orchestrator.worker.rewards import RewardScorer
from preferences.batches import BatchPlan

CALIBRATION_PAIRS = 2048


EXPORT_FOLDER, BEST_FILE = "export", "best.safetensors"


METRIC_FILES = (METRICS_FILE, SCALES_FILE)


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """Everything a worker needs, made once by the command that starts the run.

    Attributes:
        config: the run file.
        policy: the policy's start, pinned; every worker locates it on its own node.
        train, held_out: object references to `Part`s.
        routers: handles of the served references' routers by name.
        identity: fingerprints and digests that a checkpoint must share to be resumed.
        start_is: the reference that equals the policy's start, if one does.
        bundle: what each worker asks for; decided by the command, which sees what an autoscaler may start.
        folder: the run's folder, or its URI on an object store.
        seen: a file in the storage that the command wrote; a worker that does not see it is elsewhere.
        tracking_uri, tracking_run: the MLflow run that rank 0 sends metrics to.
        code_folder: where the command was started: modules of functions that the run file names are searched there.
        judge: what rewards sampled responses, where a reward is set.
        export: whether the trained policy is exported; a search exports only the one it promotes.
        neighbours: runs like this one on the machine at once, which share its cores.
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
    trials_per_node: int = 1


def count_total_steps(config: RunConfig, pairs: int) -> int:
    """Optimizer steps of a run over so many training pairs."""
    training = config.training
    plan = BatchPlan(pairs, training.pairs_per_step, training.seed)
    return training.max_steps or training.epochs * plan.steps_per_epoch


def sample_calibration_rows(pairs: int, seed: int) -> np.ndarray:
    """The seeded sample of so many training pairs that stands for all where a mean over them is needed."""
    count = min(CALIBRATION_PAIRS, pairs)
    return np.sort(np.random.default_rng(seed).choice(pairs, size=count, replace=False))
