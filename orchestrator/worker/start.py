"""What a worker needs before its loop: batches, tracker, sampler, the last checkpoint, a calibrated loss."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from losses.config import LossConfig
from losses.dispersion import calibrate_phi_star
from models.parallel import Parallel
from orchestrator.cluster.shared_storage import explain_unshared_storage
from orchestrator.config.run import RunConfig
from orchestrator.references.client import ReferenceClient
from orchestrator.references.tolerance import TOLERANCE_16_BIT, choose_tolerance
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.probe import why_invisible
from orchestrator.tracking.metrics_file import read_findings, read_metrics
from orchestrator.tracking.tracker import Tracker
from orchestrator.worker.batches import BatchLoader
from orchestrator.worker.checkpoint import (
    BestEvaluation,
    TrainingProgress,
    find_damage,
    load_checkpoint,
    read_best_metadata,
)
from orchestrator.worker.eval_sets import EvaluationSets
from orchestrator.worker.policy import Policy
from orchestrator.worker.sampling import Sampler
from orchestrator.worker.session import Session
from orchestrator.worker.setup import BEST_FILE, WorkerSetup, sample_calibration_rows
from orchestrator.worker.watch import NumericalWatch
from preferences.split import TokenizedSplit

log = logging.getLogger(__name__)


def read_best_evaluation(config: RunConfig, mirror: Mirror) -> BestEvaluation | None:
    """Return the best evaluation that an earlier start of the run saved, if the best weights are kept."""
    evaluation = config.evaluation
    if evaluation.keep != "best":
        return None
    return read_best_metadata(mirror.folder / BEST_FILE, evaluation.metric)


def refuse_differing_ranks(policy: Policy, progress: TrainingProgress, best: BestEvaluation | None) -> None:
    """Raise unless every rank resumes from the same step: storage may show one of them an older state.

    Another start of the workers mends it.
    """
    own_steps = torch.tensor([progress.step, -1 if best is None else best.step], dtype=torch.float64)
    parallel = policy.parallel
    summed = parallel.all_reduce_sum(own_steps.to(parallel.device, copy=True)).cpu()
    if not torch.equal(summed, own_steps * parallel.world_size):
        raise RuntimeError(f"workers see different states of the run: step {progress.step} here, not on all")


def make_batch_loader(
    setup: WorkerSetup, split: TokenizedSplit, policy: Policy, *, rank: int, world_size: int
) -> BatchLoader:
    """Make the loader of this rank's share of a split's batches."""
    return BatchLoader(
        split,
        reference_names=setup.config.references.ordered,
        client=ReferenceClient(
            setup.routers,
            {name: split.references[name] for name in setup.config.references.ordered},
            scored_by_workers=[n for n, r in setup.config.references.models.items() if r.scored_by_workers],
        ),
        score_initial_policy=policy.score_initial_policy,
        on_any_rank=policy.parallel.needs_forward_pass,
        rank=rank,
        world_size=world_size,
        tokens_per_microbatch=setup.config.training.tokens_per_microbatch,
        shared_rows=policy.plain_rows_reason is None,
        pad_id=policy.pad_id,
        device=policy.parallel.device,
        count_flops=policy.count_flops,
    )


def refuse_unshared_storage(setup: WorkerSetup) -> None:
    """Raise if this node does not share the run's storage.

    The command has checked all nodes; one that joined later may have another folder of the same name.
    """
    reason = None if setup.probe_path is None else why_invisible(setup.probe_path)
    if reason is not None:
        node = ray.util.get_node_ip_address()
        raise RuntimeError(explain_unshared_storage(setup.config.storage_path, node, reason))


def open_worker_tracker(setup: WorkerSetup, folder: Path, progress: TrainingProgress) -> Tracker:
    """Open the run's metrics, without those logged after the checkpoint that the run resumes from."""
    resume_step = progress.step or -1  # a run that starts anew logs step 0 again
    return Tracker(setup.tracking_uri, setup.tracking_run, folder, resume_step=resume_step)


