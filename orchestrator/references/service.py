"""The driver's service: starts routers for a run's references, scores in bulk, and ends them with the run."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from models.config import ModelConfig
from orchestrator.cluster.connection import NAMESPACE
from orchestrator.cluster.worker_environment import SealedSecrets
from orchestrator.references.bulk import BulkCounts, BulkPlan, digest_table
from orchestrator.references.client import PING_EVERY_S, TokenTableLike, wait_for_answer
from orchestrator.references.messages import (
    ReferenceSpec,
    RouterStats,
    ScoreKind,
    ScoreRequest,
    ScoringError,
)
from orchestrator.references.pool import explain_actor_error
from orchestrator.references.replica import Replica
from orchestrator.references.router import HEALTH_GROUP, Router
from orchestrator.references.store import resolve_storage

ROUTER_CPUS = 0.01
"""A router is idle most of the time: it must not be counted as a whole core on a small machine."""
MAX_REQUEST_RETRIES = 8
"""How often one request is sent again to a router that died; deaths of a long run do not add up."""
CLOSE_TIMEOUT_S = 600
"""How long a router may take to save its scores at the end."""
MAX_CONCURRENCY = 1000
NAME_RELEASE_TIMEOUT_S = 10
BULK_REQUESTS = 64
"""Most batches per reference that are requested at the same time when tables are scored."""

GPU_BATCH_TOKENS, CPU_BATCH_TOKENS = 16384, 2048
"""Most tokens per batch of a replica: enough to fill the device, and a CPU answers within seconds."""

Progress = Callable[[str, int, int, Sequence[str]], None]
"""Called with a reference's name, its different responses that are done and in all, and notes on them.

The first call reports what the store has.
"""


class ReferenceService:
    """The running routers by reference name. A context manager: leaving it ends every actor it started.

    Routers belong to the driver that started them and end with it in any case. References that have the same
    fingerprint share one router.

    Args:
        routers: actor handles by reference name.
        addresses: actor names by reference name.
        owned: the routers that this service started and ends.
        specs: the references, whose secrets a router needs again when it is restarted.
    """

    def __init__(
        self,
        routers: Mapping[str, Any],
        addresses: Mapping[str, str],
        owned: Mapping[str, Any],
        specs: Sequence[ReferenceSpec],
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self.routers = dict(routers)
        """Actor handles by reference name."""
        self.addresses = dict(addresses)
        """Actor names by reference name, for `connect_to_routers` in another process of this job."""
        self._owned_routers = dict(owned)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def start_replicas(self, names: Iterable[str] | None = None) -> None:
        """Start replicas now, of all references or of those in `names`, and wait until they have their model.

        Raises:
            ModelError: a model cannot be found or loaded.
            ScoringError: no node had room for a replica, or it died.
        """
        routers = self.routers if names is None else {name: self.routers[name] for name in names}
        answers = {name: router.start.remote() for name, router in routers.items()}
        for name, answer in answers.items():
            wait_for_answer(name, routers[name], answer)

    def count_missing(self, tables: Mapping[str, TokenTableLike]) -> dict[str, int]:
        """Return how many different responses of the tables have no stored score, by reference name."""
        counts = {}
        for name, table in tables.items():
            router = self.routers[name]
            counts[name] = wait_for_answer(name, router, router.missing.remote(digest_table(table)))
        return counts

    def score_all(self, tables: Mapping[str, TokenTableLike], on_progress: Progress | None = None) -> None:
        """Score every response of the tables and save the scores, under all references at the same time.

        The batches depend on the tables alone. Those whose scores are all known are not sent; of the others
        the known scores stay.
        """
        plans = {
            name: BulkPlan(table, self._specs[name].max_tokens_per_batch) for name, table in tables.items()
        }
        counts = self._count_stored(plans)
        open_requests: dict[Any, tuple[str, int]] = {}

        def report_progress(name: str) -> None:
            if on_progress is not None:
                on_progress(name, counts[name].done, counts[name].total, counts[name].describe())

        def finish_request() -> None:
            done, waiting = ray.wait(list(open_requests), num_returns=1, timeout=PING_EVERY_S)
            answer = (done or waiting)[0]
            name, unknown = open_requests.pop(answer)
            wait_for_answer(name, self.routers[name], answer)
            counts[name].note_answer(unknown)
            report_progress(name)

        for name in tables:
            report_progress(name)
        for name, batches in _take_turns(plans):
            for batch, unknown in zip(batches, self._count_unknown(name, batches), strict=True):
                if not unknown:
                    continue
                if len(open_requests) >= BULK_REQUESTS * len(tables):
                    finish_request()
                answer = self.routers[name].score.remote(batch, as_batch=True)
                open_requests[answer] = (name, unknown)
                counts[name].queued += unknown
        while open_requests:
            finish_request()
        for name in tables:
            counts[name].complete()
            report_progress(name)
        self.flush()

    def stats(self) -> dict[str, RouterStats]:
        """Return counts by reference name."""
        return self._call_all_routers("stats")

    def flush(self) -> None:
        """Save all scores that are in no file yet."""
        self._call_all_routers("flush")

    def release(self) -> None:
        """Save, and free the replicas' devices; the routers still answer from their stores."""
        self._call_all_routers("release")

    def shutdown(self) -> None:
        """Save and end every actor this service started; a second call does nothing.

        Raises:
            ScoringError: scores could not be saved. The actors are ended nevertheless.
        """
        owned, self._owned_routers = self._owned_routers, {}
        closing = {name: router.close.remote() for name, router in owned.items()}
        failures: list[Exception] = []
        for name, answer in closing.items():
            try:
                ray.get(answer, timeout=CLOSE_TIMEOUT_S)
            except GetTimeoutError:
                failures.append(
                    ScoringError(f"reference {name!r}: its scores were not saved within {CLOSE_TIMEOUT_S} s")
                )
            except RayActorError:
                continue  # dead already, and its replicas with it
            except RayTaskError as error:
                failures.append(explain_actor_error(name, error))
        for router in owned.values():
            ray.kill(router)
        self._wait_for_names(owned)
        if failures:
            raise failures[0]

    def _wait_for_names(self, names: Iterable[str]) -> None:
        """Wait until killed routers' names are free, because the next service would take them for alive."""
        deadline = time.monotonic() + NAME_RELEASE_TIMEOUT_S
        while time.monotonic() < deadline and any(_is_running(self.addresses[name]) for name in names):
            time.sleep(0.02)

    def _call_all_routers(self, method: str) -> dict[str, Any]:
        answers = {name: getattr(router, method).remote() for name, router in self.routers.items()}
        return {name: wait_for_answer(name, self.routers[name], answer) for name, answer in answers.items()}

    def _count_stored(self, plans: Mapping[str, BulkPlan]) -> dict[str, BulkCounts]:
        """Count the different responses of each plan, and those that have a stored score."""
        answers = {name: self.routers[name].missing.remote(plan.keys) for name, plan in plans.items()}
        missing = {
            name: wait_for_answer(name, self.routers[name], answer) for name, answer in answers.items()
        }
        return {name: BulkCounts(len(plan), len(plan) - missing[name]) for name, plan in plans.items()}

    def _count_unknown(self, name: str, batches: Sequence[ScoreRequest]) -> list[int]:
        """Return how many scores of each batch the store does not have."""
        router = self.routers[name]
        keys = np.concatenate([batch.keys for batch in batches])
        missing = wait_for_answer(name, router, router.lookup.remote(keys)).missing
        ends = np.cumsum([len(batch) for batch in batches])
        return [int(part.sum()) for part in np.split(missing, ends[:-1])]


