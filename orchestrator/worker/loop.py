"""What every training worker runs. The second file to read, after `losses/preference.py`.

`train_worker` reads top to bottom: the policy, what feeds it, where it stood, and the loop. A batch's
reference scores are asked for two batches before they are needed, so replicas score while the policy learns.
"""

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from transformers import get_scheduler

from losses.config import LossConfig
from models.config import ModelError
from orchestrator.config.sections import METRICS
from orchestrator.errors import RunFailed
from orchestrator.storage.mirror import Mirror
from orchestrator.tracking.tracker import Tracker
from orchestrator.worker.batches import Feed
from orchestrator.worker.checkpoint import Best, Progress, load_best, save, save_best
from orchestrator.worker.metrics import (
    StepTable,
    Told,
    best_within,
    held_out_metrics,
    perf_metrics,
    training_metrics,
)
from orchestrator.worker.policy import Policy, export_policy, open_policy
from orchestrator.worker.session import Session
from orchestrator.worker.setup import BEST, EXPORT, JOURNAL, WorkerSetup, total_steps
from orchestrator.worker.start import (
    _best,
    _calibrated,
    _feed,
    _journal,
    _refuse_elsewhere,
    _refuse_out_of_step,
    _resume,
    _sampler,
)
from orchestrator.worker.step import NonFiniteLoss, evaluation_pass, training_step
from preferences.batches import BatchPlan

BATCHES_AHEAD = 2
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


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
            session.report(metrics, partial(save, parallel=policy.parallel, progress=progress))
        elif evaluated:
            session.report(metrics)
    run.close()
    if setup.export:
        if run.best is not None:
            mirror.pull(BEST)
            load_best(mirror.folder / BEST, policy.parallel)
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
        save_best(self._mirror.folder / BEST, self._policy.parallel, self.best)
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
