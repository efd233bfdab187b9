"""The command `tune`: from a sweep file to a ranked table, pictures and a registered model.

Everything that can be refused is refused here, before a trial starts; `searching` does the rest.
"""

import math
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Table

from models.config import ModelConfig
from orchestrator.cluster.connection import connect_to_ray
from orchestrator.cluster.nodes import count_nodes, list_node_resources
from orchestrator.cluster.placement import ClusterProfile, count_trial_slots, list_trial_bundles
from orchestrator.cluster.shared_storage import refuse_unshared
from orchestrator.config.functions import check_functions
from orchestrator.config.run import RunConfig
from orchestrator.config.sections import ReferenceConfig
from orchestrator.config.sweep import SweepConfig
from orchestrator.driver.prepare import PreparedRun, resolve_paths
from orchestrator.driver.record import MAY_CHANGE, RunRecord, lock_run, open_record, read_record, remove_run
from orchestrator.driver.scoring import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, start_services
from orchestrator.driver.train import prepare_and_report
from orchestrator.errors import UsageError
from orchestrator.redaction import hide_secrets
from orchestrator.references.service import ROUTER_CPUS, ReferenceService
from orchestrator.search.journal import Journal
from orchestrator.search.report.labels import format_value
from orchestrator.search.runner import SearchRunner
from orchestrator.search.searcher import sample_points
from orchestrator.search.trial import build_trial_config, find_trials_folder
from orchestrator.storage.paths import is_uri
from orchestrator.tracking.progress import make_plain_console
from orchestrator.worker.setup import count_total_steps
from preferences.buckets import redact_uri
from tune_spaces.schedulers import build_scheduler
from tune_spaces.spaces import Space

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

CHECKED_POINTS = 100
"""Points drawn before anything starts, each of which must make a valid run."""
_SWEEP_MAY_CHANGE = (
    *(f"run.{field}" for field in MAY_CHANGE if field != "evaluation"),
    "search.trials",
    "max_concurrent",
    "max_failures",
    "time_budget",
    "promote",
)


def run_sweep(sweep: SweepConfig, *, fresh: bool = False, retry_failed: bool = False) -> RunRecord:
    """Search, rank and promote; or go on where an earlier call was killed or ran out of time.

    Raises:
        UsageError, SpaceError: the input is wrong, or not even one trial fits the cluster.
        RunFailed: no trial gave a result, or too many failed.
    """
    console = make_plain_console()
    base = _serve_all_references(sweep)
    folder = Path(base.storage_path) / sweep.name
    space = _build_space(sweep, base)
    found = read_record(folder)
    if found is not None and "run" not in found.config:
        raise UsageError(f"{sweep.name}: {folder} is a training run's folder; give the search another name")
    before = None if fresh else found
    with lock_run(folder):
        of_base = None if before is None else replace(before, config=before.config["run"])
        prepared = prepare_and_report(base, console, of_base)
        scheduler, total = _refuse_unfit(sweep, base, space, prepared)
        more = retry_failed or (before is not None and _wants_more(sweep, before))

        def searching(device_type: str) -> SearchRunner:
            on = prepared.for_device(device_type)
            record = _open_record(sweep, on, folder, fresh=fresh, more_to_do=more)
            trials = Journal(find_trials_folder(sweep, base))
            return SearchRunner(sweep, space, scheduler, total, on, record, trials, folder, console)

        if before is not None and before.finished and not more:
            done = searching(before.device_type)
            done.reprint_result()
            return done.record
        with connect_to_ray(wait_minutes=base.placement.wait_minutes):
            slots = _count_slots(sweep, base)
            refuse_unshared(base.storage_path)
            search = searching(ClusterProfile.from_nodes(list_node_resources()).device_type)
            if retry_failed:
                _retry_failed(search.journal)
            return search.run_search(slots, _count_trials_per_node(sweep, space, slots))


