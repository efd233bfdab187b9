"""Whether all nodes of a cluster share a run's storage."""

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
    """Nothing with one node; else every node looks for a file that is written here.

    Raises:
        UsageError: a node does not see it, which names the node and the remedy.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(alive) < 2:
        return
    gone = (  # a node that has just gone says nothing
        ray.exceptions.NodeDiedError,
        ray.exceptions.LocalRayletDiedError,
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.ObjectLostError,
        ray.exceptions.TaskUnschedulableError,
    )
    look, environment = (
        ray.remote(num_cpus=0, max_retries=0)(_check_visibility),
        ray.put(collect_secrets(os.environ)),
    )
    with contextlib.ExitStack() as stack:
        with explain_storage_failures(storage_path):
            written = stack.enter_context(write_probe(storage_path))
        asked = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                written, environment
            ): address
            for node, address in alive.items()
        }
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S)
        for answer in answered:
            try:
                why = ray.get(answer)
            except gone:
                continue
            except ray.exceptions.RayError as error:
                raise UsageError(_explain_failed_check(asked[answer], error)) from error
            if why is not None:
                raise UsageError(explain_unshared_storage(storage_path, asked[answer], why))
    if silent:
        log.warning(
            "whether storage_path %s is shared was not answered within %.0f s by: %s",
            redact_location(storage_path),
            _ANSWER_TIMEOUT_S,
            ", ".join(sorted(asked[answer] for answer in silent)),
        )


def _check_visibility(written: str, environment: dict[str, str]) -> str | None:
    os.environ.update(environment)
    return why_invisible(written)


def _explain_failed_check(node: str, error: BaseException) -> str:
    lines = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
    return (
        f"node {node} could not look for storage_path ({lines[-1].strip()}); "
        "polyref must be installed there as it is here"
    )


def explain_unshared_storage(storage_path: str, node: str, why: str) -> str:
    """The refusal of a storage that a node does not reach, `why` being what `visible` said there."""
    if is_uri(storage_path):
        return (
            f"storage_path {buckets.redact_uri(storage_path)}: node {node} cannot read it ({why}); "
            f"{buckets.suggest_remedy(storage_path)}, on all nodes"
        )
    return (
        f"storage_path {storage_path} is not shared: node {node} does not see it ({why}); mount it on all "
        "nodes (NFS, EFS, Filestore), or give the URI of an object store, as in s3://bucket/runs"
    )
