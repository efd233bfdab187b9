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
from ray.exceptions import RayActorError, RayTaskError

from orchestrator.cluster.connection import NAMESPACE
from orchestrator.references.client import TokenTableLike, group_pairs, wait_for_answer
from orchestrator.references.messages import PromptGroup, ReferenceSpec, RouterStats, ScoreRequest
from orchestrator.references.pool import explain_actor_error
from orchestrator.references.replica import Replica
from orchestrator.references.router import Router
from orchestrator.references.store import resolve_storage

ROUTER_CPUS = 0.01
"""A router is idle most of the time: it must not be counted as a whole core on a small machine."""
MAX_RESTARTS = 8
MAX_CONCURRENCY = 1000
NAME_RELEASE_TIMEOUT_S = 10
BULK_ROWS = 64
BULK_REQUESTS = 32
"""Requests have BULK_ROWS rows; at most BULK_REQUESTS of them per reference are open at the same time."""

Progress = Callable[[str, int, int], None]
"""Called with a reference's name, rows done and rows in total."""


class ReferenceService:
    """The running routers by reference name. A context manager: leaving it ends every actor it started.

    Routers belong to the driver that started them and end with it in any case. References that have the same
    fingerprint share one router.

    Args:
        routers: actor handles by reference name.
        addresses: actor names by reference name.
        owned: the routers that this service started and ends.
    """

    def __init__(
        self, routers: Mapping[str, Any], addresses: Mapping[str, str], owned: Mapping[str, Any]
    ) -> None:
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
            wait_for_answer(name, answer)

    def count_missing(self, tables: Mapping[str, TokenTableLike]) -> dict[str, int]:
        """Return how many different responses of the tables have no stored score, by reference name."""
        counts = dict.fromkeys(tables, 0)
        for name, table in tables.items():
            chunks = [
                ScoreRequest.pack(group_pairs(table, rows)).keys for rows in _split_into_chunks(len(table))
            ]
            if chunks:
                counts[name] = wait_for_answer(
                    name, self.routers[name].missing.remote(np.concatenate(chunks))
                )
        return counts

    def score_all(self, tables: Mapping[str, TokenTableLike], on_progress: Progress | None = None) -> None:
        """Score every response of the tables and save the scores, under all references at the same time.

        Rows whose scores are known are skipped without sending their tokens.
        """
        done = dict.fromkeys(tables, 0)
        open_requests: dict[Any, tuple[str, int]] = {}

        def report_progress(name: str, rows: int) -> None:
            done[name] += rows
            if on_progress is not None:
                on_progress(name, done[name], len(tables[name]))

        def finish_request() -> None:
            (answer, *_), _ = ray.wait(list(open_requests), num_returns=1)
            name, rows = open_requests.pop(answer)
            wait_for_answer(name, answer)
            report_progress(name, rows)

        for name, rows in _interleave_chunks({name: len(table) for name, table in tables.items()}):
            unknown = self._find_unknown(name, tables[name], rows)
            report_progress(name, len(rows) - len(unknown))
            if unknown:
                if len(open_requests) >= BULK_REQUESTS * len(tables):
                    finish_request()
                answer = self.routers[name].score.remote(ScoreRequest.pack(unknown))
                open_requests[answer] = (name, len(unknown))
        while open_requests:
            finish_request()
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
        failures = []
        for name, answer in closing.items():
            try:
                ray.get(answer)
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
        return {name: wait_for_answer(name, answer) for name, answer in answers.items()}

    def _find_unknown(self, name: str, table: TokenTableLike, rows: range) -> list[PromptGroup]:
        groups = group_pairs(table, rows)
        request = ScoreRequest.pack(groups)
        scores = wait_for_answer(name, self.routers[name].lookup.remote(request.keys))
        unknown = np.add.reduceat(scores.missing, request.group_offsets[:-1]) > 0
        return [group for group, is_unknown in zip(groups, unknown, strict=True) if is_unknown]


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
            actor = ray.remote(Router).options(
                name=address,
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=ROUTER_CPUS,
                max_restarts=MAX_RESTARTS,
                max_task_retries=MAX_RESTARTS,
                max_concurrency=MAX_CONCURRENCY,
            )
            owned[spec.name] = actor.remote(spec, storage, replica_class=replica_class, **router_options)
        addresses[spec.name] = address
        routers[spec.name] = owned.get(spec.name) or ray.get_actor(address, namespace=NAMESPACE)
    return ReferenceService(routers, addresses, owned)


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


def _split_into_chunks(count: int) -> list[range]:
    return [range(start, min(start + BULK_ROWS, count)) for start in range(0, count, BULK_ROWS)]


def _interleave_chunks(counts: Mapping[str, int]) -> Iterator[tuple[str, range]]:
    """Yield chunks of all tables, one of each in turn, so that no reference waits for another to finish."""
    for chunks in zip_longest(*(_split_into_chunks(count) for count in counts.values())):
        for name, rows in zip(counts, chunks, strict=True):
            if rows is not None:
                yield name, rows
