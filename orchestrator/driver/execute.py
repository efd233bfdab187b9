"""Training on the cluster, from a prepared run to its result in the record."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import ray
from rich.console import Console

from orchestrator.cluster.nodes import list_node_resources
from orchestrator.cluster.placement import ClusterProfile, build_worker_bundle
from orchestrator.cluster.shared_storage import refuse_unshared
from orchestrator.driver.prepare import PreparedRun
from orchestrator.driver.record import RunRecord
from orchestrator.driver.scoring import (
    report_scores,
    score_split,
    select_served_tables,
    start_missing_references,
)
from orchestrator.errors import RunFailed, UsageError
from orchestrator.references.service import ReferenceService
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.paths import run_location
from orchestrator.tracking.metrics_file import METRICS_FILE
from orchestrator.tracking.progress import follow_steps
from orchestrator.tracking.tracker import Tracker
from orchestrator.worker.launch import run_workers
from orchestrator.worker.rewards import RewardScorer
from orchestrator.worker.setup import WorkerSetup, count_total_steps


def open_tracker(prepared: PreparedRun, record: RunRecord) -> Tracker:
    """The one MLflow run of this training run, whatever the number of restarts."""
    config, mirror = prepared.config, Mirror(run_location(prepared.config))
    fingerprints = {f"reference.{n}": m.fingerprint.digest for n, m in prepared.references.items()}
    pins = {f"pin.{field}": pin for field, pin in prepared.pins.items()}
    digests = {f"data.{split}_digest": digest for split, digest in prepared.digests.items()}
    tracker = Tracker.resume_or_start(
        record.mlflow_run,
        name=config.name,
        uri=prepared.tracking_uri,
        folder=mirror.folder,
        experiment=config.tracking.experiment,
        params=record.config,
        tags={"loss.preset": config.preset} | fingerprints | pins | digests | prepared.code_tags,
        parent=record.mlflow_parent,
        key=record.key,
    )
    record.mlflow_run = tracker.run_id
    record.write(mirror)
    return tracker


def train_on_cluster(
    prepared: PreparedRun,
    record: RunRecord,
    service: ReferenceService,
    judge: RewardScorer | None,
    console: Console,
) -> None:
    """Run the workers to the end beside references that are served, and keep what came of it in the record.

    Raises:
        UsageError: the policy cannot be made as asked.
        RunFailed: training diverged, or the workers were lost too often.
    """
    config, tracker, mirror = (
        prepared.config,
        open_tracker(prepared, record),
        Mirror(run_location(prepared.config)),
    )
    total = count_total_steps(config, len(prepared.train))
    with _report_failure(tracker):
        if prepared.eval is not None:  # needed at once, for the evaluation before the first step
            score_split(service, prepared.eval, "eval", config, console)
        if config.references.mode == "precompute":
            score_split(service, prepared.train, "train", config, console)
            service.release()
        else:
            start_missing_references(
                service,
                select_served_tables(prepared.train, config),
                sampled=config.evaluation.sampling is not None,
            )
        refuse_unshared(config.storage_path)  # by nodes too that the autoscaler has started for references
        console.print(f"training {total} steps on {config.parallel.workers} worker(s)")
        with (
            follow_steps(mirror.folder, total, console),
            mirror.pull_periodically(METRICS_FILE),
            mirror.write_probe() as seen,
        ):
            setup = _build_worker_setup(prepared, service, tracker, judge, seen)
            try:
                result = run_workers(setup)
            except RunFailed as error:
                kept = "Checkpoints are kept: the same command goes on from the last one"
                raise RunFailed(f"{error}. {kept}") from error
        report_scores(service, console)
        counts = {name: asdict(stats) for name, stats in service.stats().items()}
        if result.status == "refused":
            raise UsageError(result.reason)
        if result.status != "done":
            raise RunFailed(f"{result.reason}. The last checkpoint is kept; a changed run needs --fresh")
    record.result, record.reference_counts = result, counts
    record.write(mirror)


def _build_worker_setup(
    prepared: PreparedRun, service: ReferenceService, tracker: Tracker, judge: RewardScorer | None, seen: str
) -> WorkerSetup:
    """What every worker of a run is given, its rows put where all nodes reach them."""
    return WorkerSetup(
        config=prepared.config,
        policy=prepared.policy.config,
        train=ray.put(prepared.train),
        eval=ray.put(prepared.eval) if prepared.eval else None,
        routers={name: service.routers[name] for name in prepared.config.references.ordered},
        identity=prepared.identity,
        initial_policy_reference=prepared.initial_policy_reference,
        bundle=build_worker_bundle(
            prepared.config.parallel.resources, ClusterProfile.from_nodes(list_node_resources())
        ),
        folder=run_location(prepared.config),
        code_folder=os.getcwd(),
        probe_path=seen,
        tracking_uri=prepared.tracking_uri,
        tracking_run=tracker.run_id,
        reward_scorer=judge,
    )


@contextmanager
def _report_failure(tracker: Tracker) -> Iterator[None]:
    """Let MLflow know how the run ended, where it did not end well."""
    try:
        yield
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
