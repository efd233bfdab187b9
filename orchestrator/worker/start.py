"""What a worker's loop starts from: batches, tracker, sampler, the last checkpoint, a calibrated loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from losses.config import LossConfig
from losses.dispersion import calibrate_phi_star
from orchestrator.cluster.shared_storage import explain_unshared_storage
from orchestrator.config.run import RunConfig
from orchestrator.references.client import ReferenceClient
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.probe import why_invisible
from orchestrator.tracking.tracker import Tracker
from orchestrator.worker.batches import BatchLoader
from orchestrator.worker.checkpoint import BestEvaluation, TrainingProgress, load_checkpoint, read_best
from orchestrator.worker.policy import Policy
from orchestrator.worker.sampling import Sampler
from orchestrator.worker.session import Session
from orchestrator.worker.setup import BEST_FILE, WorkerSetup, sample_calibration_rows
from preferences.split import TokenizedSplit


def read_best_evaluation(config: RunConfig, mirror: Mirror) -> BestEvaluation | None:
    """What an earlier start kept as the best, where the best is kept."""
    evaluation = config.evaluation
    return read_best(mirror.folder / BEST_FILE, evaluation.metric) if evaluation.keep == "best" else None


def refuse_differing_ranks(policy: Policy, progress: TrainingProgress, best: BestEvaluation | None) -> None:
    """Raise unless every rank goes on from the same point: storage may show one of them an older state.

    Another start of the workers puts it right.
    """
    mine = torch.tensor([progress.step, -1 if best is None else best.step], dtype=torch.float64)
    parallel = policy.parallel
    summed = parallel.all_reduce_sum(mine.to(parallel.device, copy=True)).cpu()
    if not torch.equal(summed, mine * parallel.world_size):
        raise RuntimeError(f"workers see different states of the run: step {progress.step} here, not on all")


def make_batch_loader(
    setup: WorkerSetup, part: TokenizedSplit, policy: Policy, *, rank: int, world_size: int
) -> BatchLoader:
    return BatchLoader(
        part,
        order=setup.config.references.ordered,
        client=ReferenceClient(
            setup.routers,
            {name: part.references[name] for name in setup.config.references.ordered},
            in_process=[n for n, r in setup.config.references.models.items() if r.scored_by_workers],
        ),
        score_start=policy.score_start,
        on_any_rank=policy.parallel.on_any_rank,
        rank=rank,
        world_size=world_size,
        tokens_per_microbatch=setup.config.training.tokens_per_microbatch,
        shared_rows=policy.plain_rows_reason is None,
        pad_id=policy.pad_id,
        device=policy.parallel.device,
        flops=policy.count_flops,
    )


def refuse_unshared_storage(setup: WorkerSetup) -> None:
    """A node that came after the command had looked at all may have another folder of the same name."""
    why = None if setup.probe_path is None else why_invisible(setup.probe_path)
    if why is not None:
        node = ray.util.get_node_ip_address()
        raise RuntimeError(explain_unshared_storage(setup.config.storage_path, node, why))


def open_worker_tracker(setup: WorkerSetup, folder: Path, progress: TrainingProgress) -> Tracker:
    """The run's metrics, without those that came after the checkpoint it goes on from."""
    after = progress.step or -1
    return Tracker(setup.tracking_uri, setup.tracking_run, folder, resume_step=after)


def make_sampler(
    setup: WorkerSetup, session: Session, policy: Policy, feed: BatchLoader | None
) -> Sampler | None:
    sampling, references = setup.config.evaluation.sampling, setup.config.references
    if sampling is None or feed is None:
        return None
    return Sampler(
        sampling,
        policy,
        feed.split,
        feed.client,
        names=references.ordered,
        in_process=[name for name, reference in references.models.items() if reference.scored_by_workers],
        judge=setup.reward_scorer,
        rank=session.rank,
        world_size=session.world_size,
        seed=setup.config.training.seed,
    )


def resume_training(setup: WorkerSetup, session: Session, policy: Policy, schedule: Any) -> TrainingProgress:
    """Where the run stood at its last checkpoint, weights and optimizer put back; or its start."""
    with session.checkpoint() as folder:
        if folder is None:
            return TrainingProgress(identity=setup.identity)
        progress = load_checkpoint(folder, policy.parallel, identity=setup.identity)
    # The rate is this run's, not the checkpoint's: a search may go on from another trial's with a new one.
    rate = setup.config.training.learning_rate
    scaled = rate * schedule.lr_lambdas[0](progress.step)
    groups = len(policy.parallel.optimizer.param_groups)  # another strategy may group weights otherwise
    rates = {"base_lrs": [rate] * groups, "_last_lr": [scaled] * groups, "lr_lambdas": [None] * groups}
    schedule.load_state_dict(progress.schedule | rates)
    policy.parallel.set_learning_rate(scaled)  # loading a schedule leaves the optimizer's
    return progress


def calibrate_loss(
    config: RunConfig, feed: BatchLoader, progress: TrainingProgress
) -> tuple[LossConfig, TrainingProgress]:
    """The loss with `phi_star: auto` resolved from the primary's scores of a seeded sample of pairs.

    Every rank reads the whole sample, whose scores the routers compute once, so all get the same number.
    """
    loss = config.loss
    if not loss.needs_calibration:
        return loss, progress
    if progress.phi_star is None:
        sample = sample_calibration_rows(len(feed.split), config.training.seed)
        progress = replace(progress, phi_star=calibrate_phi_star(feed.read_primary_entropies(sample)))
    assert progress.phi_star is not None
    return loss.with_phi_star(progress.phi_star), progress
