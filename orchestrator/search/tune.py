"""The command `tune`: from a sweep file to a ranked table, plots and a registered model.

Everything that can be refused is refused here, before a trial starts; `SearchRunner` does the rest.
"""

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from models.config import ModelConfig
from orchestrator.cluster.connection import connect_to_ray
from orchestrator.cluster.nodes import count_nodes, list_node_resources
from orchestrator.cluster.placement import ClusterProfile, count_trial_slots, list_trial_bundles
from orchestrator.cluster.shared_storage import refuse_unshared
from orchestrator.config.functions import check_functions, list_functions
from orchestrator.config.run import RunConfig
from orchestrator.config.sections import ReferenceConfig
from orchestrator.config.sweep import Point, SweepConfig
from orchestrator.driver.prepare import PreparedRun, refuse_hard_labels, resolve_paths
from orchestrator.driver.record import (
    MAY_CHANGE,
    RunRecord,
    lock_run,
    open_record,
    read_record,
    refuse_foreign_folder,
    remove_run,
)
from orchestrator.driver.scoring import start_services
from orchestrator.driver.train import prepare_and_report
from orchestrator.errors import UsageError
from orchestrator.redaction import hide_secrets
from orchestrator.references.service import (
    CPU_BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    ROUTER_CPUS,
    ReferenceService,
)
from orchestrator.search.context import SearchPlan
from orchestrator.search.journal import Journal
from orchestrator.search.report.labels import format_value
from orchestrator.search.runner import SearchRunner
from orchestrator.search.searcher import sample_points
from orchestrator.search.trial import build_trial_config, find_trials_folder
from orchestrator.storage.paths import is_uri
from orchestrator.tracking.mlflow import refuse_unshared_default
from orchestrator.tracking.progress import make_plain_console
from orchestrator.worker.setup import count_total_steps
from preferences.buckets import redact_uri
from tune_spaces.schedulers import build_scheduler
from tune_spaces.spaces import Space

CHECKED_POINTS = 100
"""Number of points that are drawn before anything starts; each must make a valid run."""
_ENDLESS = 100_000
"""More points of a grid are not counted."""
_SWEEP_MAY_CHANGE = (
    *(f"run.{field}" for field in MAY_CHANGE if not field.startswith("evaluation.")),
    "search.trials",
    "max_concurrent",
    "max_failures",
    "time_budget",
    "promote",
)


def run_sweep(sweep: SweepConfig, *, fresh: bool = False, retry_failed: bool = False) -> RunRecord:
    """Search, rank and promote; resume where an earlier call was killed or ran out of time.

    Raises:
        UsageError, SpaceError: the input is wrong, or not even one trial fits the cluster.
        RunFailed: no trial gave a result, or too many failed.
    """
    console = make_plain_console()
    base = _serve_all_references(sweep)
    folder = Path(base.storage_path) / sweep.name
    space = _build_space(sweep, base)
    if fresh:
        refuse_foreign_folder(folder, kind="search")
    existing = read_record(folder)
    if existing is not None and existing.kind != "search":
        raise UsageError(f"{sweep.name}: {folder} is a training run's folder; give the search another name")
    previous = None if fresh else existing
    if not fresh:
        Journal(find_trials_folder(sweep, base))  # a damaged record is refused before Ray is started
    with lock_run(folder):
        previous_run = None if previous is None else replace(previous, config=previous.config["run"])
        plan = _plan_search(sweep, space, prepare_and_report(base, console, previous_run))
        reopen = retry_failed or (previous is not None and _is_extended(sweep, previous))

        def build_runner(device_type: str) -> SearchRunner:
            prepared = plan.prepared.for_device(device_type)
            return SearchRunner(
                plan=replace(plan, prepared=prepared),
                record=_open_record(sweep, prepared, folder, fresh=fresh, reopen=reopen),
                journal=Journal(find_trials_folder(sweep, base)),
                folder=folder,
                console=console,
            )

        if previous is not None and previous.finished and not reopen:
            runner = build_runner(previous.device_type)
            runner.reprint_result()
            return runner.record
        with connect_to_ray(wait_minutes=base.placement.wait_minutes):
            slots = _count_slots(sweep, base)
            refuse_unshared(base.storage_path)
            refuse_unshared_default(base.tracking.uri, len(list_node_resources()))
            runner = build_runner(ClusterProfile.from_nodes(list_node_resources()).device_type)
            if retry_failed:
                _requeue_failed_trials(runner.journal)
            return runner.run_search(slots, _count_trials_per_node(sweep, space, slots))