def dry_run(sweep: SweepConfig, *, samples: int = 5) -> None:
    """Print the space, some of its points, the placement, and what the references would have to score."""
    console = make_plain_console()
    base = _serve_all_references(sweep)
    space = _build_space(sweep, base)
    prepared = prepare_and_report(base, console, None)
    _, total = _refuse_unfit(sweep, base, space, prepared)
    console.print(_build_space_table(space))
    console.print(f"\n{samples} of its points:")
    for point in sample_points(space, samples, seed=sweep.search.seed):
        told = (f"{field} {format_value(value)}" for field, value in point.items())
        console.print("  " + ", ".join(told))
    console.print(f"\n{_format_trial_counts(sweep, space)} of {total} steps each")
    with connect_to_ray(wait_minutes=base.placement.wait_minutes):
        slots = _count_slots(sweep, base)
        console.print(
            f"{slots} trial(s) at a time beside the references, each {_format_trial_request(base)}\n"
        )
        with start_services(
            prepared.for_device(ClusterProfile.from_nodes(list_node_resources()).device_type)
        ) as service:
            console.print(_build_forwards_table(service, prepared))


def _serve_all_references(sweep: SweepConfig) -> RunConfig:
    """The sweep's run file with paths resolved and every reference served.

    One replica scores the policy's own start for all trials, where each trial would score it for itself.
    """
    base = resolve_paths(sweep.base, base=Path.cwd())
    if is_uri(base.storage_path):
        raise UsageError(
            f"storage_path {redact_uri(base.storage_path)} is a URI, and a search keeps its journal in "
            "a folder: name one that all nodes share, such as a mounted bucket"
        )
    start = {name: getattr(base.policy, name) for name in ModelConfig.model_fields}
    models = {
        name: ReferenceConfig(**start) if reference.scored_by_workers else reference
        for name, reference in base.references.models.items()
    }
    references: dict[str, Any] = {"models": models}
    if base.evaluation.sampling is not None:  # a served reference must be there for samples
        references |= {"mode": "live"}
    base = base.model_copy(update={"references": base.references.model_copy(update=references)})
    return base


def _build_space(sweep: SweepConfig, base: RunConfig) -> Space:
    loss = sweep.run.get("loss") or {}
    return Space(sweep.spaces, sweep.domains, tuple(base.references.ordered), loss)


def _refuse_unfit(
    sweep: SweepConfig, base: RunConfig, space: Space, prepared: PreparedRun
) -> tuple["TrialScheduler", int]:
    """Draw many points, each of which must make a valid run; the scheduler, and the length of a trial."""
    if sweep.search.algorithm == "grid":
        next(space.iterate_grid())
    lengths = set()
    for point in sample_points(space, CHECKED_POINTS, seed=sweep.search.seed):
        try:
            run = build_trial_config(sweep, base, point, repeat=0, name="trial")
            check_functions(run, os.getcwd())
        except UsageError as error:
            said = ", ".join(f"{field} {format_value(value)}" for field, value in point.items())
            raise UsageError(
                f"{sweep.name}: the space has a point that makes no valid run ({said}):\n{error}\n"
                "Narrow a field under space, or leave a named space out"
            ) from None
        lengths.add(count_total_steps(run, len(prepared.train)))
    _refuse_unlabelled(sweep, prepared)
    if len(lengths) > 1 and sweep.scheduler.type != "fifo":
        raise UsageError(
            f"{sweep.name}: scheduler {sweep.scheduler.type} compares trials at the same step, and trials "
            f"would have {min(lengths)} to {max(lengths)} steps; fix training.epochs, max_steps and "
            "pairs_per_step, or use scheduler: {type: fifo}"
        )
    scheduler = build_scheduler(
        sweep.scheduler,
        metric=sweep.objective[0].metric,
        mode=sweep.objective[0].mode,
        max_steps=max(lengths),
        every_steps=base.evaluation.every_steps,
        mutations=space.numeric_domains,
        seed=sweep.search.seed,
    )
    return scheduler, max(lengths)


def _refuse_unlabelled(sweep: SweepConfig, prepared: PreparedRun) -> None:
    """What compares soft labels is pointless where every label is 1."""
    assert prepared.eval is not None
    if prepared.train.has_soft_labels or prepared.eval.has_soft_labels:
        return
    wanted = [o.metric for o in sweep.objective if o.metric == "eval/label_nll"]
    wanted += [f"space {name}" for name in sweep.spaces if name == "soft_labels"]
    if wanted:
        raise UsageError(
            f"{sweep.name}: {', '.join(wanted)} needs soft labels, and the data has none: give rows a "
            "soft_label or vote counts, or search and judge by something else"
        )


