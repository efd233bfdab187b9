"""The steps after training: plots, artifacts, the registered version, and the report on the console."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml
from rich.console import Console

from losses.config import LossConfig
from models.probe import LogitProbe
from orchestrator.config.run import RunConfig
from orchestrator.driver.execute import open_tracker
from orchestrator.driver.prepare import PreparedRun
from orchestrator.driver.provenance import describe_origin
from orchestrator.driver.record import RunRecord
from orchestrator.errors import RunFailed, UsageError
from orchestrator.files import find_changed_file
from orchestrator.registry.lineage import Lineage
from orchestrator.registry.model_card import render_model_card
from orchestrator.registry.register import register_model
from orchestrator.registry.summary import render_summary
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.paths import find_working_folder, run_location
from orchestrator.tracking.metrics_file import read_metrics
from orchestrator.tracking.mlflow import find_run_url, resolve_tracking_uri
from orchestrator.tracking.plots import PLOTS_FOLDER, draw_run
from orchestrator.worker.setup import EXPORT_FOLDER, METRIC_FILES


def finish_run(prepared: PreparedRun, record: RunRecord, *, search: Mapping[str, str] | None = None) -> None:
    """Draw plots, log artifacts and register the version; each step can be repeated after a kill.

    `search` are lineage tags of the search that chose the run, if one did.

    Raises:
        RunFailed: MLflow does not answer, or has not taken everything.
    """
    config, mirror = prepared.config, Mirror(run_location(prepared.config))
    kept = (
        f"The trained model is kept in {mirror.describe_path(EXPORT_FOLDER, 'model')}, and the same command "
        "sends what is missing"
    )
    folder = mirror.folder
    mirror.pull(*METRIC_FILES)
    try:
        tracker = open_tracker(prepared, record)
    except UsageError as error:
        raise RunFailed(f"{error}. {kept}") from error
    tracker.catch_up()  # what the workers could not send while the server was away
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(record.config, sort_keys=False))
    tracker.log_files([run_file], under="config")
    tracker.log_files(draw_run(folder), under="plots")
    tracker.set_tags(_build_result_tags(record))
    lineage = _build_lineage(prepared, record, search or {})
    if config.tracking.registered_model is not None:
        mirror.pull(EXPORT_FOLDER)
        export = folder / EXPORT_FOLDER
        if not (export / "probe.safetensors").exists():
            raise RunFailed(
                f"{mirror.describe_path(EXPORT_FOLDER)} is gone, so there is nothing to register: "
                "train again with --fresh"
            )
        if (changed := find_changed_file(export)) is not None:
            record.result = None
            record.write(mirror)
            raise RunFailed(
                f"{mirror.describe_path(EXPORT_FOLDER, changed)} is not what training wrote: a disk or a "
                "program has changed it. The same command exports the model again, from the last checkpoint"
            )
        version = register_model(
            prepared.tracking_uri,
            name=config.tracking.registered_model,
            folder=export / "model",
            run_id=tracker.run_id,
            lineage=lineage,
            probe=LogitProbe.load(export / "probe.safetensors"),
            adapter=export / "adapter" if config.policy.adapter is not None else None,
            alias=config.tracking.alias,
        )
        record.registered = version.uri_pinned
    tracker.describe(
        _render_description(config, lineage), replaces=render_summary(describe_origin(prepared, record))
    )
    if not tracker.finish():
        record.write(mirror)
        raise RunFailed(f"MLflow has not taken all of run {config.name!r}. {kept}")
    record.finished = True
    mirror.push(run_file.name, PLOTS_FOLDER)
    record.write(mirror)


def _render_description(config: RunConfig, lineage: Lineage) -> str:
    """Return a summary, whose beginning MLflow shows folded, and of a registered model its card too."""
    from huggingface_hub import ModelCard

    name, summary = config.tracking.registered_model, render_summary(lineage)
    if name is None:
        return summary
    card = ModelCard(render_model_card(name, lineage, adapter=config.policy.adapter is not None))
    return f"{summary}\n\n{card.text.strip()}"


def report_run(config: RunConfig, record: RunRecord, console: Console) -> None:
    """Print a run's metrics before and after training, and where its plots, model and MLflow run are."""
    mirror = Mirror(run_location(config))
    mirror.pull(*METRIC_FILES)
    evaluations = _read_evaluations(config, record)
    for metric in dict.fromkeys((config.evaluation.metric, "eval/loss", "eval/accuracy", "eval/label_nll")):
        values = [line[metric] for line in evaluations if line.get(metric) is not None]
        if values:
            console.print(f"{metric}: {values[0]:.4f} before, {values[-1]:.4f} after")
    if by_set := _list_set_accuracies(record.training_result.metrics):
        console.print(f"accuracy by set: {', '.join(by_set)}")
    if reason := record.training_result.plain_rows_reason:
        console.print(f"prompts were computed once per response: {reason}")
    for finding in record.training_result.findings.values():
        console.print(f"watch: {finding}")
    console.print(f"plots: {mirror.describe_path(PLOTS_FOLDER)}")
    model = mirror.describe_path(EXPORT_FOLDER, "model")
    console.print(f"registered as {record.registered}" if record.registered else f"model: {model}")
    if page := find_run_url(
        resolve_tracking_uri(config.tracking.uri, config.storage_path), record.mlflow_run
    ):
        console.print(f"MLflow run: {page}")


def _list_set_accuracies(metrics: Mapping[str, float]) -> list[str]:
    """List `name 0.71` for every held-out set that has an accuracy."""
    names = {name: name.removeprefix("eval/").removesuffix("/accuracy") for name in metrics}
    return [f"{names[n]} {v:.2f}" for n, v in metrics.items() if n == f"eval/{names[n]}/accuracy"]


def _build_result_tags(record: RunRecord) -> dict[str, str]:
    """Build MLflow tags of the references' counts, the findings and, for `phi_star: auto`, its value."""
    phi_star = record.training_result.phi_star
    resolved = {} if phi_star is None else {"loss.dispersion.phi_star": f"{phi_star:.6g}"}
    findings = {f"watch.{name}": message for name, message in record.training_result.findings.items()}
    return (
        resolved
        | findings
        | {
            f"scores.{name}.{key}": str(stats[key])
            for name, stats in record.reference_counts.items()
            for key in ("scored", "from_store", "forwards", "replicas_started")
        }
    )


def _resolve_loss(config: RunConfig, record: RunRecord) -> LossConfig:
    """Return the loss that was trained, with the calibrated phi_star if it was `auto`."""
    phi_star = record.training_result.phi_star
    return config.loss if phi_star is None else config.loss.with_phi_star(phi_star)


def _build_lineage(prepared: PreparedRun, record: RunRecord, search: Mapping[str, str]) -> Lineage:
    """Collect what the model card says about the model, its results, the data and the code behind it."""
    evaluations = [
        {name: value for name, value in line.items() if name.startswith("eval/")}
        for line in _read_evaluations(prepared.config, record)
    ]
    return replace(
        describe_origin(prepared, record),
        loss=_resolve_loss(prepared.config, record).model_dump(mode="json"),
        before=evaluations[0] if evaluations else {},
        after=evaluations[-1] if evaluations else {},
        search=search,
    )


def _read_evaluations(config: RunConfig, record: RunRecord) -> list[dict[str, Any]]:
    """Read the metrics of the evaluations, up to the one whose weights were exported."""
    lines = [line for line in read_metrics(find_working_folder(run_location(config))) if "eval/loss" in line]
    return [line for line in lines if line["step"] <= record.training_result.exported_step]