def build_reference_spec(
    name: str,
    config: ModelConfig,
    fingerprint: str,
    *,
    device_type: str,
    bundle: Mapping[str, float],
    replicas: int,
    start_timeout_s: float,
    load_timeout_s: float = ReferenceSpec.load_timeout_s,
    answer_timeout_s: float = ReferenceSpec.answer_timeout_s,
    kind: ScoreKind = "log-prob",
) -> ReferenceSpec:
    """Describe a reference whose replicas each take the Ray resources in `bundle`."""
    custom = dict(bundle)
    num_cpus, num_gpus = custom.pop("CPU", 0), custom.pop("GPU", 0)
    return ReferenceSpec(
        name=name,
        config=config.model_copy(update={"dtype": config.resolve_dtype(device_type)}),
        fingerprint=fingerprint,
        replicas=replicas,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        resources=custom,
        max_tokens_per_batch=GPU_BATCH_TOKENS if num_gpus else CPU_BATCH_TOKENS,
        secrets=SealedSecrets.seal(os.environ),
        start_timeout_s=start_timeout_s,
        load_timeout_s=load_timeout_s,
        answer_timeout_s=answer_timeout_s,
        kind=kind,
    )


def start_references(
    specs: Sequence[ReferenceSpec],
    storage_path: str | os.PathLike[str],
    *,
    replica_class: type = Replica,
    **router_options: float,
) -> ReferenceService:
    """Start a router for each reference; replicas start at the first response that the store does not have.

    A router of the same fingerprint and storage that this job already runs is used and left running.

    Args:
        specs: the references, with different names.
        storage_path: folder or pyarrow URI that every node reaches; scores are in `scores/` under it.
        replica_class: the actor that scores, `Replica` or one with its methods.
        router_options: `linger_s`, `flush_scores`, `flush_s` of `Router`.
    """
    storage = resolve_storage(storage_path)
    routers: dict[str, Any] = {}
    addresses: dict[str, str] = {}
    owned: dict[str, Any] = {}
    # One router serves all references of a fingerprint, with the settings of the spec with most replicas.
    for spec in sorted(specs, key=lambda spec: -spec.replicas):
        address = _build_router_name(spec.fingerprint, storage)
        if address not in addresses.values() and not _is_running(address):
            actor = ray.remote(concurrency_groups={HEALTH_GROUP: 8})(Router).options(
                name=address,
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=ROUTER_CPUS,
                max_restarts=-1,
                max_task_retries=MAX_REQUEST_RETRIES,
                max_concurrency=MAX_CONCURRENCY,
            )
            owned[spec.name] = actor.remote(spec, storage, replica_class=replica_class, **router_options)
        addresses[spec.name] = address
        routers[spec.name] = owned.get(spec.name) or ray.get_actor(address, namespace=NAMESPACE)
    return ReferenceService(routers, addresses, owned, specs)


def _build_router_name(fingerprint: str, storage: str) -> str:
    """Return the actor name of a router: one per reference, storage and job.

    Jobs share the store, but no routers: a router ends with its driver, which would leave the other job
    without one.
    """
    storage_digest = hashlib.blake2b(storage.encode(), digest_size=4).hexdigest()
    return f"router-{fingerprint}-{storage_digest}-{ray.get_runtime_context().get_job_id()}"


def _is_running(address: str) -> bool:
    try:
        ray.get_actor(address, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _take_turns(plans: Mapping[str, BulkPlan]) -> Iterator[tuple[str, list[ScoreRequest]]]:
    """Yield the plans' batches, some of each in turn, so that no reference waits for another to finish."""
    for parts in zip_longest(*plans.values()):
        for name, batches in zip(plans, parts, strict=True):
            if batches:
                yield name, batches
