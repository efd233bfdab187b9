"""The training loop that every worker runs. The second file to read, after `losses/preference.py`.

`train_worker` reads from top to bottom: load the policy, its batches and the last checkpoint, then train step
by step. A batch's reference scores are requested two batches before they are needed, so that replicas score
while the policy learns.
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import get_scheduler

from losses.config import LossConfig
from models.config import ModelError
from orchestrator.config.functions import add_to_path
from orchestrator.config.sections import METRICS
from orchestrator.errors import RunFailed
from orchestrator.files import describe_free_space, is_disk_full
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.scratch import remove_abandoned_scratch
from orchestrator.tracking.activity import ActivityFile
from orchestrator.tracking.metrics_file import read_findings
from orchestrator.tracking.tracker import Tracker
from orchestrator.worker.batches import BatchLoader
from orchestrator.worker.checkpoint import (
    BestEvaluation,
    TrainingProgress,
    load_best_weights,
    save_best_weights,
    save_checkpoint,
)
from orchestrator.worker.eval_sets import EvaluationSets
from orchestrator.worker.metrics import (
    MetricFlags,
    StepTable,
    compute_perf_metrics,
    compute_training_metrics,
    find_best_within_kl_budget,
)
from orchestrator.worker.policy import Policy, export_policy, open_policy
from orchestrator.worker.result import WorkerResult
from orchestrator.worker.session import Session
from orchestrator.worker.setup import BEST_FILE, EXPORT_FOLDER, METRIC_FILES, WorkerSetup, count_total_steps
from orchestrator.worker.splits import receive_split
from orchestrator.worker.start import (
    calibrate_loss,
    make_batch_loader,
    make_sampler,
    open_watch,
    open_worker_tracker,
    read_best_evaluation,
    refuse_differing_ranks,
    refuse_unshared_storage,
    resume_training,
)
from orchestrator.worker.step import MicroBatch, NonFiniteLoss, run_evaluation_pass, run_training_step
from orchestrator.worker.stopping import StopListener
from preferences.batches import BatchPlan

BATCHES_AHEAD = 2
"""How many batches before its use a batch's reference scores are requested."""

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def train_worker(setup: WorkerSetup, session: Session) -> WorkerResult:
    """Train until the last step and export the policy.

    Returns:
        How training ended: "done", or an end that another start would only repeat, with its reason.

    Raises:
        RunFailed: the run failed on one of several workers; raising it keeps the others from waiting for that
            worker. A single worker returns it as "failed".
    """
    logging.getLogger().setLevel(logging.WARNING)  # Train logs every report at INFO
    refuse_unshared_storage(setup)
    add_to_path(setup.code_folder, str(Path.cwd()))  # modules of the functions that the run file names
    mirror = Mirror(setup.folder, worker=session.rank)
    writes_metrics = session.rank == 0
    mirror.pull(BEST_FILE, *(METRIC_FILES if writes_metrics else ()))
    remove_abandoned_scratch()
    try:
        with mirror.push_periodically(*METRIC_FILES) if writes_metrics else nullcontext():
            return _run_training(setup, session, mirror)
    except ModelError as error:  # raised on every rank alike, so that all return the same
        return WorkerResult(status="refused", reason=str(error))
    except RunFailed as error:
        if session.world_size > 1:
            raise
        return WorkerResult(status="failed", reason=str(error))
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        free = describe_free_space(tempfile.gettempdir(), mirror.folder)
        size = session.checkpoint_bytes * session.world_size / 2**20
        needed = f", and a checkpoint takes {size:,.1f} MiB of each" if size else ""
        reason = f"a disk is full ({error}): {free}{needed}; make room there"
        if session.world_size > 1:
            raise RunFailed(reason) from error
        return WorkerResult(status="failed", reason=reason)
    finally:
        mirror.discard_copy()


