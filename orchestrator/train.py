"""The commands `train`, `score` and `check`: from a run file to a registered model."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from losses.config import LossConfig
from orchestrator import plots
from orchestrator.checkpoint import set_aside_torn_list
from orchestrator.cluster import JOB, connected, nodes, secrets
from orchestrator.config import RunConfig, RunFailed, UsageError
from orchestrator.entry import work
from orchestrator.feed import Part
from orchestrator.mlflow_client import connect as connect_to_mlflow
from orchestrator.mlflow_client import without_secrets
from orchestrator.model_card import Lineage, Reference
from orchestrator.placement import has_gpus, refuse_impossible, replica_bundle, worker_bundle
from orchestrator.prepare import Prepared, prepare, with_resolved_paths
from orchestrator.progress import Meter, following_steps, plain_console
from orchestrator.record import RunRecord, locked, open_record, read_record, remove_run
from orchestrator.references.messages import ReferenceSpec
from orchestrator.references.service import ReferenceService, start_references
from orchestrator.register import Probe, register
from orchestrator.tracking import Tracker, code_tags, read_metrics
from orchestrator.worker import CHECKPOINTS, EXPORT, WorkerSetup, total_steps
from preferences.tokenize import TokenTable

GPU_BATCH_TOKENS, CPU_BATCH_TOKENS = 16384, 2048
"""Tokens of a replica's batch: enough to fill the device, few enough that a CPU answers within seconds."""


def check(config: RunConfig) -> None:
    """Refuse what can be refused before a device is held; report what the run will read and ask for."""
    console = plain_console()
    prepared = _prepared(config, console)
    connect_to_mlflow(prepared.tracking_uri)
    with connected(wait_minutes=config.placement.wait_minutes):
        refuse_impossible(config, nodes())
    console.print(f"{config.name}: nothing to refuse")


def score(config: RunConfig) -> None:
    """Fill the store with every score the run will need."""
    console = plain_console()
    prepared = _prepared(config, console)
    with connected(wait_minutes=config.placement.wait_minutes):
        prepared = _placed(prepared)
        with _references(prepared) as service:
            for split, part in (("train", prepared.train), ("eval", prepared.held_out)):
                if part is not None:
                    _score(service, part, split, config, console)
            _report_scores(service, console)


def train(config: RunConfig, *, fresh: bool = False) -> RunRecord:
    """Train and register, or go on where an earlier call was killed.

    Raises:
        UsageError: the input is wrong.
        RunFailed: training diverged, or the cluster was lost.
    """
    console = plain_console()
    before = None if fresh else read_record(with_resolved_paths(config, base=Path.cwd()).folder)
    prepared = _prepared(config, console, before)
    with locked(prepared.config.folder):
        if before is not None and before.result:
            prepared = prepared.on(before.device_type)
            record = _open(prepared)
        else:
            with connected(wait_minutes=config.placement.wait_minutes):
                prepared = _placed(prepared)
                record = _open(prepared, fresh=fresh)
                _train_on_cluster(prepared, record, console)
        if not record.finished:
            _finish(prepared, record, _tracker(prepared, record))
    _report(prepared.config, record, console)
    return record


def _prepared(config: RunConfig, console: Console, before: RunRecord | None = None) -> Prepared:
    storage = config.storage_path
    if JOB in os.environ and "://" not in storage and not Path(storage).expanduser().is_absolute():
        raise UsageError(
            f"storage_path {storage} is relative, and a submitted job's working folder is thrown away "
            "with the job; give an absolute path that all nodes share"
        )
    prepared = prepare(with_resolved_paths(config, base=Path.cwd()), before)
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


def _placed(prepared: Prepared) -> Prepared:
    """The run on the cluster that is connected, or a refusal with the arithmetic."""
    cluster = nodes()
    refuse_impossible(prepared.config, cluster)
    return prepared.on("cuda" if has_gpus(cluster) else "cpu")


