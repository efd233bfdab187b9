"""The commands `train`, `score` and `check`: from a run file to a registered model."""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import yaml
from rich.console import Console

from losses.config import LossConfig
from orchestrator.cluster.connection import JOB, connected, nodes
from orchestrator.cluster.memory import size
from orchestrator.cluster.memory_table import table
from orchestrator.cluster.placement import Kind, refuse_impossible, worker_bundle
from orchestrator.config.run import RunConfig, RunFailed, UsageError
from orchestrator.driver.prepare import Prepared, prepare, storage_fit, with_resolved_paths
from orchestrator.driver.record import RunRecord, locked, open_record, read_record, remove_run
from orchestrator.driver.scoring import judging, report_scores, score_split, serve, served_tables, warm
from orchestrator.references.service import ReferenceService
from orchestrator.registry.model_card import Lineage, Reference
from orchestrator.registry.register import Probe, register
from orchestrator.storage.mirror import Mirror, home, is_uri, refuse_unshared, working_folder
from orchestrator.tracking import plots
from orchestrator.tracking.mlflow import connect as connect_to_mlflow
from orchestrator.tracking.mlflow import run_url, tracking_uri, without_secrets
from orchestrator.tracking.progress import following_steps, plain_console
from orchestrator.tracking.tracker import METRICS_FILE, Tracker, code_tags, read_metrics
from orchestrator.worker.launch import run_workers
from orchestrator.worker.loop import EXPORT, JOURNAL, WorkerSetup, total_steps
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


def _judging(prepared: Prepared) -> AbstractContextManager[Judge | None]:
    return judging(prepared.config)


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


def finish(prepared: Prepared, record: RunRecord, *, search: Mapping[str, str] | None = None) -> None:
    """Plots, artifacts and the registered version; each can be done again after a kill.

    `search` says which search chose the run, if one did.
    """
    config, mirror, tracker = prepared.config, Mirror(home(prepared.config)), _tracker(prepared, record)
    folder = mirror.folder
    mirror.pull(*JOURNAL)
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(record.config, sort_keys=False))
    tracker.log_files([run_file], under="config")
    tracker.log_files(plots.draw(folder), under="plots")
    tracker.set_tags(_result_tags(record))
    if config.tracking.registered_model is not None:
        mirror.pull(EXPORT)
        export = folder / EXPORT
        if not (export / "probe.safetensors").exists():
            raise RunFailed(
                f"{mirror.place(EXPORT)} is gone, so there is nothing to register: train again with --fresh"
            )
        version = register(
            prepared.tracking_uri,
            name=config.tracking.registered_model,
            folder=export / "model",
            run_id=tracker.run_id,
            lineage=_lineage(prepared, record, search or {}),
            probe=Probe.load(export / "probe.safetensors"),
            adapter=export / "adapter" if config.policy.adapter is not None else None,
            alias=config.tracking.alias,
        )
        record.registered = version.uri_pinned
    tracker.finish()
    record.finished = True
    mirror.push(run_file.name, plots.FOLDER)
    record.write(mirror)


def _report(config: RunConfig, record: RunRecord, console: Console) -> None:
    mirror = Mirror(home(config))
    mirror.pull(*JOURNAL)
    evaluations = _evaluations(config, record)
    for metric in dict.fromkeys((config.evaluation.metric, "eval/loss", "eval/accuracy", "eval/label_nll")):
        values = [line[metric] for line in evaluations if line.get(metric) is not None]
        if values:
            console.print(f"{metric}: {values[0]:.4f} before, {values[-1]:.4f} after")
    if record.result["sharing_refused"]:
        console.print(f"prompts were computed once per response: {record.result['sharing_refused']}")
    console.print(f"plots: {mirror.place(plots.FOLDER)}")
    model = mirror.place(EXPORT, "model")
    console.print(f"registered as {record.registered}" if record.registered else f"model: {model}")
    if page := run_url(tracking_uri(config.tracking.uri, config.storage_path), record.mlflow_run):
        console.print(f"MLflow run: {page}")


def _result_tags(record: RunRecord) -> dict[str, str]:
    """How often references were asked, and what `phi_star: auto` came to."""
    counts, phi_star = record.result["scores"], record.result["phi_star"]
    resolved = {} if phi_star is None else {"loss.dispersion.phi_star": f"{phi_star:.6g}"}
    return resolved | {
        f"scores.{name}.{key}": str(stats[key])
        for name, stats in counts.items()
        for key in ("scored", "from_store", "forwards", "replicas_started")
    }


def _resolved_loss(config: RunConfig, record: RunRecord) -> LossConfig:
    phi_star = record.result["phi_star"]
    return config.loss if phi_star is None else config.loss.with_phi_star(phi_star)


def _lineage(prepared: Prepared, record: RunRecord, search: Mapping[str, str]) -> Lineage:
    config = prepared.config
    history = _evaluations(config, record)
    held_out = [{k: v for k, v in line.items() if k.startswith("eval/")} for line in history]
    counts: dict[str, int] = {}
    for split, part in record.counts.items():
        counts |= {f"{split} {key.replace('_', ' ')}": n for key, n in part.items() if key != "skipped"}
        counts |= {f"{split} skipped, {reason}": count for reason, count in part["skipped"].items()}
    return Lineage(
        base_model=record.pins["policy"],
        preset=config.preset,
        loss=_resolved_loss(config, record).model_dump(mode="json"),
        references={
            name: Reference(record.pins[f"references.models.{name}"], model.fingerprint.digest)
            for name, model in prepared.references.items()
        },
        primary=config.references.primary,
        data_digest=prepared.digests["train"],
        eval_digest=prepared.digests.get("eval"),
        counts=counts,
        before=held_out[0] if held_out else {},
        after=held_out[-1] if held_out else {},
        config=record.config,
        code=code_tags(),
        search=search,
    )


def _evaluations(config: RunConfig, record: RunRecord) -> list[dict[str, Any]]:
    """Lines of the held-out evaluations, up to the one whose weights were exported."""
    lines = [line for line in read_metrics(working_folder(home(config))) if "eval/loss" in line]
    return [line for line in lines if line["step"] <= record.result["exported_step"]]