def _run_training(setup: WorkerSetup, session: Session, mirror: Mirror) -> WorkerResult:
    """Do the work of `train_worker`, which turns errors into results."""
    config, rank, world_size = setup.config, session.rank, session.world_size
    workers_on_node = session.local_workers * setup.trials_per_node
    policy = open_policy(config, setup.policy, device=session.device, local_workers=workers_on_node)
    splits = {"train": receive_split(setup.train)}
    splits |= {"eval": receive_split(setup.eval)} if setup.eval else {}
    loaders = {
        name: make_batch_loader(setup, split, policy, rank=rank, world_size=world_size)
        for name, split in splits.items()
    }
    plan = BatchPlan(len(splits["train"]), config.training.pairs_per_step, config.training.seed)
    total_steps = count_total_steps(config, plan.count)

    schedule = get_scheduler(
        _SCHEDULES[config.training.schedule],
        policy.parallel.optimizer,
        num_warmup_steps=round(config.training.warmup * total_steps),
        num_training_steps=total_steps,
    )
    progress = resume_training(setup, session, policy, schedule)
    best = read_best_evaluation(config, mirror)
    refuse_differing_ranks(policy, progress, best)
    tracker = open_worker_tracker(setup, mirror.folder, progress) if rank == 0 else None
    loss, progress = calibrate_loss(config, loaders["train"], progress)
    run = _TrainingRun(setup, session, mirror, policy, loaders, plan, loss, tracker, best)

    for step in range(progress.step, min(progress.step + BATCHES_AHEAD, total_steps)):
        run.request_scores(step)
    if progress.step == 0 and "eval" in loaders:
        progress = run.evaluate_policy(progress, 0, equal_reference=setup.initial_policy_reference)
    for step in range(progress.step, total_steps):
        if step + BATCHES_AHEAD < total_steps:
            run.request_scores(step + BATCHES_AHEAD)
        torch.manual_seed(config.training.seed * 1_000_003 + step * world_size + rank)
        try:
            stop = run.train_step(step, learning_rate=schedule.get_last_lr()[0])
        except NonFiniteLoss as failure:
            run.close()
            return WorkerResult(status="diverged", reason=run.describe_failure(failure, step))
        schedule.step()

        steps_taken, is_last = step + 1, step + 1 == total_steps
        evaluate = "eval" in loaders and (is_last or steps_taken % config.evaluation.every_steps == 0)
        is_preempted = session.is_preempted()
        save = is_last or stop or is_preempted or steps_taken % config.training.save_every == 0
        if evaluate:
            progress = run.evaluate_policy(progress, steps_taken)
        if save or evaluate:
            run.push_metrics()
        metrics = {
            "step": steps_taken,
            "total": total_steps,
            **(run.get_exported_metrics(progress) if evaluate else {}),
        }
        if save:
            progress = replace(progress, step=steps_taken, schedule=schedule.state_dict())
            session.report(metrics, partial(save_checkpoint, parallel=policy.parallel, progress=progress))
        elif evaluate:
            session.report(metrics)
        if stop and not is_last:
            run.close()
            return WorkerResult(status="stopped", step=steps_taken)
        if is_preempted:
            session.wait_for_preemption()
    run.close()

    if setup.export:
        if run.best is not None:
            mirror.pull(BEST_FILE)
            load_best_weights(mirror.folder / BEST_FILE, policy.parallel)
        train = splits["train"]
        probe_prompts = [train.policy[row].prompt.tolist() for row in range(min(4, len(train)))]
        export_policy(policy, mirror.folder / EXPORT_FOLDER, probes=probe_prompts)
        if rank == 0:
            mirror.push(EXPORT_FOLDER)
    return WorkerResult(
        status="done",
        step=total_steps,
        exported_step=total_steps if run.best is None else run.best.step,
        metrics=run.get_exported_metrics(progress),
        phi_star=progress.phi_star,
        plain_rows_reason=policy.plain_rows_reason,
        findings=read_findings(mirror.folder) if rank == 0 else {},
    )