def open_watch(setup: WorkerSetup, policy: Policy, tracker: Tracker) -> NumericalWatch:
    """Open the numerical watch, which knows what earlier starts of the run have found.

    Dropout in the adapter makes the first step differ from the reference that the policy starts from.
    """
    config = setup.config
    adapter, device_type = config.policy.adapter, policy.parallel.device.type
    exact = policy.precision == torch.float32
    evaluations = (line for line in read_metrics(tracker.folder) if "eval/loss" in line)
    return NumericalWatch(
        report=tracker.log_finding,
        known=set(read_findings(tracker.folder)),
        initial_reference=None if adapter is not None and adapter.dropout else setup.initial_policy_reference,
        tolerance=choose_tolerance(config.policy, device_type) if exact else TOLERANCE_16_BIT,
        vocabulary_sizes=setup.vocabulary_sizes,
        first_evaluation=next(evaluations, None),
    )


def make_sampler(
    setup: WorkerSetup, session: Session, policy: Policy, eval_loader: BatchLoader | None
) -> Sampler | None:
    """Make the sampler of responses to held-out prompts, if the run file has a sampling section."""
    sampling, references = setup.config.evaluation.sampling, setup.config.references
    if sampling is None or eval_loader is None:
        return None
    return Sampler(
        sampling,
        policy,
        eval_loader.split,
        EvaluationSets.of_split(eval_loader.split, setup.config.judged_set).judged.numpy(),
        eval_loader.client,
        names=references.ordered,
        scored_by_workers=[
            name for name, reference in references.models.items() if reference.scored_by_workers
        ],
        reward_scorer=setup.reward_scorer,
        rank=session.rank,
        world_size=session.world_size,
        seed=setup.config.training.seed,
    )


@contextmanager
def open_newest_checkpoint(session: Session, parallel: Parallel) -> Iterator[Path | None]:
    """Yield the newest checkpoint that all ranks find whole, None if there is none.

    Each rank checks its share of the files. A damaged checkpoint is set aside with its reason.
    """
    names = [session.list_checkpoints()]
    if session.world_size > 1:
        torch.distributed.broadcast_object_list(names, src=0, device=parallel.device)
    for name in names[0]:
        with session.fetch_checkpoint(name) as folder:
            damage = find_damage(folder, rank=session.rank, world_size=session.world_size)
            flag = torch.tensor([float(damage is not None)], device=parallel.device)
            if not parallel.all_reduce_sum(flag).item():
                yield folder
                return
        if damage is not None:
            log.warning("checkpoint %s is set aside, and an older one is looked for: %s", name, damage)
            session.set_checkpoint_aside(name, damage)
    if names[0]:
        log.warning("none of %d checkpoints is whole: training starts at step 0", len(names[0]))
    yield None


def resume_training(setup: WorkerSetup, session: Session, policy: Policy, schedule: Any) -> TrainingProgress:
    """Restore weights, optimizer and schedule from the last checkpoint, and return its progress.

    Without a checkpoint nothing is restored, and the progress is that of a new run.
    """
    with open_newest_checkpoint(session, policy.parallel) as folder:
        if folder is None:
            return TrainingProgress(identity=setup.identity)
        progress = load_checkpoint(folder, policy.parallel, identity=setup.identity)
    # The rate is this run's, not the checkpoint's: a search may resume another trial's with a new rate.
    rate = setup.config.training.learning_rate
    scaled = rate * schedule.lr_lambdas[0](progress.step)
    groups = len(policy.parallel.optimizer.param_groups)  # another strategy may group weights differently
    rates = {"base_lrs": [rate] * groups, "_last_lr": [scaled] * groups, "lr_lambdas": [None] * groups}
    schedule.load_state_dict(progress.schedule | rates)
    policy.parallel.set_learning_rate(scaled)  # loading a schedule does not change the optimizer's rate
    return progress


def calibrate_loss(
    config: RunConfig, train_loader: BatchLoader, progress: TrainingProgress
) -> tuple[LossConfig, TrainingProgress]:
    """Resolve `phi_star: auto` of the loss from the primary reference's scores of a seeded sample of pairs.

    Every rank reads the whole sample, whose scores the routers compute once, so all get the same number. Its
    pairs count alike, whatever their weights.
    """
    loss = config.loss
    if not loss.needs_calibration:
        return loss, progress
    if progress.phi_star is None:
        sample = sample_calibration_rows(len(train_loader.split), config.training.seed)
        entropies = train_loader.collect_primary_entropies(sample)
        progress = replace(progress, phi_star=calibrate_phi_star(entropies))
    assert progress.phi_star is not None
    return loss.with_phi_star(progress.phi_star), progress
