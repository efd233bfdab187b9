"""A run's references and judge at work: started, their stores filled, what they did told, ended."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from orchestrator.cluster.nodes import list_node_resources
from orchestrator.cluster.placement import ClusterProfile, build_replica_bundle
from orchestrator.cluster.worker_environment import collect_secrets
from orchestrator.config.run import RunConfig
from orchestrator.driver.prepare import PreparedRun
from orchestrator.references.messages import ReferenceSpec
from orchestrator.references.service import ReferenceService, start_references
from orchestrator.tracking.progress import ProgressMeter
from orchestrator.worker.rewards import RewardScorer, start_reward_scorer
from preferences.split import TokenizedSplit
from preferences.tokenize import TokenTable

GPU_BATCH_TOKENS, CPU_BATCH_TOKENS = 16384, 2048
"""Tokens of a replica's batch: enough to fill the device, few enough that a CPU answers within seconds."""


def start_services(prepared: PreparedRun) -> ReferenceService:
    """Routers for all references; those scored in process have a store and no replicas."""
    config = prepared.config
    specs, kind = [], ClusterProfile.from_nodes(list_node_resources())
    for name in config.references.ordered:
        settings, model = config.references.models[name], prepared.references[name]
        bundle = build_replica_bundle(settings.resources, kind)
        num_cpus, num_gpus = bundle.pop("CPU", 0), bundle.pop("GPU", 0)
        specs.append(
            ReferenceSpec(
                name=name,
                config=model.config.model_copy(update={"dtype": model.config.dtype_on(model.device_type)}),
                fingerprint=model.fingerprint.digest,
                replicas=0 if settings.scored_by_workers else settings.replicas,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                resources=bundle,
                max_tokens_per_batch=GPU_BATCH_TOKENS if num_gpus else CPU_BATCH_TOKENS,
                environment=collect_secrets(os.environ),
                start_timeout_s=60 * config.placement.wait_minutes,
            )
        )
    return start_references(specs, config.storage_path)


@contextmanager
def open_reward_scorer(config: RunConfig) -> Iterator[RewardScorer | None]:
    """What rewards sampled responses while inside, where the run has a reward."""
    sampling = config.evaluation.sampling
    if sampling is None or sampling.reward is None:
        yield None
        return
    judge = start_reward_scorer(sampling.reward, start_timeout_s=60 * config.placement.wait_minutes)
    try:
        yield judge
    finally:
        judge.close()


def select_served_tables(part: TokenizedSplit, config: RunConfig) -> dict[str, TokenTable]:
    """The rows as the served references read them; those scored in process are the workers' own affair."""
    served = [name for name, reference in config.references.models.items() if not reference.scored_by_workers]
    return {name: part.references[name] for name in served}


def start_missing_references(
    service: ReferenceService, tables: Mapping[str, TokenTable], *, sampled: bool = False
) -> bool:
    """Place the references whose store misses scores, before any worker; raises what prevents it.

    All of them where samples of the policy will have to be scored, which no store knows.
    """
    missing = [name for name, count in service.count_missing(tables).items() if count or sampled]
    service.start_replicas(missing)
    return bool(missing)


def score_split(
    service: ReferenceService, part: TokenizedSplit, split: str, config: RunConfig, console: Console
) -> None:
    """Fill the stores with a split's scores."""
    tables = select_served_tables(part, config)
    if start_missing_references(service, tables):
        with ProgressMeter(console, prefix=f"scoring {split}, ") as meter:
            service.score_all(tables, meter.update)


def report_scores(service: ReferenceService, console: Console) -> None:
    """Print what every reference was asked and had to compute."""
    for name, counts in service.stats().items():
        samples = f", {counts.sampled} samples scored" if counts.sampled else ""
        console.print(
            f"reference {name}: {counts.scored} responses scored in {counts.forwards} forward passes, "
            f"{counts.from_store} of {counts.requested} answered from the store, {counts.coalesced} joined, "
            f"{counts.replicas_started} replica(s) started{samples}",
        )
