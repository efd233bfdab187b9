"""What every training worker runs. The second file to read, after `losses/preference.py`.

`train_worker` reads top to bottom: the policy, what feeds it, where it stood, and the loop. A batch's
reference scores are asked for two batches before they are needed, so replicas score while the policy learns.
"""

import logging
import math
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import ray
import torch
from transformers import get_scheduler

from losses.config import LossConfig
from models.config import ModelError
from orchestrator.config.functions import add_to_path
from orchestrator.config.sections import METRICS
from orchestrator.errors import RunFailed
from orchestrator.storage.mirror import Mirror
from orchestrator.tracking.tracker import Tracker
from orchestrator.worker.batches import BatchLoader
from orchestrator.worker.checkpoint import (
    BestEvaluation,
    TrainingProgress,
    load_best,
    save_best,
    save_checkpoint,
)
from orchestrator.worker.metrics import (
    MetricFlags,
    StepTable,
    compute_eval_metrics,
    compute_perf_metrics,
    compute_training_metrics,
    find_best_within,
)
from orchestrator.worker.policy import Policy, export_policy, open_policy
from orchestrator.worker.result import WorkerResult
from orchestrator.worker.session import Session
from orchestrator.worker.setup import BEST_FILE, EXPORT_FOLDER, METRIC_FILES, WorkerSetup, count_total_steps
from orchestrator.worker.start import (
    calibrate_loss,
    make_batch_loader,
    make_sampler,
    open_worker_tracker,
    read_best_evaluation,
    refuse_differing_ranks,
    refuse_unshared_storage,
    resume_training,
)
from orchestrator.worker.step import NonFiniteLoss, run_evaluation_pass, run_training_step
from preferences.batches import BatchPlan

BATCHES_AHEAD = 2
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def train_worker(setup: WorkerSetup, session: Session) -> WorkerResult:
    """Train until the last step and export the policy.

    Returns:
        `{"status": "done", "step": n, "metrics": {...}}` of the exported weights; or what a restart would
        only repeat: `{"status": "diverged" | "refused" | "failed", "reason": ...}` when a loss is not finite,
        a model cannot be used as asked, or the judge of samples fails.

    Raises:
        RunFailed: the last of these happened to one of several workers, whose others must not wait for it.
    """
    logging.getLogger().setLevel(logging.WARNING)  # Train logs every report at INFO
    refuse_unshared_storage(setup)
    add_to_path(setup.code_folder, os.getcwd())  # of functions that the run file names
    mirror, writes = Mirror(setup.folder, worker=session.rank), session.rank == 0
    mirror.pull(BEST_FILE, *(METRIC_FILES if writes else ()))
    try:
        with mirror.push_periodically(*METRIC_FILES) if writes else nullcontext():
            return _run_training(setup, session, mirror)
    except ModelError as error:  # the same on every rank, see `together`
        return WorkerResult(status="refused", reason=str(error))
    except RunFailed as error:
        if session.world_size > 1:
            raise
        return WorkerResult(status="failed", reason=str(error))
    finally:
        mirror.discard_copy()


def _run_training(setup: WorkerSetup, session: Session, mirror: Mirror) -> WorkerResult:
    config, rank, world_size = setup.config, session.rank, session.world_size
    sharing = session.local_workers * setup.trials_per_node
    policy = open_policy(config, setup.policy, device=session.device, local_workers=sharing)
    parts = {"train": ray.get(setup.train), "eval": ray.get(setup.eval) if setup.eval else None}
    feeds = {
        split: make_batch_loader(setup, part, policy, rank=rank, world_size=world_size)
        for split, part in parts.items()
        if part is not None
    }
    plan = BatchPlan(len(parts["train"]), config.training.pairs_per_step, config.training.seed)
    total = count_total_steps(config, plan.count)

    schedule = get_scheduler(
        _SCHEDULES[config.training.schedule],
        policy.parallel.optimizer,
        num_warmup_steps=round(config.training.warmup * total),
        num_training_steps=total,
    )
    progress, best = resume_training(setup, session, policy, schedule), read_best_evaluation(config, mirror)
    refuse_differing_ranks(policy, progress, best)
    journal = open_worker_tracker(setup, mirror.folder, progress) if rank == 0 else None
    loss, progress = calibrate_loss(config, feeds["train"], progress)
    run = _TrainingRun(setup, session, mirror, policy, feeds, plan, loss, journal, best)
    for step in range(progress.step, min(progress.step + BATCHES_AHEAD, total)):
        run.request_scores(step)
    if progress.step == 0 and "eval" in feeds:
        progress = run.evaluate_policy(progress, 0, start_is=setup.initial_policy_reference)
    for step in range(progress.step, total):
        if step + BATCHES_AHEAD < total:
            run.request_scores(step + BATCHES_AHEAD)
        torch.manual_seed(config.training.seed * 1_000_003 + step * world_size + rank)
        try:
            run.train_step(step, learning_rate=schedule.get_last_lr()[0])
        except NonFiniteLoss as failure:
            run.close()
            return WorkerResult(status="diverged", reason=run.describe_failure(failure, step))
        schedule.step()

        taken, last = step + 1, step + 1 == total
        evaluated = "eval" in feeds and (last or taken % config.evaluation.every_steps == 0)
        if evaluated:
            progress = run.evaluate_policy(progress, taken)
        due = last or taken % config.training.save_every == 0
        if due or evaluated:
            run.push_metrics()
        metrics = {
            "step": taken,
            "total": total,
            **(run.exported_metrics(progress) if evaluated else {}),
        }
        if due:
            progress = replace(progress, step=taken, schedule=schedule.state_dict())
            session.report(metrics, partial(save_checkpoint, parallel=policy.parallel, progress=progress))
        elif evaluated:
            session.report(metrics)
    run.close()
    if setup.export:
        if run.best is not None:
            mirror.pull(BEST_FILE)
            load_best(mirror.folder / BEST_FILE, policy.parallel)
        probes = [parts["train"].policy[row].prompt for row in range(min(4, len(parts["train"])))]
        export_policy(policy, mirror.folder / EXPORT_FOLDER, probes=probes)
        if rank == 0:
            mirror.push(EXPORT_FOLDER)
    return WorkerResult(
        status="done",
        step=total,
        exported_step=total if run.best is None else run.best.step,
        metrics=run.exported_metrics(progress),
        phi_star=progress.phi_star,
        plain_rows_reason=policy.plain_rows_reason,
    )


