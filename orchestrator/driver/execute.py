"""Train a prepared run on the cluster and write its result to the record."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from orchestrator.cluster.nodes import list_node_resources
from orchestrator.cluster.placement import ClusterProfile, build_worker_bundle
from orchestrator.cluster.shared_storage import refuse_unshared
from orchestrator.driver.prepare import PreparedRun
from orchestrator.driver.provenance import describe_origin, list_tracked_data
from orchestrator.driver.record import RunRecord
from orchestrator.driver.scoring import prepare_references, report_scores
from orchestrator.errors import RunFailed, RunStopped, UsageError
from orchestrator.references.service import ReferenceService
from orchestrator.registry.summary import render_summary
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.paths import run_location
from orchestrator.tracking.follow import follow_steps
from orchestrator.tracking.metrics_file import METRICS_FILE
from orchestrator.tracking.tracker import Tracker
from orchestrator.worker.launch import run_workers
from orchestrator.worker.rewards import RewardScorer
from orchestrator.worker.setup import WorkerSetup, count_total_steps
from orchestrator.worker.splits import send_split
from orchestrator.worker.stopping import stop_on_sigterm


def open_tracker(prepared: PreparedRun, record: RunRecord) -> Tracker:
    """Open the MLflow run of this training run, the same one after every restart."""
    config, mirror = prepared.config, Mirror(run_location(prepared.config))
    fingerprints = {
        f"reference.{name}": model.fingerprint.digest for name, model in prepared.references.items()
    }
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
    tracker.describe(render_summary(describe_origin(prepared, record)))
    tracker.log_data(list_tracked_data(prepared))
    return tracker


def train_on_cluster(
    prepared: PreparedRun,
    record: RunRecord,
    service: ReferenceService,
    reward_scorer: RewardScorer | None,
    console: Console,
) -> None:
    """Train with the workers while the references are served, and write the result to the record.

    Raises:
        UsageError: the policy cannot be built with these settings.
        RunFailed: training diverged, or the workers were lost too often.
    """
    config, tracker, mirror = (
        prepared.config,
        open_tracker(prepared, record),
        Mirror(run_location(prepared.config)),
    )
    total_steps = count_total_steps(config, len(prepared.train))
    pairs_per_step = min(config.training.pairs_per_step, len(prepared.train))
    with _mark_failure(tracker):
        prepare_references(service, prepared, console)
        # Checked again, because the autoscaler may have started nodes for the references.
        refuse_unshared(config.storage_path)
        console.print(f"training {total_steps} steps on {config.parallel.workers} worker(s)")
        with (
            follow_steps(mirror.folder, total_steps, pairs_per_step, console),
            mirror.pull_periodically(METRICS_FILE),
            mirror.write_probe() as probe_path,
            stop_on_sigterm(console) as stop_sign,
        ):
            setup = _build_worker_setup(prepared, service, tracker, reward_scorer, probe_path, stop_sign)
            try:
                result = run_workers(setup)
            except RunFailed as error:
                remedy = "Checkpoints are kept: the same command resumes from the last one"
                raise RunFailed(f"{error}. {remedy}") from error
        report_scores(service, console)
        counts = {name: asdict(stats) for name, stats in service.stats().items()}
        if result.status == "refused":
            raise UsageError(result.reason)
        if result.status == "stopped":
            raise RunStopped(
                f"stopped by SIGTERM after step {result.step} of {total_steps}; the same command resumes"
            )
        if result.status != "done":
            remedy = (
                "a changed run needs --fresh" if result.status == "diverged" else "the same command resumes"
            )
            raise RunFailed(f"{result.reason}. The last checkpoint is kept; {remedy}")
    record.result, record.reference_counts = result, counts
    record.write(mirror)


def _build_worker_setup(
    prepared: PreparedRun,
    service: ReferenceService,
    tracker: Tracker,
    reward_scorer: RewardScorer | None,
    probe_path: str,
    stop_sign: str,
) -> WorkerSetup:
    """Build the setup that every worker gets, with the rows in Ray's object store for all nodes."""
    return WorkerSetup(
        config=prepared.config,
        policy=prepared.policy.config,
        train=send_split(prepared.train),
        eval=send_split(prepared.eval) if prepared.eval else None,
        routers={name: service.routers[name] for name in prepared.config.references.ordered},
        identity=prepared.identity,
        initial_policy_reference=prepared.initial_policy_reference,
        bundle=build_worker_bundle(
            prepared.config.parallel.resources, ClusterProfile.from_nodes(list_node_resources())
        ),
        folder=run_location(prepared.config),
        code_folder=str(Path.cwd()),
        probe_path=probe_path,
        tracking_uri=prepared.tracking_uri,
        tracking_run=tracker.run_id,
        reward_scorer=reward_scorer,
        vocabulary_sizes=prepared.vocabulary_sizes,
        stop_sign=stop_sign,
    )


@contextmanager
def _mark_failure(tracker: Tracker) -> Iterator[None]:
    """Mark the MLflow run as killed or failed if the block raises, with the reason as the tag `failure`."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, UsageError | RunFailed) and not isinstance(error, RunStopped):
            tracker.set_tags({"failure": str(error)})
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt | RunStopped) else "FAILED")
        raise
