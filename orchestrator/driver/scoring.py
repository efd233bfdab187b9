"""Start a run's references and reward scorer, fill the references' stores, and report what they computed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from orchestrator.cluster.nodes import list_node_resources
from orchestrator.cluster.placement import ClusterProfile, build_replica_bundle
from orchestrator.config.run import RunConfig
from orchestrator.driver.prepare import PreparedRun
from orchestrator.errors import RunFailed
from orchestrator.references.audit import audit_scores
from orchestrator.references.service import ReferenceService, build_reference_spec, start_references
from orchestrator.references.tolerance import choose_tolerance
from orchestrator.tracking.progress import ProgressMeter
from orchestrator.tracking.progress_lines import RESPONSES
from orchestrator.worker.rewards import RewardScorer, start_reward_scorer
from preferences.split import TokenizedSplit
from preferences.tokens.tables import TokenTable

AUDIT_LINES = 5
"""Differences of a reference and split that are shown; all are counted."""


def start_services(prepared: PreparedRun) -> ReferenceService:
    """Start the routers of all references; a reference scored in process has a store and no replicas."""
    config = prepared.config
    specs, cluster = [], ClusterProfile.from_nodes(list_node_resources())
    for name in config.references.ordered:
        settings, model = config.references.models[name], prepared.references[name]
        specs.append(
            build_reference_spec(
                name,
                model.config,
                model.fingerprint.digest,
                device_type=model.device_type,
                bundle=build_replica_bundle(settings.resources, cluster),
                replicas=0 if settings.scored_by_workers else settings.replicas,
                start_timeout_s=60 * config.placement.wait_minutes,
                load_timeout_s=60 * config.references.load_minutes,
                answer_timeout_s=60 * config.references.answer_minutes,
            )
        )
    return start_references(specs, config.storage_path)


@contextmanager
def open_reward_scorer(config: RunConfig) -> Iterator[RewardScorer | None]:
    """Yield the scorer of sampled responses, None if the run has no reward, and close it afterwards."""
    sampling = config.evaluation.sampling
    if sampling is None or sampling.reward is None:
        yield None
        return
    reward_scorer = start_reward_scorer(sampling.reward, start_timeout_s=60 * config.placement.wait_minutes)
    try:
        yield reward_scorer
    finally:
        reward_scorer.close()


def prepare_references(service: ReferenceService, prepared: PreparedRun, console: Console) -> None:
    """Score the eval split; score the train split too, or start the references that training will need.

    In mode precompute the train split is scored and the references are ended. In mode live they keep running.
    Before that, the run file may want stored scores audited.

    Raises:
        RunFailed: a stored score is not what the reference gives now.
    """
    config = prepared.config
    if config.references.audit:
        refuse_wrong_scores(service, prepared, config.references.audit, console)
    if prepared.eval is not None:  # needed at once, for the evaluation before the first step
        score_split(service, prepared.eval, "eval", config, console)
    if config.references.mode == "precompute":
        score_split(service, prepared.train, "train", config, console)
        service.release()
    else:
        start_missing_references(
            service,
            select_served_tables(prepared.train, config),
            sampled=config.evaluation.sampling is not None,
        )


def refuse_wrong_scores(
    service: ReferenceService, prepared: PreparedRun, count: int, console: Console
) -> None:
    """Have replicas score up to `count` stored responses of each served reference anew, and end them.

    Raises:
        RunFailed: a stored score is not what the reference gives now; every difference has been printed.
    """
    splits = [split for split in (prepared.train, prepared.eval) if split is not None]
    wrong = []
    for name in select_served_tables(prepared.train, prepared.config):
        model, audited, differing = prepared.references[name], 0, 0
        tolerance = choose_tolerance(model.config, model.device_type)
        for split in splits:
            audit = audit_scores(service, name, split.references[name], count - audited, tolerance=tolerance)
            audited += audit.responses
            differing += len(audit.differences)
            for difference in audit.differences[:AUDIT_LINES]:
                console.print(f"audit: reference {name!r}, {split.places[difference.row]}, {difference}")
        console.print(f"audit: reference {name!r}: {differing} of {audited} stored scores differ")
        if differing:
            wrong.append(f"{name!r} ({differing} of {audited}, scores/{model.fingerprint.digest})")
    service.release()
    if wrong:
        raise RunFailed(
            f"stored scores are not what the references give now: {', '.join(wrong)}; delete these folders "
            "under storage_path, and their scores are made again"
        )


def select_served_tables(split: TokenizedSplit, config: RunConfig) -> dict[str, TokenTable]:
    """Return the split's token table of every served reference; workers score the other references."""
    served = [name for name, reference in config.references.models.items() if not reference.scored_by_workers]
    return {name: split.references[name] for name in served}


def start_missing_references(
    service: ReferenceService, tables: Mapping[str, TokenTable], *, sampled: bool = False
) -> bool:
    """Start the replicas of references whose store lacks scores, before workers take the room.

    With `sampled` all references start, because no store has scores of the policy's samples. An error that
    prevents the start is raised.

    Returns:
        Whether any reference had to start.
    """
    missing = [name for name, count in service.count_missing(tables).items() if count or sampled]
    service.start_replicas(missing)
    return bool(missing)


def score_split(
    service: ReferenceService, split: TokenizedSplit, name: str, config: RunConfig, console: Console
) -> None:
    """Fill the references' stores with the scores of a split, "train" or "eval" by `name`."""
    tables = select_served_tables(split, config)
    if start_missing_references(service, tables):
        with ProgressMeter(console, RESPONSES, f"scoring {name}, ") as meter:
            service.score_all(tables, meter.update)


def report_scores(service: ReferenceService, console: Console) -> None:
    """Print how many scores every reference was asked for, and how many it had to compute."""
    for name, counts in service.stats().items():
        samples = f", {counts.sampled} samples scored" if counts.sampled else ""
        console.print(
            f"reference {name}: {counts.scored} responses scored in {counts.forwards} forward passes, "
            f"{counts.from_store} of {counts.requested} answered from the store, {counts.coalesced} joined, "
            f"{counts.replicas_started} replica(s) started{samples}",
        )