class _TrainingRun:
    """The verbs of the loop, bound to this rank's policy and feeds."""

    def __init__(
        self,
        setup: WorkerSetup,
        session: Session,
        mirror: Mirror,
        policy: Policy,
        feeds: dict[str, BatchLoader],
        plan: BatchPlan,
        loss: LossConfig,
        journal: Tracker | None,
        best: BestEvaluation | None,
    ) -> None:
        self._setup, self._policy, self._loaders, self._plan = setup, policy, feeds, plan
        self._loss, self._tracker, self._mirror = loss, journal, mirror
        self.best = best
        self._names = setup.config.references.ordered
        self._sampler = make_sampler(setup, session, policy, feeds.get("eval"))
        self._flags = MetricFlags(
            paired=feeds["train"].split.has_pairs,
            soft=any(feed.split.has_soft_labels and feed.split.has_pairs for feed in feeds.values()),
            dispersed=loss.dispersion.type != "none",
            weighted=len(self._names) > 1 and not loss.reference_free,
        )

    def request_scores(self, step: int) -> None:
        """Ask the references for a coming step's scores."""
        self._loaders["train"].request_scores(("train", step), self._plan_indices(step))

    def train_step(self, step: int, *, learning_rate: float) -> None:
        """One optimizer step, and its metrics."""
        started = time.perf_counter()
        training, indices = self._setup.config.training, self._plan_indices(step)
        batches, waited = self._loaders["train"].collect_batches(("train", step), indices)
        table = self._make_table(len(indices))
        table.add_cost(waited)
        table, grad_norm = run_training_step(
            self._policy.parallel,
            list(batches),
            loss=self._loss,
            table=table,
            clip_norm=training.clip_norm,
            precision=self._policy.precision,
        )
        if self._tracker is None:
            return
        metrics = compute_training_metrics(table, self._flags)
        metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
        metrics |= {"epoch": (step + 1) / self._plan.steps_per_epoch}
        metrics |= compute_perf_metrics(
            table,
            seconds=time.perf_counter() - started,
            world_size=self._policy.parallel.world_size,
            peak_flops=self._policy.peak_flops,
        )
        self._tracker.log(step + 1, metrics)
        if self._flags.dispersed:
            self._tracker.log_scales(table["scale"].tolist())

    def evaluate_policy(
        self, before: TrainingProgress, step: int, *, start_is: str | None = None
    ) -> TrainingProgress:
        """Measure on held-out pairs; `start_is` names a reference that the policy still equals."""
        feed = self._loaders["eval"]
        indices = np.arange(len(feed.split))
        feed.request_scores(("eval", step), indices)
        batches, _ = feed.collect_batches(("eval", step), indices)
        table = run_evaluation_pass(
            self._policy.parallel,
            batches,
            loss=self._loss,
            table=self._make_table(len(indices)),
            precision=self._policy.precision,
            start_is=None if start_is is None else self._names.index(start_is),
        )
        metrics = compute_eval_metrics(table, self._flags)
        if self._sampler is not None:
            metrics |= self._sampler.measure_policy(step)
            metrics |= find_best_within(self._sampler.config.kl_budget, metrics, before.metrics, self._names)
        if self._tracker is not None:
            self._tracker.log(step, metrics)
        self._keep_if_best(metrics, step)
        return replace(before, metrics=metrics)

    def exported_metrics(self, progress: TrainingProgress) -> dict[str, float]:
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
        self.best = BestEvaluation(metric=evaluation.metric, step=step, metrics=metrics)
        save_best(self._mirror.folder / BEST_FILE, self._policy.parallel, self.best)
        if self._tracker is not None:  # rank 0, which wrote it
            self._mirror.push(BEST_FILE)

    def describe_failure(self, failure: NonFiniteLoss, step: int) -> str:
        """Which step and pairs a loss was lost at, and what to do."""
        part, indices = self._loaders["train"].split, self._plan_indices(step)
        sources = [part.sources[int(indices[slot])] for slot in failure.slots[:5]]
        more = f" and {len(failure.slots) - 5} more" if len(failure.slots) > 5 else ""
        return (
            f"{failure} at step {step + 1}, pairs {', '.join(sources)}{more}; "
            "lower training.learning_rate or loss.beta, or look at these rows"
        )

    def push_metrics(self) -> None:
        """The metrics so far, before a checkpoint that goes on from them."""
        if self._tracker is not None:
            self._mirror.push(*METRIC_FILES)

    def close(self) -> None:
        """Send the scores and metrics that are left."""
        for feed in self._loaders.values():
            feed.close()
        if self._tracker is not None:
            self._tracker.close()
            self._mirror.push(*METRIC_FILES)

    def _plan_indices(self, step: int) -> np.ndarray:
        epoch, step_of_epoch = divmod(step, self._plan.steps_per_epoch)
        return self._plan.get_step_indices(epoch, step_of_epoch)

    def _make_table(self, pairs: int) -> StepTable:
        return StepTable(pairs, self._names, self._policy.parallel.device)