class _TrainingRun:
    """The actions of the training loop, bound to this rank's policy, batch loaders and tracker.

    Args:
        loaders: by split, "train" and, with held-out data, "eval".
        plan: which training pairs each step takes.
        loss: resolved settings (`phi_star` is a number).
        tracker: records the metrics; None on all ranks but 0.
        best: the best evaluation so far, if the run keeps its best weights and has any.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        session: Session,
        mirror: Mirror,
        policy: Policy,
        loaders: dict[str, BatchLoader],
        plan: BatchPlan,
        loss: LossConfig,
        tracker: Tracker | None,
        best: BestEvaluation | None,
    ) -> None:
        self._setup, self._policy, self._loaders, self._plan = setup, policy, loaders, plan
        self._loss, self._tracker, self._mirror = loss, tracker, mirror
        self._watch = None if tracker is None else open_watch(setup, policy, tracker)
        self._activity = ActivityFile(None if tracker is None or mirror.remote else mirror.folder)
        self._activity.end()  # of a worker that was killed
        self._stop_listener = StopListener(setup.stop_sign if session.rank == 0 else None)
        self.best = best
        self._reference_names = setup.config.references.ordered
        self._sampler = make_sampler(setup, session, policy, loaders.get("eval"))
        self._flags = MetricFlags(
            has_pairs=loaders["train"].split.has_pairs,
            has_soft_labels=any(
                loader.split.has_soft_labels and loader.split.has_pairs for loader in loaders.values()
            ),
            has_dispersion=loss.dispersion.type != "none",
            has_reference_weights=len(self._reference_names) > 1 and not loss.reference_free,
        )

    def request_scores(self, step: int) -> None:
        """Request the reference scores of a coming step, without waiting for them."""
        self._loaders["train"].request_scores(("train", step), self._get_step_indices(step))

    def train_step(self, step: int, *, learning_rate: float) -> bool:
        """Take one optimizer step and log its metrics; return whether training shall stop after it."""
        started = time.perf_counter()
        training, indices = self._setup.config.training, self._get_step_indices(step)
        batches, waiting_cost = self._loaders["train"].collect_batches(("train", step), indices)
        table = self._make_table(len(indices))
        table.add_cost(waiting_cost)
        if self._stop_listener.is_stop_requested():
            table.request_stop()
        table, grad_norm = run_training_step(
            self._policy.parallel,
            list(batches),
            loss=self._loss,
            table=table,
            clip_norm=training.clip_norm,
        )
        if self._tracker is None or self._watch is None:
            return table.stop_requested
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
        if self._flags.has_dispersion:
            self._tracker.log_scales(table["scale"].tolist())
        self._watch.check_training_step(step + 1, table, metrics, self._name_pairs("train", indices))
        return table.stop_requested

    def evaluate_policy(
        self, progress: TrainingProgress, step: int, *, equal_reference: str | None = None
    ) -> TrainingProgress:
        """Measure the policy on held-out pairs, log the metrics, and save the weights if they are the best.

        Args:
            progress: before this evaluation.
            step: optimizer steps taken.
            equal_reference: the name of a reference that the policy still equals.

        Returns:
            The progress with this evaluation's metrics.
        """
        loader = self._loaders["eval"]
        indices = np.arange(len(loader.split))
        loader.request_scores(("eval", step), indices)
        batches, _ = loader.collect_batches(("eval", step), indices)
        table = run_evaluation_pass(
            self._policy.parallel,
            self._report_batches(batches, step, len(indices)),
            loss=self._loss,
            table=self._make_table(len(indices)),
            equal_reference=None if equal_reference is None else self._reference_names.index(equal_reference),
        )
        sets = EvaluationSets.of_split(loader.split, self._setup.config.judged_set)
        metrics = sets.compute_metrics(table, self._flags)
        if self._sampler is not None:
            metrics |= self._sampler.measure_policy(
                step, partial(self._activity.report, f"sampling @{step}", "samples")
            )
            metrics |= find_best_within_kl_budget(
                self._sampler.config.kl_budget, metrics, progress.metrics, self._reference_names
            )
        self._activity.end()
        if self._tracker is not None and self._watch is not None:
            self._tracker.log(step, metrics)
            find_place = self._name_pairs("eval", indices)
            self._watch.check_evaluation(step, table, metrics, find_place, judged=table.select(sets.judged))
        self._save_if_best(metrics, step)
        return replace(progress, metrics=metrics)

    def _report_batches(self, batches: Iterator[MicroBatch], step: int, pairs: int) -> Iterator[MicroBatch]:
        """Yield this rank's batches of an evaluation, and report about how many pairs all ranks have done."""
        done, world_size = 0, self._policy.parallel.world_size
        for batch in batches:
            self._activity.report(f"evaluating @{step}", "pairs", done * world_size, pairs)
            yield batch
            done += len(batch.slots)

    def get_exported_metrics(self, progress: TrainingProgress) -> dict[str, float]:
        """Return the metrics of the weights that the run would export now."""
        return progress.metrics if self.best is None else self.best.metrics

    def _save_if_best(self, metrics: dict[str, float], step: int) -> None:
        """Save the weights if the run keeps its best and these are better than those saved before."""
        evaluation = self._setup.config.evaluation
        value = metrics.get(evaluation.metric)
        if evaluation.keep != "best" or value is None or not math.isfinite(value):
            return
        sign = 1 if METRICS[evaluation.metric] == "max" else -1
        if self.best is not None and sign * value <= sign * self.best.value:
            return
        self.best = BestEvaluation(metric=evaluation.metric, step=step, metrics=metrics)
        save_best_weights(self._mirror.folder / BEST_FILE, self._policy.parallel, self.best)
        if self._tracker is not None:  # rank 0, which wrote it
            self._mirror.push(BEST_FILE)

    def describe_failure(self, failure: NonFiniteLoss, step: int) -> str:
        """Say at which step and pairs the loss was not finite, and what to do about it."""
        find_place = self._name_pairs("train", self._get_step_indices(step))
        places = [find_place(slot) for slot in failure.slots[:5]]
        more = f" and {len(failure.slots) - 5} more" if len(failure.slots) > 5 else ""
        return (
            f"{failure} at step {step + 1}, pairs {', '.join(places)}{more}; "
            "lower training.learning_rate or loss.beta, or look at these rows"
        )

    def push_metrics(self) -> None:
        """Send the metrics so far to storage, before a checkpoint from which a restart continues them."""
        if self._tracker is not None:
            self._mirror.push(*METRIC_FILES)

    def close(self) -> None:
        """Wait until all scores are stored, and send the remaining metrics."""
        for loader in self._loaders.values():
            loader.close()
        if self._tracker is not None:
            self._tracker.close()
            self._mirror.push(*METRIC_FILES)

    def _get_step_indices(self, step: int) -> np.ndarray:
        """Return the training rows of a step's global batch."""
        epoch, step_of_epoch = divmod(step, self._plan.steps_per_epoch)
        return self._plan.get_step_indices(epoch, step_of_epoch)

    def _name_pairs(self, split: str, indices: np.ndarray) -> Callable[[int], str]:
        """Return the function from a slot of a batch of these rows to the pair's file and line."""
        places = self._loaders[split].split.places
        return lambda slot: places[int(indices[slot])]

    def _make_table(self, pairs: int) -> StepTable:
        return StepTable(pairs, self._reference_names, self._policy.parallel.device)