def dry_run(sweep: SweepConfig, *, samples: int = 5) -> None:
    """Print the space, some of its points, the placement, and how much the references would have to score."""
    console = make_plain_console()
    base = _serve_all_references(sweep)
    space = _build_space(sweep, base)
    prepared = prepare_and_report(base, console)
    plan = _plan_search(sweep, space, prepared)
    console.print(_build_space_table(space))
    console.print(f"\n{samples} of its points:")
    for point in sample_points(space, samples, seed=sweep.search.seed):
        console.print(f"  {_format_point(point)}")
    console.print(f"\n{_format_trial_counts(sweep, space)} of {plan.total_steps} steps each")
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
    """Return the sweep's run file with paths resolved and every reference served.

    A reference `model: policy` is served too: one replica scores the initial policy for all trials, which
    would otherwise score it once each.
    """
    base = resolve_paths(sweep.base, base=Path.cwd())
    if is_uri(base.storage_path):
        raise UsageError(
            f"storage_path {redact_uri(base.storage_path)} is a URI, and a search keeps its journal in "
            "a folder: name one that all nodes share, such as a mounted bucket"
        )
    policy_settings = {name: getattr(base.policy, name) for name in ModelConfig.model_fields}
    models = {
        name: ReferenceConfig(**policy_settings) if reference.scored_by_workers else reference
        for name, reference in base.references.models.items()
    }
    references: dict[str, Any] = {"models": models}
    if base.evaluation.sampling is not None:  # the references must keep running to score samples
        references |= {"mode": "live"}
    return base.model_copy(update={"references": base.references.model_copy(update=references)})


def _build_space(sweep: SweepConfig, base: RunConfig) -> Space:
    loss = sweep.run.get("loss") or {}
    return Space(sweep.spaces, sweep.domains, tuple(base.references.ordered), loss)


def _plan_search(sweep: SweepConfig, space: Space, prepared: PreparedRun) -> SearchPlan:
    """Check that the search can run, and build its scheduler for the length of its trials.

    Raises:
        UsageError, SpaceError: a drawn point makes no valid run, the data has no soft labels that the search
            needs, or the scheduler cannot compare trials of different lengths.
    """
    _refuse_unlabelled(sweep, prepared)
    lengths, link_digests = _check_points(sweep, space, prepared)
    prepared = replace(prepared, function_digests={**prepared.function_digests, **link_digests})
    if len(lengths) > 1 and sweep.scheduler.type != "fifo":
        raise UsageError(
            f"{sweep.name}: scheduler {sweep.scheduler.type} compares trials at the same step, and trials "
            f"would have {min(lengths)} to {max(lengths)} steps; fix training.epochs, max_steps and "
            "pairs_per_step, or use scheduler: {type: fifo}"
        )
    total_steps = max(lengths)
    scheduler = build_scheduler(
        sweep.scheduler,
        metric=sweep.objective[0].metric,
        mode=sweep.objective[0].mode,
        max_steps=total_steps,
        every_steps=prepared.config.evaluation.every_steps,
        mutations=space.numeric_domains,
        seed=sweep.search.seed,
    )
    return SearchPlan(
        sweep=sweep, space=space, scheduler=scheduler, total_steps=total_steps, prepared=prepared
    )


def _check_points(sweep: SweepConfig, space: Space, prepared: PreparedRun) -> tuple[set[int], dict[str, str]]:
    """Draw many points and refuse one that makes no valid run.

    Returns:
        The trials' numbers of steps, and digests of the links' sources by function.
    """
    if sweep.search.algorithm == "grid":
        _count_points(sweep, space)
    lengths: set[int] = set()
    link_digests: dict[str, str] = {}
    for point in sample_points(space, CHECKED_POINTS, seed=sweep.search.seed):
        try:
            run = build_trial_config(sweep, prepared.config, point, repeat=0, name="trial")
            digests = check_functions(run, str(Path.cwd()))
            refuse_hard_labels(run, prepared.train)
        except UsageError as error:
            raise UsageError(
                f"{sweep.name}: the space has a point that makes no valid run ({_format_point(point)}):\n"
                f"{error}\nNarrow a field under space, or leave a named space out"
            ) from None
        lengths.add(count_total_steps(run, len(prepared.train)))
        link_digests |= {list_functions(run)[field]: digest for field, digest in digests.items()}
    return lengths, link_digests


def _refuse_unlabelled(sweep: SweepConfig, prepared: PreparedRun) -> None:
    """Refuse a search that compares soft labels on data where every label is 1."""
    assert prepared.eval is not None  # a sweep without held-out pairs is refused
    if prepared.train.has_soft_labels or prepared.eval.has_soft_labels:
        return
    needing = [objective.metric for objective in sweep.objective if objective.metric == "eval/label_nll"]
    if not prepared.config.data.allow_hard_labels:
        needing += [f"space {name}" for name in sweep.spaces if name == "soft_labels"]
    if needing:
        raise UsageError(
            f"{sweep.name}: {', '.join(needing)} needs soft labels, and the data has none: give rows a "
            "soft_label or vote counts, or search and judge by something else"
        )


