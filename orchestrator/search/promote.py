"""Find a search's best trial and register its model, with the search in its lineage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.config.functions import check_functions
from orchestrator.config.run import RunConfig
from orchestrator.config.sweep import SweepConfig
from orchestrator.driver.execute import train_on_cluster
from orchestrator.driver.finish import finish_run
from orchestrator.driver.prepare import PreparedRun
from orchestrator.driver.record import RunRecord, open_record
from orchestrator.redaction import hide_secrets
from orchestrator.references.service import ReferenceService
from orchestrator.registry.versions import find_version
from orchestrator.search.context import SearchContext
from orchestrator.search.journal import Journal, TrialRecord
from orchestrator.search.report.labels import read_result
from orchestrator.search.report.ranking import rank_points
from orchestrator.search.trial import build_trial_config
from orchestrator.tracking.mlflow import connect_to_mlflow
from orchestrator.worker.rewards import RewardScorer


def find_best_trial(journal: Journal, sweep: SweepConfig) -> TrialRecord | None:
    """Return the best repeat of the best point by the first objective; None if no trial has a result.

    Controls are passed over: they are there for comparison.
    """
    objective = sweep.objective[0]
    choose = max if objective.mode == "max" else min
    for point in rank_points(list(journal), sweep.objective):
        values = {
            trial.number: value
            for trial in point.trials
            if (value := read_result(trial, objective.metric)) is not None
        }
        if values and point.rank is not None and point.control_of is None:
            return journal[choose(values, key=lambda number: values[number])]
    return None


def _choose_alias(base: RunConfig) -> str:
    """Return the alias that is requested for the promoted version."""
    return base.tracking.alias or "best"


def promote_trial(
    search: SearchContext,
    best: TrialRecord,
    *,
    trials: int,
    service: ReferenceService,
    reward_scorer: RewardScorer | None,
) -> RunRecord:
    """Export and register a search's best trial.

    A trial that was stopped is first trained to its end; with `promote: retrain` its point is trained anew.

    Args:
        search: the search.
        best: its best trial.
        trials: how many trials the search had.
        service: the running references.
        reward_scorer: rewards sampled responses; None if no reward is set.

    Returns:
        The record of the promoted run.
    """
    sweep = search.sweep
    retrain = sweep.promote == "retrain"
    prepared = _prepare_promoted_run(search, best)
    how = ", trained anew" if retrain else f", from step {best.step} to its end" * (best.status == "stopped")
    search.console.print(f"\npromoting trial {best.number}{how}")
    record = _open_trial_record(prepared, search, None if retrain else best)
    if record.result is None:
        train_on_cluster(prepared, record, service, reward_scorer, search.console)
    if not record.finished:
        objectives = ", ".join(f"{one.metric} ({one.mode})" for one in sweep.objective)
        lineage = {"search": sweep.name, "search.trial": str(best.number), "search.objective": objectives}
        lineage |= {"search.trials": str(trials), "search.mlflow_run": search.mlflow_run}
        finish_run(prepared, record, search=lineage)
    return record


def _prepare_promoted_run(search: SearchContext, best: TrialRecord) -> PreparedRun:
    """Prepare the run to export: the trial's, or a new one in its own folder with `promote: retrain`."""
    sweep, base = search.sweep, search.base
    config = build_trial_config(sweep, base, best.point, repeat=best.repeat, name=best.name)
    target = {"registered_model": base.tracking.registered_model or sweep.name, "alias": _choose_alias(base)}
    update: dict[str, Any] = {"tracking": base.tracking.model_copy(update=target)}
    if sweep.promote == "retrain":
        update |= {"name": f"retrained-{best.name}", "storage_path": str(search.folder)}
    config = config.model_copy(update=update)
    return replace(
        search.prepared,
        config=config,
        references={name: search.prepared.references[name] for name in config.references.ordered},
        function_digests=check_functions(config, str(Path.cwd())),
    )


def format_registration(run: RunRecord, tracking_uri: str) -> str:
    """Format a message of the promoted version and its aliases; the requested alias may have been refused."""
    assert run.registered is not None
    aliases = find_version(connect_to_mlflow(tracking_uri), run.registered).aliases
    return f"registered as {run.registered}" + (f", alias {', '.join(sorted(aliases))}" if aliases else "")


def _open_trial_record(prepared: PreparedRun, search: SearchContext, best: TrialRecord | None) -> RunRecord:
    """Open the record of the promoted run, in the MLflow run of `best`, or in a new one if that is None."""
    new = RunRecord(
        config=hide_secrets(prepared.config.model_dump(mode="json")),
        device_type=prepared.policy.device_type,
        identity=prepared.identity,
        pins=prepared.pins,
        counts=dict(prepared.counts),
        mlflow_run=None if best is None else best.mlflow_run,
        mlflow_parent=search.mlflow_run,
    )
    return open_record(prepared.config.folder, new)
