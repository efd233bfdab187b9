"""Check that all nodes of a cluster share a run's storage."""

import contextlib
import logging
import os

from orchestrator.cluster.worker_environment import collect_secrets
from orchestrator.errors import UsageError
from orchestrator.storage.paths import explain_storage_failures, is_uri, redact_location
from orchestrator.storage.probe import why_invisible, write_probe
from preferences import buckets

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 60.0


def refuse_unshared(storage_path: str) -> None:
    """Let every node look for a file that is written here; does nothing with a single node.

    Raises:
        UsageError: a node does not see the file; the message names the node and the remedy.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(alive) < 2:
        return
    node_lost = (  # errors of a node that has just gone, which say nothing about the storage
        ray.exceptions.NodeDiedError,
        ray.exceptions.LocalRayletDiedError,
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.ObjectLostError,
        ray.exceptions.TaskUnschedulableError,
    )
    check = ray.remote(num_cpus=0, max_retries=0)(_check_visibility)
    environment = ray.put(collect_secrets(os.environ))
    with contextlib.ExitStack() as stack:
        with explain_storage_failures(storage_path):
            place = stack.enter_context(write_probe(storage_path))
        addresses = {
            check.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                place, environment
            ): address
            for node, address in alive.items()
        }
        done, silent = ray.wait(list(addresses), num_returns=len(addresses), timeout=_ANSWER_TIMEOUT_S)
        for answer in done:
            try:
                why = ray.get(answer)
            except node_lost:
                continue
            except ray.exceptions.RayError as error:
                raise UsageError(_explain_failed_check(addresses[answer], error)) from error
            if why is not None:
                raise UsageError(explain_unshared_storage(storage_path, addresses[answer], why))
    if silent:
        log.warning(
            "whether storage_path %s is shared was not answered within %.0f s by: %s",
            redact_location(storage_path),
            _ANSWER_TIMEOUT_S,
            ", ".join(sorted(addresses[answer] for answer in silent)),
        )


def _check_visibility(place: str, environment: dict[str, str]) -> str | None:
    os.environ.update(environment)
    return why_invisible(place)


def _explain_failed_check(node: str, error: BaseException) -> str:
    lines = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
    return (
        f"node {node} could not look for storage_path ({lines[-1].strip()}); "
        "polyref must be installed there as it is here"
    )


def explain_unshared_storage(storage_path: str, node: str, why: str) -> str:
    """Return the message for a storage that a node does not reach; `why` is what `why_invisible` returned."""
    if is_uri(storage_path):
        return (
            f"storage_path {buckets.redact_uri(storage_path)}: node {node} cannot read it ({why}); "
            f"{buckets.suggest_remedy(storage_path)}, on all nodes"
        )
    return (
        f"storage_path {storage_path} is not shared: node {node} does not see it ({why}); mount it on all "
        "nodes (NFS, EFS, Filestore), or give the URI of an object store, as in s3://bucket/runs"
    )
