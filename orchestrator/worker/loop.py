"""What every training worker runs. The second file to read, after `losses/preference.py`.

`train_worker` reads top to bottom: the policy, what feeds it, where it stood, and the loop. A batch's
reference scores are asked for two batches before they are needed, so replicas score while the policy learns.
"""

import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import get_scheduler

from losses.config import LossConfig
from losses.dispersion import calibrated_phi_star
from models.config import ModelConfig, ModelError
from orchestrator.config.run import METRICS, RunConfig, RunFailed
from orchestrator.references.client import ReferenceClient
from orchestrator.storage.mirror import Mirror, unshared, visible
from orchestrator.tracking.tracker import METRICS_FILE, SCALES_FILE, Tracker
from orchestrator.worker import checkpoint
from orchestrator.worker.batches import Feed, Part
from orchestrator.worker.checkpoint import Best, Progress
from orchestrator.worker.metrics import (
    StepTable,
    Told,
    best_within,
    held_out_metrics,
    perf_metrics,
    training_metrics,
)
from orchestrator.worker.policy import Policy, export_policy, open_policy
from orchestrator.worker.rewards import Judge
from orchestrator.worker.sampling import Sampler
from orchestrator.worker.session import Session
from orchestrator.worker.step import NonFiniteLoss, evaluation_pass, training_step
from preferences.batches import BatchPlan