def _count_slots(sweep: SweepConfig, base: RunConfig) -> int:
    fit = count_trial_slots(base, list_node_resources(), routers=ROUTER_CPUS * len(base.references.models))
    return min(fit, sweep.max_concurrent or fit)


def _count_trials_per_node(sweep: SweepConfig, space: Space, slots: int) -> int:
    """How many trials share a machine's cores: no more than the search has, spread over its machines."""
    most = _count_points(sweep, space) * sweep.search.repeats * (2 if sweep.search.controls else 1)
    return math.ceil(min(slots, most) / count_nodes())


def _count_points(sweep: SweepConfig, space: Space) -> int:
    if sweep.search.algorithm == "grid":
        return sum(1 for _ in islice(space.iterate_grid(), sweep.search.trials))
    assert sweep.search.trials is not None  # only a grid ends by itself
    return sweep.search.trials


def _format_trial_counts(sweep: SweepConfig, space: Space) -> str:
    """`24 trials: 8 points x 3 seeds, and up to as many controls,`."""
    told = f"{_count_points(sweep, space)} point(s) x {sweep.search.repeats} seed(s)"
    return told + (", and up to as many controls," if sweep.search.controls else "")


def _format_trial_request(base: RunConfig) -> str:
    bundles = list_trial_bundles(base, ClusterProfile.from_nodes(list_node_resources()))
    return " + ".join(
        ", ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in bundles
    )


def _wants_more(sweep: SweepConfig, before: RunRecord) -> bool:
    """Whether a finished search is asked for more than it was."""
    now = sweep.model_dump(mode="json")
    return any(before.config[name] != now[name] for name in ("search", "promote"))


def _open_record(
    sweep: SweepConfig, prepared: PreparedRun, folder: Path, *, fresh: bool, more_to_do: bool
) -> RunRecord:
    if fresh:
        remove_run(folder)
    run = prepared.config.model_dump(mode="json")
    settings = sweep.model_dump(mode="json") | {"run": run}
    record = open_record(
        folder,
        RunRecord(
            config=hide_secrets(settings),
            device_type=prepared.policy.device_type,
            identity=prepared.identity,
            pins=prepared.pins,
            counts=dict(prepared.counts),
        ),
        may_change=_SWEEP_MAY_CHANGE,
        more_to_do=more_to_do,
    )
    (folder / "sweep.yaml").write_text(yaml.safe_dump(record.config, sort_keys=False))
    return record


def _retry_failed(trials: Journal) -> None:
    for trial in trials:
        if trial.status == "failed":
            trials.put_back(trial.number)


def _build_space_table(space: Space) -> Table:
    table = Table(box=None, title="the space", title_justify="left")
    for column in ("field", "domain", "when"):
        table.add_column(column, overflow="fold")
    for row in space.list_rows():
        table.add_row(row.field, row.domain, row.when)
    return table


def _build_forwards_table(service: ReferenceService, prepared: PreparedRun) -> Table:
    """Per reference: the data's responses, those the store misses, about how many batches they make."""
    parts = [part for part in (prepared.train, prepared.eval) if part is not None]
    table = Table("reference", "responses", "to score", "batches, about", box=None, title_justify="left")
    table.title = "the references' forward passes, whatever the number of trials"
    for name, model in prepared.references.items():
        rows = [part.references[name] for part in parts]
        missing = sum(service.count_missing({name: one})[name] for one in rows)
        responses = sum(2 * len(one) for one in rows)
        tokens = sum(int(one.pair_lengths.sum()) for one in rows)
        budget = GPU_BATCH_TOKENS if model.device_type == "cuda" else CPU_BATCH_TOKENS
        batches = math.ceil(tokens / budget * missing / max(responses, 1))
        table.add_row(name, f"{responses:,}", f"{missing:,}", f"{batches:,}")
    return table