def _count_slots(sweep: SweepConfig, base: RunConfig) -> int:
    """Count the trials that run at a time: those that fit the cluster, up to `max_concurrent`."""
    fitting = count_trial_slots(
        base, list_node_resources(), routers=ROUTER_CPUS * len(base.references.models)
    )
    return min(fitting, sweep.max_concurrent or fitting)


def _count_trials_per_node(sweep: SweepConfig, space: Space, slots: int) -> int:
    """Count the trials that share a machine's cores: at most all of the search, spread over the machines."""
    max_trials = _count_points(sweep, space) * sweep.search.repeats * (2 if sweep.search.controls else 1)
    return math.ceil(min(slots, max_trials) / count_nodes())


def _count_points(sweep: SweepConfig, space: Space) -> int:
    if sweep.search.algorithm == "grid":
        most = min(sweep.search.trials or _ENDLESS, _ENDLESS)
        count = sum(1 for _ in islice(space.iterate_grid(), most))
        if count == _ENDLESS:
            raise UsageError(
                f"{sweep.name}: the grid has {_ENDLESS:,} points or more, which no cluster tries; leave "
                "fields or values out under space, or set search.trials and search.algorithm: random"
            )
        return count
    assert sweep.search.trials is not None  # only a grid is finite without it
    return sweep.search.trials


def _format_point(point: Point) -> str:
    return ", ".join(f"{field} {format_value(value)}" for field, value in point.items())


def _format_trial_counts(sweep: SweepConfig, space: Space) -> str:
    """Format the number of trials, such as `8 point(s) x 3 seed(s), and up to as many controls,`."""
    counts = f"{_count_points(sweep, space)} point(s) x {sweep.search.repeats} seed(s)"
    return counts + (", and up to as many controls," if sweep.search.controls else "")


def _format_trial_request(base: RunConfig) -> str:
    """Format the resources that a trial requests, such as `1 CPU, 1 GPU`."""
    bundles = list_trial_bundles(base, ClusterProfile.from_nodes(list_node_resources()))
    return " + ".join(
        ", ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in bundles
    )


def _is_extended(sweep: SweepConfig, previous: RunRecord) -> bool:
    """Return whether search or promotion settings have changed since the search was recorded."""
    current = sweep.model_dump(mode="json")
    return any(previous.config.get(name) != current[name] for name in ("search", "promote"))


def _open_record(
    sweep: SweepConfig, prepared: PreparedRun, folder: Path, *, fresh: bool, reopen: bool
) -> RunRecord:
    """Create the search's record or resume it, and write its settings to `sweep.yaml`."""
    if fresh:
        remove_run(folder, kind="search")
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
        reopen=reopen,
    )
    (folder / "sweep.yaml").write_text(yaml.safe_dump(record.config, sort_keys=False))
    return record


def _requeue_failed_trials(journal: Journal) -> None:
    for trial in journal:
        if trial.status == "failed":
            journal.mark_pending(trial.number)


def _build_space_table(space: Space) -> Table:
    """Build the table of the space's fields, their domains, and when each is searched."""
    table = Table(box=None, title="the space", title_justify="left")
    for column in ("field", "domain", "when"):
        table.add_column(column, overflow="fold")
    for row in space.list_rows():
        table.add_row(row.field, row.domain, row.when)
    return table


def _build_forwards_table(service: ReferenceService, prepared: PreparedRun) -> Table:
    """Build a table of the responses per reference, those to score, and about how many batches they make."""
    splits = [split for split in (prepared.train, prepared.eval) if split is not None]
    table = Table("reference", "responses", "to score", "batches, about", box=None, title_justify="left")
    table.title = "the references' forward passes, whatever the number of trials"
    for name, model in prepared.references.items():
        token_tables = [split.references[name] for split in splits]
        missing = sum(service.count_missing({name: tokens})[name] for tokens in token_tables)
        responses = sum(2 * len(tokens) for tokens in token_tables)
        token_count = sum(int(tokens.pair_lengths.sum()) for tokens in token_tables)
        budget = GPU_BATCH_TOKENS if model.device_type == "cuda" else CPU_BATCH_TOKENS
        batches = math.ceil(token_count / budget * missing / max(responses, 1))
        table.add_row(name, f"{responses:,}", f"{missing:,}", f"{batches:,}")
    return table
