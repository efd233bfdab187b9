"""Environment variables that workers and replicas get from the driver."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from orchestrator.cluster.job_secrets import SECRET_NAMES

# Ray Train's controller polls workers every 2 s by default, and every report waits for a poll.
DRIVER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


# Spinning idle OpenMP threads starve the other models on a shared CPU; a job sends no telemetry, and its log
# has no progress bars of loading weights.
WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


# A cluster that polyref starts on this machine has no nodes that a cloud could preempt.
LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


# Workers need these to reach a hub or a server as the driver does.
_FORWARDED_NAMES = (
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


# Ray writes runtime environments to its logs, so these are sent as objects. A proxy's URL may contain a
# password.
_KNOWN_SECRETS = (
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


JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable that Ray sets in a submitted job's driver, with the job's own runtime environment among others."""


SETUP_HOOK = "polyref.imports.use_own_packages"
"""Function that every worker process calls before other imports, so that polyref's packages come first."""


def build_runtime_env(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return Ray's runtime environment for a run on a cluster that polyref did not start.

    Settings that a submitted job's runtime environment already has are omitted: Ray refuses duplicates.
    """
    job = _read_job_runtime_env(environment)
    hook = {} if "worker_process_setup_hook" in job else {"worker_process_setup_hook": SETUP_HOOK}
    return {"env_vars": build_worker_environment(environment)} | hook


def build_worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables, none of them secret, that every Ray worker of a run gets.

    Variables that a submitted job's runtime environment already sets are omitted: Ray refuses duplicates.
    """
    job = _read_job_runtime_env(environment)
    names = (*DRIVER_ENVIRONMENT, *LOCAL_ENVIRONMENT, *_FORWARDED_NAMES)
    ours = WORKER_ENVIRONMENT | {name: environment[name] for name in names if name in environment}
    return {name: value for name, value in ours.items() if name not in job.get("env_vars", {})}


def _read_job_runtime_env(environment: Mapping[str, str]) -> dict[str, Any]:
    return json.loads(environment.get(JOB_CONFIG, "{}")).get("runtime_env") or {}


@dataclass(frozen=True)
class SealedSecrets:
    """Secrets as an object in Ray's store: an actor's own arguments lie in the cluster's control service.

    The object lives as long as the process that sealed them. Its reference is pickled by hand: Ray warns of
    references among the arguments of actors that may restart, since others' objects may be gone by then.
    """

    _reference: bytes = field(repr=False)

    @classmethod
    def seal(cls, environment: Mapping[str, str]) -> Self:
        """Seal the secrets in an environment."""
        import ray

        return cls(ray.cloudpickle.dumps(ray.put(collect_secrets(environment))))

    def export_to_environment(self) -> None:
        """Set them as environment variables of this process."""
        import ray

        os.environ.update(ray.get(self._unpickle_reference()))

    async def export_from_event_loop(self) -> None:
        """Set them as `export_to_environment` does, in an async actor, which must not wait otherwise."""
        os.environ.update(await self._unpickle_reference())

    def _unpickle_reference(self) -> Any:
        import ray

        return ray.cloudpickle.loads(self._reference)


def collect_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return tokens and passwords that workers and replicas need; sent as an object, never logged."""
    names = (*_KNOWN_SECRETS, *environment.get(SECRET_NAMES, "").split(","))
    return {name: environment[name] for name in names if name in environment}
