"""The commands `train`, `score` and `check`: from a run file to a registered model."""

import os
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console

from orchestrator.cluster.connection import connected
from orchestrator.cluster.memory import size
from orchestrator.cluster.memory_table import table
from orchestrator.cluster.nodes import nodes
from orchestrator.cluster.placement import Kind, refuse_impossible
from orchestrator.cluster.shared_storage import refuse_unshared
from orchestrator.cluster.worker_environment import JOB
from orchestrator.config.run import RunConfig
from orchestrator.driver.execute import train_on_cluster
from orchestrator.driver.finish import _report, finish
from orchestrator.driver.prepare import Prepared, prepare, storage_fit, with_resolved_paths
from orchestrator.driver.record import RunRecord, locked, open_record, read_record, remove_run
from orchestrator.driver.scoring import judging, report_scores, score_split, serve
from orchestrator.errors import UsageError
from orchestrator.redaction import without_secrets
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.paths import home, is_uri
from orchestrator.tracking.mlflow import connect as connect_to_mlflow
from orchestrator.tracking.progress import plain_console
from orchestrator.worker.rewards import Judge


def check(config: RunConfig) -> None:
    """Refuse what can be refused before a device is held; report what the run will read and ask for."""
    console = plain_console()
    prepared = prepared_run(config, console)
    connect_to_mlflow(prepared.tracking_uri)
    located = {name: model.located for name, model in prepared.references.items()}
    console.print(table(size(prepared.config, prepared.policy.located, located)))
    with connected(wait_minutes=config.placement.wait_minutes):
        _placed(prepared)
    console.print(f"{config.name}: nothing to refuse")


def score(config: RunConfig) -> None:
    """Fill the store with every score the run will need."""
    console = plain_console()
    prepared = prepared_run(config, console)
    with connected(wait_minutes=config.placement.wait_minutes):
        prepared = _placed(prepared)
        with serve(prepared) as service:
            for split, part in (("train", prepared.train), ("eval", prepared.held_out)):
                if part is not None:
                    score_split(service, part, split, config, console)
            report_scores(service, console)


def train(config: RunConfig, *, fresh: bool = False) -> RunRecord:
    """Train and register, or go on where an earlier call was killed.

    Raises:
        UsageError: the input is wrong.
        RunFailed: training diverged, or the cluster was lost.
    """
    console = plain_console()
    resolved = _resolved(config)
    storage_fit(resolved)
    mirror = Mirror(home(resolved))
    before = None if fresh else read_record(mirror)
    prepared = prepared_run(config, console, before)
    with locked(mirror):
        if before is not None and before.result:
            prepared = prepared.on(before.device_type)
            record = _open(prepared)
        else:
            with connected(wait_minutes=config.placement.wait_minutes):
                prepared = _placed(prepared)
                record = _open(prepared, fresh=fresh)
                with serve(prepared) as service, _judging(prepared) as judge:
                    train_on_cluster(prepared, record, service, judge, console)
        if not record.finished:
            finish(prepared, record)
        _report(prepared.config, record, console)
        mirror.discard()
    return record


def prepared_run(config: RunConfig, console: Console, before: RunRecord | None = None) -> Prepared:
    """Everything that can be refused without a cluster, and a line on each split's rows."""
    prepared = prepare(_resolved(config), before)
    for split, counts in prepared.counts.items():
        text = f"{split}: {counts['pairs']} pairs"
        if counts["truncated"]:
            text += f", {counts['truncated']} truncated"
        if counts["turned_round"]:
            text += f", {counts['turned_round']} turned round (their label was below one half)"
        for reason, count in counts["skipped"].items():
            text += f", {count} skipped ({reason})"
        console.print(text)
    return prepared


def _resolved(config: RunConfig) -> RunConfig:
    storage = config.storage_path
    if JOB in os.environ and not is_uri(storage) and not Path(storage).expanduser().is_absolute():
        raise UsageError(
            f"storage_path {storage} is relative, and a submitted job's working folder is thrown away "
            "with the job; give an absolute path that all nodes share, or the URI of an object store"
        )
    return with_resolved_paths(config, base=Path.cwd())


def _placed(prepared: Prepared) -> Prepared:
    """The run on the cluster that is connected, or a refusal with the arithmetic."""
    cluster = nodes()
    refuse_impossible(prepared.config, cluster)
    refuse_unshared(prepared.config.storage_path)
    return prepared.on(Kind.of(cluster).device_type)


def _open(prepared: Prepared, *, fresh: bool = False) -> RunRecord:
    """The run's record, begun or gone on with, once nothing is left that could refuse the run."""
    config = prepared.config
    connect_to_mlflow(prepared.tracking_uri)
    mirror = Mirror(home(config))
    if fresh:
        remove_run(mirror)
    return open_record(
        mirror,
        RunRecord(
            config=without_secrets(config.model_dump(mode="json")),
            device_type=prepared.policy.device_type,
            identity=prepared.identity,
            pins=prepared.pins,
            counts=dict(prepared.counts),
        ),
    )


def _judging(prepared: Prepared) -> AbstractContextManager[Judge | None]:
    return judging(prepared.config)
