"""The commands `train`, `score` and `check`: from a run file to a registered model."""

import os
from pathlib import Path

from rich.console import Console

from models.load import describe_training
from orchestrator.cluster.connection import connect_to_ray
from orchestrator.cluster.memory import size_run
from orchestrator.cluster.memory_table import format_memory_table
from orchestrator.cluster.nodes import list_node_resources
from orchestrator.cluster.placement import ClusterProfile, refuse_impossible
from orchestrator.cluster.shared_storage import refuse_unshared
from orchestrator.cluster.worker_environment import JOB_CONFIG
from orchestrator.config.run import RunConfig
from orchestrator.driver.execute import train_on_cluster
from orchestrator.driver.finish import finish_run, report_run
from orchestrator.driver.prepare import (
    PreparedRun,
    check_storage,
    prepare_run,
    refuse_hard_labels,
    resolve_paths,
)
from orchestrator.driver.record import (
    RunRecord,
    lock_run,
    open_record,
    read_record,
    refuse_foreign_folder,
    remove_run,
)
from orchestrator.driver.scoring import (
    open_reward_scorer,
    refuse_wrong_scores,
    report_scores,
    score_split,
    start_services,
)
from orchestrator.errors import UsageError
from orchestrator.redaction import hide_secrets
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.paths import is_uri, run_location
from orchestrator.tracking.mlflow import connect_to_mlflow, refuse_unshared_default
from orchestrator.tracking.progress import RowCounter, make_plain_console


def check_run(config: RunConfig) -> None:
    """Refuse a wrong run before it takes a device; print the rows it reads and the memory it needs."""
    console = make_plain_console()
    prepared = prepare_and_report(config, console, _read_previous(config))
    refuse_hard_labels(prepared.config, prepared.train)
    located = {name: model.located for name, model in prepared.references.items()}
    console.print(format_memory_table(size_run(prepared.config, prepared.policy.located, located)))
    with connect_to_ray(wait_minutes=config.placement.wait_minutes):
        place_on_cluster(prepared)
        refuse_unshared_default(config.tracking.uri, len(list_node_resources()))
    console.print(f"{config.name}: nothing to refuse")


def score_run(config: RunConfig, *, audit: int = 0) -> None:
    """Fill the references' stores with every score that the run will need.

    With `audit`, only compare that many stored scores of each reference with what it gives now.

    Raises:
        RunFailed: a stored score differs.
    """
    console = make_plain_console()
    prepared = prepare_and_report(config, console, _read_previous(config))
    with connect_to_ray(wait_minutes=config.placement.wait_minutes):
        prepared = place_on_cluster(prepared)
        with start_services(prepared) as service:
            if audit:
                refuse_wrong_scores(service, prepared, audit, console)
                return
            for name, split in (("train", prepared.train), ("eval", prepared.eval)):
                if split is not None:
                    score_split(service, split, name, config, console)
            report_scores(service, console)


def train_run(config: RunConfig, *, fresh: bool = False) -> RunRecord:
    """Train and register, or resume where an earlier call was killed.

    Raises:
        UsageError: the input is wrong.
        RunFailed: training diverged, or the cluster was lost.
    """
    console = make_plain_console()
    resolved = _resolve_config(config)
    check_storage(resolved)
    mirror = Mirror(run_location(resolved))
    if fresh:
        refuse_foreign_folder(mirror, kind="run")
    previous = None if fresh else read_record(mirror)
    prepared = prepare_and_report(config, console, previous)
    refuse_hard_labels(prepared.config, prepared.train)
    with lock_run(mirror):
        if previous is not None and previous.result is not None:
            prepared = prepared.for_device(previous.device_type)
            record = _open_record(prepared)
        else:
            with connect_to_ray(wait_minutes=config.placement.wait_minutes):
                prepared = place_on_cluster(prepared)
                refuse_unshared_default(config.tracking.uri, len(list_node_resources()))
                record = _open_record(prepared, fresh=fresh)
                with (
                    start_services(prepared) as service,
                    open_reward_scorer(prepared.config) as reward_scorer,
                ):
                    train_on_cluster(prepared, record, service, reward_scorer, console)
        if not record.finished:
            finish_run(prepared, record)
        report_run(prepared.config, record, console)
        mirror.discard_copy()
    return record


def prepare_and_report(config: RunConfig, console: Console, previous: RunRecord | None = None) -> PreparedRun:
    """Prepare a run with all checks that need no cluster, and print a line on each split's rows."""
    if config.loss_notice:
        console.print(f"loss: {config.loss_notice}")
    with RowCounter(console, "tokenising") as counter:
        prepared = prepare_run(_resolve_config(config), previous, progress=counter.update)
    for split, counts in prepared.counts.items():
        text = f"{split}: {counts['pairs']} pairs"
        if "sources" in counts:
            text += f" ({', '.join(f'{source} {pairs}' for source, pairs in counts['sources'].items())})"
        if counts["truncated"]:
            text += f", {counts['truncated']} truncated"
        if counts["swapped"]:
            text += f", {counts['swapped']} swapped (their label was below one half)"
        for reason, count in counts["skipped"].items():
            text += f", {count} skipped ({reason})"
        console.print(text)
        for source in prepared.sources.get(split, ()):
            if source.understood:
                console.print(f"{split}: {source.source.name} is read as\n{source.understood}")
    for line in prepared.notices:
        console.print(line)
    if previous is not None and not previous.pins_tokens:
        console.print(
            f"{config.name} was started by a polyref that did not record tokens: whether today's are those "
            "it began with is not known; from now on they are compared"
        )
    for line in describe_training(prepared.policy.located, prepared.config.policy):
        console.print(f"policy: {line}")
    return prepared


def _read_previous(config: RunConfig) -> RunRecord | None:
    """Read the record of the run if it has been started: it pins versions and the date of chat templates."""
    resolved = _resolve_config(config)
    check_storage(resolved)
    return read_record(Mirror(run_location(resolved)))


def _resolve_config(config: RunConfig) -> RunConfig:
    """Resolve the run file's paths against the current folder; refuse a storage that ends with the job."""
    storage = config.storage_path
    if JOB_CONFIG in os.environ and not is_uri(storage) and not storage.startswith(("/", "~")):
        raise UsageError(
            f"storage_path {storage} is relative, and a submitted job's working folder is thrown away "
            "with the job; give an absolute path that all nodes share, or the URI of an object store"
        )
    return resolve_paths(config, base=Path.cwd())


def place_on_cluster(prepared: PreparedRun) -> PreparedRun:
    """Return the run for the connected cluster's devices; refuse one that cannot fit, with the arithmetic."""
    cluster = list_node_resources()
    refuse_impossible(prepared.config, cluster)
    refuse_unshared(prepared.config.storage_path)
    return prepared.for_device(ClusterProfile.from_nodes(cluster).device_type)


def _open_record(prepared: PreparedRun, *, fresh: bool = False) -> RunRecord:
    """Create the run's record or resume it; called last, so that a refused run leaves no record."""
    config = prepared.config
    connect_to_mlflow(prepared.tracking_uri)
    mirror = Mirror(run_location(config))
    if fresh:
        remove_run(mirror, kind="run")
    return open_record(
        mirror,
        RunRecord(
            config=hide_secrets(config.model_dump(mode="json")),
            device_type=prepared.policy.device_type,
            identity=prepared.identity,
            pins=prepared.pins,
            counts=dict(prepared.counts),
        ),
    )
