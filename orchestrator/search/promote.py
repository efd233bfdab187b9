"""What a search is for: its best trial's model in the registry, with the search in its lineage."""

import os
from dataclasses import replace
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


def find_best_trial(trials: Journal, sweep: SweepConfig) -> TrialRecord | None:
    """The best repeat of the best point; a control is there to be compared with. None without any result."""
    objective = sweep.objective[0]
    for point in rank_points(list(trials), sweep.objective):
        given = {t.number: v for t in point.trials if (v := read_result(t, objective.metric)) is not None}
        if given and point.rank is not None and point.control_of is None:
            return trials[(max if objective.mode == "max" else min)(given, key=lambda number: given[number])]
    return None


def _choose_alias(base: RunConfig) -> str:
    """The alias that the promoted version asks for."""
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
        best: the trial.
        trials: how many trials the search had.
        service: the references, running.
        reward_scorer: scores sampled responses, where a reward is set.

    Returns:
        The record of the promoted run.
    """
    sweep, base = search.sweep, search.base
    anew = sweep.promote == "retrain"
    config = build_trial_config(sweep, base, best.point, repeat=best.repeat, name=best.name)
    named = {"registered_model": base.tracking.registered_model or sweep.name, "alias": _choose_alias(base)}
    update: dict[str, Any] = {"tracking": base.tracking.model_copy(update=named)}
    if anew:
        update |= {"name": f"retrained-{best.name}", "storage_path": str(search.folder)}
    config = config.model_copy(update=update)
    references = {name: search.prepared.references[name] for name in config.references.ordered}
    prepared = replace(
        search.prepared,
        config=config,
        references=references,
        function_digests=check_functions(config, os.getcwd()),
    )
    how = ", trained anew" if anew else f", from step {best.step} to its end" * (best.status == "stopped")
    search.console.print(f"\npromoting trial {best.number}{how}")
    record = _open_trial_record(prepared, search, None if anew else best)
    if record.result is None:
        train_on_cluster(prepared, record, service, reward_scorer, search.console)
    if not record.finished:
        objectives = ", ".join(f"{one.metric} ({one.mode})" for one in sweep.objective)
        lineage = {"search": sweep.name, "search.trial": str(best.number), "search.objective": objectives}
        lineage |= {"search.trials": str(trials), "search.mlflow_run": search.mlflow_run}
        finish_run(prepared, record, search=lineage)
    return record


def registration_message(run: RunRecord, tracking_uri: str) -> str:
    """Where the promoted version is, with the aliases that it has: one that it asked for may be refused."""
    assert run.registered is not None
    aliases = find_version(connect_to_mlflow(tracking_uri), run.registered).aliases
    return f"registered as {run.registered}" + (f", alias {', '.join(sorted(aliases))}" if aliases else "")


def _open_trial_record(prepared: PreparedRun, search: SearchContext, best: TrialRecord | None) -> RunRecord:
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
