"""What a worker's loop starts from: batches, tracker, sampler, the last checkpoint, a calibrated loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from losses.config import LossConfig
from losses.dispersion import calibrated_phi_star
from orchestrator.cluster.shared_storage import unshared
from orchestrator.config.run import RunConfig
from orchestrator.references.client import ReferenceClient
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.probe import visible
from orchestrator.tracking.tracker import Tracker
from orchestrator.worker.batches import Feed
from orchestrator.worker.checkpoint import Best, Progress, best_in, load
from orchestrator.worker.policy import Policy
from orchestrator.worker.sampling import Sampler
from orchestrator.worker.session import Session
from orchestrator.worker.setup import BEST, WorkerSetup, calibration_rows
from preferences.split import Part


def _best(config: RunConfig, mirror: Mirror) -> Best | None:
    """What an earlier start kept as the best, where the best is kept."""
    evaluation = config.evaluation
    return best_in(mirror.folder / BEST, evaluation.metric) if evaluation.keep == "best" else None


def _refuse_out_of_step(policy: Policy, progress: Progress, best: Best | None) -> None:
    """Raise unless every rank goes on from the same point: storage may show one of them an older state.

    Another start of the workers puts it right.
    """
    mine = torch.tensor([progress.step, -1 if best is None else best.step], dtype=torch.float64)
    parallel = policy.parallel
    summed = parallel.all_reduce_sum(mine.to(parallel.device, copy=True)).cpu()
    if not torch.equal(summed, mine * parallel.world_size):
        raise RuntimeError(f"workers see different states of the run: step {progress.step} here, not on all")


def _feed(setup: WorkerSetup, part: Part, policy: Policy, *, rank: int, world_size: int) -> Feed:
    return Feed(
        part,
        order=setup.config.references.ordered,
        client=ReferenceClient(
            setup.routers,
            {name: part.references[name] for name in setup.config.references.ordered},
            in_process=[n for n, r in setup.config.references.models.items() if r.in_process],
        ),
        score_start=policy.score_start,
        on_any_rank=policy.parallel.on_any_rank,
        rank=rank,
        world_size=world_size,
        tokens_per_microbatch=setup.config.training.tokens_per_microbatch,
        shared_rows=policy.sharing_refused is None,
        pad_id=policy.pad_id,
        device=policy.parallel.device,
        flops=policy.flops,
    )


def _refuse_elsewhere(setup: WorkerSetup) -> None:
    """A node that came after the command had looked at all may have another folder of the same name."""
    why = None if setup.seen is None else visible(setup.seen)
    if why is not None:
        node = ray.util.get_node_ip_address()
        raise RuntimeError(unshared(setup.config.storage_path, node, why))


def _journal(setup: WorkerSetup, folder: Path, progress: Progress) -> Tracker:
    """The run's metrics, without those that came after the checkpoint it goes on from."""
    after = progress.step or -1
    return Tracker(setup.tracking_uri, setup.tracking_run, folder, resume_step=after)


def _sampler(setup: WorkerSetup, session: Session, policy: Policy, feed: Feed | None) -> Sampler | None:
    sampling, references = setup.config.evaluation.sampling, setup.config.references
    if sampling is None or feed is None:
        return None
    return Sampler(
        sampling,
        policy,
        feed.part,
        feed.client,
        names=references.ordered,
        in_process=[name for name, reference in references.models.items() if reference.in_process],
        judge=setup.judge,
        rank=session.rank,
        world_size=session.world_size,
        seed=setup.config.training.seed,
    )


def _resume(setup: WorkerSetup, session: Session, policy: Policy, schedule: Any) -> Progress:
    """Where the run stood at its last checkpoint, weights and optimizer put back; or its start."""
    with session.checkpoint() as folder:
        if folder is None:
            return Progress(identity=setup.identity)
        progress = load(folder, policy.parallel, identity=setup.identity)
    # The rate is this run's, not the checkpoint's: a search may go on from another trial's with a new one.
    rate = setup.config.training.learning_rate
    scaled = rate * schedule.lr_lambdas[0](progress.step)
    groups = len(policy.parallel.optimizer.param_groups)  # another strategy may group weights otherwise
    rates = {"base_lrs": [rate] * groups, "_last_lr": [scaled] * groups, "lr_lambdas": [None] * groups}
    schedule.load_state_dict(progress.schedule | rates)
    policy.parallel.set_learning_rate(scaled)  # loading a schedule leaves the optimizer's
    return progress


def _calibrated(config: RunConfig, feed: Feed, progress: Progress) -> tuple[LossConfig, Progress]:
    """The loss with `phi_star: auto` resolved from the primary's scores of a seeded sample of pairs.

    Every rank reads the whole sample, whose scores the routers compute once, so all get the same number.
    """
    loss = config.loss
    if not loss.needs_calibration:
        return loss, progress
    if progress.phi_star is None:
        sample = calibration_rows(len(feed.part), config.training.seed)
        progress = replace(progress, phi_star=calibrated_phi_star(feed.primary_entropies(sample)))
    assert progress.phi_star is not None
    return loss.with_phi_star(progress.phi_star), progress