BATCHES_AHEAD = 2
CALIBRATION_PAIRS = 2048
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
EXPORT, BEST = "export", "best.safetensors"
JOURNAL = (METRICS_FILE, SCALES_FILE)


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
        judge: what rewards sampled responses, where a reward is set.
        export: whether the trained policy is exported; a search exports only the one it promotes.
        neighbours: runs like this one on the machine at once, which share its cores.
    """

    config: RunConfig
    policy: ModelConfig
    train: ray.ObjectRef
    held_out: ray.ObjectRef | None
    routers: Mapping[str, Any]
    identity: dict[str, Any]
    start_is: str | None
    bundle: Mapping[str, float]
    folder: str
    tracking_uri: str
    tracking_run: str
    seen: str | None = None
    judge: Judge | None = None
    export: bool = True
    neighbours: int = 1


def train_worker(setup: WorkerSetup, session: Session) -> dict[str, Any]:
    """Train until the last step and export the policy.

    Returns:
        `{"status": "done", "step": n, "metrics": {...}}` of the exported weights; or what a restart would
        only repeat: `{"status": "diverged" | "refused" | "failed", "reason": ...}` when a loss is not finite,
        a model cannot be used as asked, or the judge of samples fails.

    Raises:
        RunFailed: the last of these happened to one of several workers, whose others must not wait for it.
    """
    logging.getLogger().setLevel(logging.WARNING)  # Train logs every report at INFO
    _refuse_elsewhere(setup)
    mirror, writes = Mirror(setup.folder, worker=session.rank), session.rank == 0
    mirror.pull(BEST, *(JOURNAL if writes else ()))
    try:
        with mirror.pushing(*JOURNAL) if writes else nullcontext():
            return _train(setup, session, mirror)
    except ModelError as error:  # the same on every rank, see `together`
        return {"status": "refused", "reason": str(error)}
    except RunFailed as error:
        if session.world_size > 1:
            raise
        return {"status": "failed", "reason": str(error)}
    finally:
        mirror.discard()


def _train(setup: WorkerSetup, session: Session, mirror: Mirror) -> dict[str, Any]:
    config, rank, world_size = setup.config, session.rank, session.world_size
    sharing = session.local_workers * setup.neighbours
    policy = open_policy(config, setup.policy, device=session.device, local_workers=sharing)
    parts = {"train": ray.get(setup.train), "eval": ray.get(setup.held_out) if setup.held_out else None}
    feeds = {
        split: _feed(setup, part, policy, rank=rank, world_size=world_size)
        for split, part in parts.items()
        if part is not None
    }
    plan = BatchPlan(len(parts["train"]), config.training.pairs_per_step, config.training.seed)
    total = total_steps(config, plan.count)

    schedule = get_scheduler(
        _SCHEDULES[config.training.schedule],
        policy.parallel.optimizer,
        num_warmup_steps=round(config.training.warmup * total),
        num_training_steps=total,
    )
    progress, best = _resume(setup, session, policy, schedule), _best(config, mirror)
    _refuse_out_of_step(policy, progress, best)
    journal = _journal(setup, mirror.folder, progress) if rank == 0 else None
    loss, progress = _calibrated(config, feeds["train"], progress)
    run = _Run(setup, session, mirror, policy, feeds, plan, loss, journal, best)
    for step in range(progress.step, min(progress.step + BATCHES_AHEAD, total)):
        run.ask(step)
    if progress.step == 0 and "eval" in feeds:
        progress = run.evaluate(progress, 0, start_is=setup.start_is)
    for step in range(progress.step, total):
        if step + BATCHES_AHEAD < total:
            run.ask(step + BATCHES_AHEAD)
        torch.manual_seed(config.training.seed * 1_000_003 + step * world_size + rank)
        try:
            run.train(step, learning_rate=schedule.get_last_lr()[0])
        except NonFiniteLoss as failure:
            run.close()
            return {"status": "diverged", "reason": run.describe(failure, step)}
        schedule.step()

        taken, last = step + 1, step + 1 == total
        evaluated = "eval" in feeds and (last or taken % config.evaluation.every_steps == 0)
        if evaluated:
            progress = run.evaluate(progress, taken)
        due = last or taken % config.training.save_every == 0
        if due or evaluated:
            run.keep_journal()
        metrics = {
            "step": taken,
            "total": total,
            **(run.judged_by(progress) if evaluated else {}),
        }
        if due:
            progress = replace(progress, step=taken, schedule=schedule.state_dict())
            session.report(metrics, partial(checkpoint.save, parallel=policy.parallel, progress=progress))
        elif evaluated:
            session.report(metrics)
    run.close()
    if setup.export:
        if run.best is not None:
            mirror.pull(BEST)
            checkpoint.load_best(mirror.folder / BEST, policy.parallel)
        probes = [parts["train"].policy[row].prompt for row in range(min(4, len(parts["train"])))]
        export_policy(policy, mirror.folder / EXPORT, probes=probes)
        if rank == 0:
            mirror.push(EXPORT)
    return {
        "status": "done",
        "step": total,
        "exported_step": total if run.best is None else run.best.step,
        "metrics": run.judged_by(progress),
        "phi_star": progress.phi_star,
        "sharing_refused": policy.sharing_refused,
    }


def _best(config: RunConfig, mirror: Mirror) -> Best | None:
    """What an earlier start kept as the best, where the best is kept."""
    evaluation = config.evaluation
    return checkpoint.best_in(mirror.folder / BEST, evaluation.metric) if evaluation.keep == "best" else None


def _refuse_out_of_step(policy: Policy, progress: Progress, best: Best | None) -> None:
    """Raise unless every rank goes on from the same point: storage may show one of them an older state.

    Another start of the workers puts it right.
    """
    mine = torch.tensor([progress.step, -1 if best is None else best.step], dtype=torch.float64)
    parallel = policy.parallel
    summed = parallel.all_reduce_sum(mine.to(parallel.device, copy=True)).cpu()
    if not torch.equal(summed, mine * parallel.world_size):
        raise RuntimeError(f"workers see different states of the run: step {progress.step} here, not on all")


def total_steps(config: RunConfig, pairs: int) -> int:
    """Optimizer steps of a run over so many training pairs."""
    training = config.training
    plan = BatchPlan(pairs, training.pairs_per_step, training.seed)
    return training.max_steps or training.epochs * plan.steps_per_epoch


def calibration_rows(pairs: int, seed: int) -> np.ndarray:
    """The seeded sample of so many training pairs that stands for all where a mean over them is needed."""
    count = min(CALIBRATION_PAIRS, pairs)
    return np.sort(np.random.default_rng(seed).choice(pairs, size=count, replace=False))


class _Run:
    """The verbs of the loop, bound to this rank's policy and feeds."""

    def __init__(
        self,
        setup: WorkerSetup,
        session: Session,
        mirror: Mirror,
        policy: Policy,
        feeds: dict[str, Feed],
        plan: BatchPlan,
        loss: LossConfig,
        journal: Tracker | None,
        best: Best | None,
    ) -> None:
        self._setup, self._policy, self._feeds, self._plan = setup, policy, feeds, plan
        self._loss, self._journal, self._mirror = loss, journal, mirror
        self.best = best
        self._names = setup.config.references.ordered
        self._sampler = _sampler(setup, session, policy, feeds.get("eval"))
        self._told = Told(
            paired=feeds["train"].part.paired,
            soft=any(feed.part.soft and feed.part.paired for feed in feeds.values()),
            dispersed=loss.dispersion.type != "none",
            weighted=len(self._names) > 1 and not loss.reference_free,
        )

    def ask(self, step: int) -> None:
        """Ask the references for a coming step's scores."""
        self._feeds["train"].ask(("train", step), self._indices(step))

    def train(self, step: int, *, learning_rate: float) -> None:
        """One optimizer step, and its metrics."""
        started = time.perf_counter()
        training, indices = self._setup.config.training, self._indices(step)
        batches, waited = self._feeds["train"].collect(("train", step), indices)
        table = self._table(len(indices))
        table.spend(waited)
        table, grad_norm = training_step(
            self._policy.parallel,
            list(batches),
            loss=self._loss,
            table=table,
            clip_norm=training.clip_norm,
            precision=self._policy.precision,
        )
        if self._journal is None:
            return
        metrics = training_metrics(table, self._told)
        metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
        metrics |= {"epoch": (step + 1) / self._plan.steps_per_epoch}
        metrics |= perf_metrics(
            table,
            seconds=time.perf_counter() - started,
            world_size=self._policy.parallel.world_size,
            peak_flops=self._policy.peak_flops,
        )
        self._journal.log(step + 1, metrics)
        if self._told.dispersed:
            self._journal.log_scales(table["scale"].tolist())

    def evaluate(self, before: Progress, step: int, *, start_is: str | None = None) -> Progress:
        """Measure on held-out pairs; `start_is` names a reference that the policy still equals."""
        feed = self._feeds["eval"]
        indices = np.arange(len(feed.part))
        feed.ask(("eval", step), indices)
        batches, _ = feed.collect(("eval", step), indices)
        table = evaluation_pass(
            self._policy.parallel,
            batches,
            loss=self._loss,
            table=self._table(len(indices)),
            precision=self._policy.precision,
            start_is=None if start_is is None else self._names.index(start_is),
        )
        metrics = held_out_metrics(table, self._told)
        if self._sampler is not None:
            metrics |= self._sampler.measure(step)
            metrics |= best_within(self._sampler.config.kl_budget, metrics, before.metrics, self._names)
        if self._journal is not None:
            self._journal.log(step, metrics)
        self._keep_if_best(metrics, step)
        return replace(before, metrics=metrics)

    def judged_by(self, progress: Progress) -> dict[str, float]:
        """Metrics of the weights that the run would export now."""
        return progress.metrics if self.best is None else self.best.metrics

    def _keep_if_best(self, metrics: dict[str, float], step: int) -> None:
        """Keep the weights if the best are to be kept and these are better than those before."""
        evaluation = self._setup.config.evaluation
        value = metrics.get(evaluation.metric)
        if evaluation.keep != "best" or value is None or not math.isfinite(value):
            return
        sign = 1 if METRICS[evaluation.metric] == "max" else -1
        if self.best is not None and sign * value <= sign * self.best.value:
            return
        self.best = Best(metric=evaluation.metric, step=step, metrics=metrics)
        checkpoint.save_best(self._mirror.folder / BEST, self._policy.parallel, self.best)
        if self._journal is not None:  # rank 0, which wrote it
            self._mirror.push(BEST)

    def describe(self, failure: NonFiniteLoss, step: int) -> str:
        """Which step and pairs a loss was lost at, and what to do."""
        part, indices = self._feeds["train"].part, self._indices(step)
        sources = [part.sources[int(indices[slot])] for slot in failure.slots[:5]]
        more = f" and {len(failure.slots) - 5} more" if len(failure.slots) > 5 else ""
        return (
            f"{failure} at step {step + 1}, pairs {', '.join(sources)}{more}; "
            "lower training.learning_rate or loss.beta, or look at these rows"
        )

    def keep_journal(self) -> None:
        """The metrics so far, before a checkpoint that goes on from them."""
        if self._journal is not None:
            self._mirror.push(*JOURNAL)

    def close(self) -> None:
        """Send the scores and metrics that are left."""
        for feed in self._feeds.values():
            feed.close()
        if self._journal is not None:
            self._journal.close()
            self._mirror.push(*JOURNAL)

    def _indices(self, step: int) -> np.ndarray:
        epoch, step_of_epoch = divmod(step, self._plan.steps_per_epoch)
        return self._plan.indices(epoch, step_of_epoch)

    def _table(self, pairs: int) -> StepTable:
        return StepTable(pairs, self._names, self._policy.parallel.device)


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
        progress = checkpoint.load(folder, policy.parallel, identity=setup.identity)
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