def _open(prepared: Prepared, *, fresh: bool = False) -> RunRecord:
    """The run's record, begun or gone on with, once nothing is left that could refuse the run."""
    config = prepared.config
    connect_to_mlflow(prepared.tracking_uri)
    if fresh:
        remove_run(config.folder)
    return open_record(
        config.folder,
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
    config = prepared.config
    fingerprints = {f"reference.{n}": m.fingerprint.digest for n, m in prepared.references.items()}
    pins = {f"pin.{field}": pin for field, pin in prepared.pins.items()}
    digests = {f"data.{split}_digest": digest for split, digest in prepared.digests.items()}
    tracker = Tracker.resume_or_start(
        record.mlflow_run,
        name=config.name,
        uri=prepared.tracking_uri,
        folder=config.folder,
        experiment=config.tracking.experiment,
        params=record.config,
        tags={"loss.preset": config.preset} | fingerprints | pins | digests | code_tags(),
    )
    record.mlflow_run = tracker.run_id
    record.write(config.folder)
    return tracker


def _train_on_cluster(prepared: Prepared, record: RunRecord, console: Console) -> None:
    config, tracker = prepared.config, _tracker(prepared, record)
    total = total_steps(config, len(prepared.train))
    with _failing_with(tracker), _references(prepared) as service:
        if prepared.held_out is not None:  # needed at once, for the evaluation before the first step
            _score(service, prepared.held_out, "eval", config, console)
        if config.references.mode == "precompute":
            _score(service, prepared.train, "train", config, console)
            service.release()
        else:
            _warm(service, _tables(prepared.train, config))
        console.print(f"training {total} steps on {config.parallel.workers} worker(s)")
        with following_steps(config.folder, total, console):
            result = _fit(prepared, service, tracker)
        _report_scores(service, console)
        stats = {name: asdict(counts) for name, counts in service.stats().items()}
        if result["status"] == "refused":
            raise UsageError(result["reason"])
        if result["status"] != "done":
            raise RunFailed(result["reason"])
    record.result = result | {"scores": stats}
    record.write(config.folder)


@contextmanager
def _failing_with(tracker: Tracker) -> Iterator[None]:
    """Let MLflow know how the run ended, where it did not end well."""
    try:
        yield
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def _fit(prepared: Prepared, service: ReferenceService, tracker: Tracker) -> dict[str, Any]:
    """Run the workers to the end; Ray Train restarts them from the last checkpoint when one is lost."""
    config = prepared.config
    bundle = worker_bundle(config.parallel.resources, gpus=prepared.policy.device_type == "cuda")
    setup = WorkerSetup(
        config=config,
        policy=prepared.policy.config,
        train=ray.put(prepared.train),
        held_out=ray.put(prepared.held_out) if prepared.held_out else None,
        routers=service.routers,
        identity=prepared.identity,
        start_is=prepared.start_is,
        folder=str(config.folder),
        tracking_uri=prepared.tracking_uri,
        tracking_run=tracker.run_id,
    )
    set_aside_torn_list(config.folder / CHECKPOINTS)
    trainer = TorchTrainer(
        work,
        train_loop_config={"setup": ray.put(setup), "secrets": ray.put(secrets(os.environ))},
        torch_config=TorchConfig(backend="nccl" if bundle.get("GPU", 0) > 0 else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.parallel.workers,
            use_gpu=bundle.get("GPU", 0) > 0,
            resources_per_worker=bundle,
        ),
        run_config=RayRunConfig(
            name=CHECKPOINTS,
            storage_path=str(config.folder),
            failure_config=FailureConfig(
                max_failures=config.parallel.max_failures, controller_failure_limit=0
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=config.training.keep_last),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        return trainer.fit().return_value
    except SystemExit:  # how Ray's own handler of Ctrl-C ends
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        raise RunFailed(_reason(error)) from error


def _reason(error: ray.train.TrainingFailedError) -> str:
    """The workers' own error in one paragraph; the full traces are in the log of Ray."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, first = min(failures.items())
    cause = getattr(first, "cause", None) or first
    said = str(cause).strip() or type(cause).__name__
    return (
        f"worker {rank} failed: {said.splitlines()[-1]}. Checkpoints are kept: the same "
        "command goes on from the last one"
    )


def _references(prepared: Prepared) -> ReferenceService:
    """Routers for all references; those scored in process have a store and no replicas."""
    config = prepared.config
    gpus = prepared.policy.device_type == "cuda"
    specs = []
    for name in config.references.ordered:
        settings, model = config.references.models[name], prepared.references[name]
        bundle = replica_bundle(settings.resources, gpus=gpus)
        num_cpus, num_gpus = bundle.pop("CPU", 0), bundle.pop("GPU", 0)
        specs.append(
            ReferenceSpec(
                name=name,
                config=model.config.model_copy(update={"dtype": model.config.dtype_on(model.device_type)}),
                fingerprint=model.fingerprint.digest,
                replicas=0 if settings.in_process else settings.replicas,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                resources=bundle,
                max_tokens_per_batch=GPU_BATCH_TOKENS if num_gpus else CPU_BATCH_TOKENS,
                environment=secrets(os.environ),
                start_timeout_s=60 * config.placement.wait_minutes,
            )
        )
    return start_references(specs, config.storage_path)


def _tables(part: Part, config: RunConfig) -> dict[str, TokenTable]:
    """The rows as the served references read them; those scored in process are the workers' own affair."""
    served = [name for name, reference in config.references.models.items() if not reference.in_process]
    return {name: part.references[name] for name in served}


def _warm(service: ReferenceService, tables: Mapping[str, TokenTable]) -> bool:
    """Place the references whose store misses scores, before any worker; raises what prevents it."""
    missing = [name for name, count in service.missing(tables).items() if count]
    service.start(missing)
    return bool(missing)


def _score(service: ReferenceService, part: Part, split: str, config: RunConfig, console: Console) -> None:
    """Fill the stores with a split's scores."""
    tables = _tables(part, config)
    if _warm(service, tables):
        with Meter(console, prefix=f"scoring {split}, ") as meter:
            service.score_all(tables, meter.update)


def _report_scores(service: ReferenceService, console: Console) -> None:
    for name, counts in service.stats().items():
        console.print(
            f"reference {name}: {counts.scored} responses scored in {counts.forwards} forward passes, "
            f"{counts.from_store} of {counts.asked} answered from the store, {counts.joined} joined, "
            f"{counts.replicas_started} replica(s) started",
        )


def _finish(prepared: Prepared, record: RunRecord, tracker: Tracker) -> None:
    """Plots, artifacts and the registered version; each can be done again after a kill."""
    config, folder = prepared.config, prepared.config.folder
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(record.config, sort_keys=False))
    tracker.log_files([run_file], under="config")
    tracker.log_files(plots.draw(folder), under="plots")
    tracker.set_tags(_result_tags(record))
    if config.tracking.registered_model is not None:
        export = folder / EXPORT
        if not (export / "probe.safetensors").exists():
            raise RunFailed(f"{export} is gone, so there is nothing to register: train again with --fresh")
        version = register(
            prepared.tracking_uri,
            name=config.tracking.registered_model,
            folder=export / "model",
            run_id=tracker.run_id,
            lineage=_lineage(prepared, record),
            probe=Probe.load(export / "probe.safetensors"),
            adapter=export / "adapter" if config.policy.adapter is not None else None,
            alias=config.tracking.alias,
        )
        record.registered = version.uri_pinned
    tracker.finish()
    record.finished = True
    record.write(folder)


def _report(config: RunConfig, record: RunRecord, console: Console) -> None:
    evaluations = [line for line in read_metrics(config.folder) if "eval/loss" in line]
    for metric in dict.fromkeys((config.evaluation.metric, "eval/loss", "eval/accuracy", "eval/label_nll")):
        values = [line[metric] for line in evaluations if line.get(metric) is not None]
        if values:
            console.print(f"{metric}: {values[0]:.4f} before, {values[-1]:.4f} after")
    if record.result["sharing_refused"]:
        console.print(f"prompts were computed once per response: {record.result['sharing_refused']}")
    console.print(f"plots: {config.folder / 'plots'}")
    model = config.folder / EXPORT / "model"
    console.print(f"registered as {record.registered}" if record.registered else f"model: {model}")


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


def _lineage(prepared: Prepared, record: RunRecord) -> Lineage:
    config = prepared.config
    history = [line for line in read_metrics(config.folder) if "eval/loss" in line]
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
    )
