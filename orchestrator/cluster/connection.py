"""Connecting to Ray: an existing cluster when there is one, else one on this machine."""

import contextlib
import json
import logging
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
import yaml
from ray._common.utils import get_ray_address_file

from orchestrator.cluster import job_secrets as mailbox
from orchestrator.config.run import UsageError

NAMESPACE = "polyref"

# Train's controller polls workers every 2 s by default, and every report waits for a poll.
_DRIVER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
# Idle OpenMP threads that spin starve the other models on a shared CPU; telemetry has no place in a job, and
# a bar that loads weights none in a log.
_WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# A cluster of our own on this machine has no nodes that a cloud could take away.
_LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# What a worker needs to reach a hub or a server as the driver does.
_PASSED_ON = (
    "DS_ACCELERATOR",
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_EC2_METADATA_DISABLED",
    "NO_PROXY",
    "no_proxy",
)
# Ray writes runtime environments to its logs, so these travel as objects. Proxies may hold a password.
_SECRET = (
    "HF_TOKEN",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "http_proxy",
    "https_proxy",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
_NODE_TYPE = "ray.io/node-group"
"""The label that Ray gives a node with the name of its type in the cluster file."""
NODE_TYPES = "POLYREF_NODE_TYPES"
"""Set where it cannot be seen what an autoscaler may start."""
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in a submitted job's driver: the job's own runtime environment, among others."""


@contextlib.contextmanager
def connected(*, wait_minutes: float = 10) -> Iterator[None]:
    """Inside, `ray` is connected to RAY_ADDRESS, to this machine's running cluster, or to a new local one.

    A connection that was there before is left as it is. Raises UsageError where RAY_ADDRESS does not answer.
    """
    for name, value in (_DRIVER_ENVIRONMENT | _start_timeout(wait_minutes)).items():
        os.environ.setdefault(name, value)
    _never_proxy_loopback()
    if ray.is_initialized():
        yield
        return
    address = _address()
    local = address == "local"
    if local:
        # Workers of a cluster of our own inherit this process's environment.
        for name, value in (_WORKER_ENVIRONMENT | _LOCAL_ENVIRONMENT).items():
            os.environ.setdefault(name, value)
    ray.init(
        address=address,
        namespace=NAMESPACE,
        logging_level=logging.ERROR,
        runtime_env=None if local else {"env_vars": worker_environment(os.environ)},
    )
    try:
        with _terminated_as_by_ctrl_c():
            yield
    finally:
        ray.shutdown()


def _address() -> str:
    """RAY_ADDRESS; else the cluster that runs on this machine; else "local", a new one.

    Tried first: Ray itself would try for minutes, also where a killed cluster left its address behind.
    """
    given = os.environ.get("RAY_ADDRESS") or "auto"
    if given == "local":
        return given
    if given != "auto":
        if not _answers(given):
            raise UsageError(
                f"no Ray answers at {given}, which RAY_ADDRESS names: start it (`ray up`, `ray start "
                "--head`), correct the address, or unset it for a Ray of this machine's own"
            )
        return given
    noted = get_ray_address_file(None)
    started = Path(noted).read_text().strip() if os.path.exists(noted) else ""
    return started if started and _answers(started) else "local"


def _answers(address: str) -> bool:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def own_ctrl_c() -> Iterator[None]:
    """Around a run of Ray Train or Tune, which leave their handler of Ctrl-C in place: puts ours back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """A job that is stopped gets SIGTERM: it ends as by Ctrl-C and leaves nothing behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What is not secret of the environment that every Ray worker of a run gets.

    Variables that a submitted job's runtime environment sets already are left to it: Ray refuses both.
    """
    job = json.loads(environment.get(JOB, "{}")).get("runtime_env") or {}
    names = (*_DRIVER_ENVIRONMENT, *_LOCAL_ENVIRONMENT, *_PASSED_ON)
    ours = _WORKER_ENVIRONMENT | {name: environment[name] for name in names if name in environment}
    return {name: value for name, value in ours.items() if name not in job.get("env_vars", {})}


def secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Tokens and passwords that workers and replicas need; handed over as an object, never logged."""
    names = (*_SECRET, *environment.get(mailbox.NAMES, "").split(","))
    return {name: environment[name] for name in names if name in environment}


def nodes() -> list[dict[str, float]]:
    """Total resources of every node that is alive, and of those that the autoscaler may still start."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    started = Counter(node.get("Labels", {}).get(_NODE_TYPE) for node in alive)
    return [node["Resources"] for node in alive] + [
        dict(kind["resources"])
        for name, kind in _node_types().items()
        for _ in range(kind["max_workers"] - started[name])
    ]


def machines() -> int:
    """How many nodes are alive."""
    return sum(node["Alive"] for node in ray.nodes())


def _node_types() -> Mapping[str, Any]:
    """What the autoscaler may start: `{type: {max_workers, resources}}`.

    Ray has an answer of its own (`get_cluster_config`) that its open source never fills, so the file is read
    that the autoscaler of this cluster was started with; it runs on the head, as submitted jobs do. One's own
    machines, whose size it cannot know, are left out. Where it is no process here, as on Kubernetes,
    POLYREF_NODE_TYPES says the same in JSON.
    """
    if NODE_TYPES in os.environ:
        try:
            return {
                str(name): {"max_workers": int(kind["max_workers"]), "resources": dict(kind["resources"])}
                for name, kind in json.loads(os.environ[NODE_TYPES]).items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(
                f"{NODE_TYPES} is not the autoscaler's node types in JSON ({type(error).__name__}: {error}); "
                'write {"trainers": {"max_workers": 4, "resources": {"CPU": 48, "GPU": 4}}}'
            ) from None
    autoscaler = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        files = [word.partition("=")[2] for word in command if word.startswith("--autoscaling-config=")]
        if autoscaler in command and files:
            config = yaml.safe_load(Path(files[0]).expanduser().read_text(encoding="utf-8"))
            kinds = config["available_node_types"]
            return {n: k for n, k in kinds.items() if k.get("resources") and n != config["head_node_type"]}
    return {}


def _start_timeout(minutes: float) -> dict[str, str]:
    """A finite wait for workers that other jobs keep from starting."""
    return {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(60 * minutes)}


def _never_proxy_loopback() -> None:
    """Ray and MLflow talk to this machine over HTTP, which a proxy cannot reach."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost", "::1"]))
