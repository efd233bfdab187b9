"""Training on the cluster, from a prepared run to its result in the record."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import ray
from rich.console import Console

from orchestrator.cluster.nodes import nodes
from orchestrator.cluster.placement import Kind, worker_bundle
from orchestrator.cluster.shared_storage import refuse_unshared
from orchestrator.driver.prepare import Prepared
from orchestrator.driver.record import RunRecord
from orchestrator.driver.scoring import report_scores, score_split, served_tables, warm
from orchestrator.errors import RunFailed, UsageError
from orchestrator.references.service import ReferenceService
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.paths import home
from orchestrator.tracking.code_version import code_tags
from orchestrator.tracking.metrics_file import METRICS_FILE
from orchestrator.tracking.progress import following_steps
from orchestrator.tracking.tracker import Tracker
from orchestrator.worker.launch import run_workers
from orchestrator.worker.rewards import Judge
from orchestrator.worker.setup import WorkerSetup, total_steps


def _tracker(prepared: Prepared, record: RunRecord) -> Tracker:
    """The one MLflow run of this training run, whatever the number of restarts."""
    config, mirror = prepared.config, Mirror(home(prepared.config))
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
        tags={"loss.preset": config.preset} | fingerprints | pins | digests | code_tags(),
        parent=record.mlflow_parent,
        key=record.key,
    )
    record.mlflow_run = tracker.run_id
    record.write(mirror)
    return tracker


def train_on_cluster(
    prepared: Prepared, record: RunRecord, service: ReferenceService, judge: Judge | None, console: Console
) -> None:
    """Run the workers to the end beside references that are served, and keep what came of it in the record.

    Raises:
        UsageError: the policy cannot be made as asked.
        RunFailed: training diverged, or the workers were lost too often.
    """
    config, tracker, mirror = prepared.config, _tracker(prepared, record), Mirror(home(prepared.config))
    total = total_steps(config, len(prepared.train))
    with _failing_with(tracker):
        if prepared.held_out is not None:  # needed at once, for the evaluation before the first step
            score_split(service, prepared.held_out, "eval", config, console)
        if config.references.mode == "precompute":
            score_split(service, prepared.train, "train", config, console)
            service.release()
        else:
            warm(
                service, served_tables(prepared.train, config), sampled=config.evaluation.sampling is not None
            )
        refuse_unshared(config.storage_path)  # by nodes too that the autoscaler has started for references
        console.print(f"training {total} steps on {config.parallel.workers} worker(s)")
        with (
            following_steps(mirror.folder, total, console),
            mirror.pulling(METRICS_FILE),
            mirror.beacon() as seen,
        ):
            setup = _worker_setup(prepared, service, tracker, judge, seen)
            try:
                result = run_workers(setup)
            except RunFailed as error:
                kept = "Checkpoints are kept: the same command goes on from the last one"
                raise RunFailed(f"{error}. {kept}") from error
        report_scores(service, console)
        stats = {name: asdict(counts) for name, counts in service.stats().items()}
        if result["status"] == "refused":
            raise UsageError(result["reason"])
        if result["status"] != "done":
            raise RunFailed(f"{result['reason']}. The last checkpoint is kept; a changed run needs --fresh")
    record.result = result | {"scores": stats}
    record.write(mirror)


def _worker_setup(
    prepared: Prepared, service: ReferenceService, tracker: Tracker, judge: Judge | None, seen: str
) -> WorkerSetup:
    """What every worker of a run is given, its rows put where all nodes reach them."""
    return WorkerSetup(
        config=prepared.config,
        policy=prepared.policy.config,
        train=ray.put(prepared.train),
        held_out=ray.put(prepared.held_out) if prepared.held_out else None,
        routers={name: service.routers[name] for name in prepared.config.references.ordered},
        identity=prepared.identity,
        start_is=prepared.start_is,
        bundle=worker_bundle(prepared.config.parallel.resources, Kind.of(nodes())),
        folder=home(prepared.config),
        seen=seen,
        tracking_uri=prepared.tracking_uri,
        tracking_run=tracker.run_id,
        judge=judge,
    )


@contextmanager
def _failing_with(tracker: Tracker) -> Iterator[None]:
    """Let MLflow know how the run ended, where it did not end well."""
    try:
        yield
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
