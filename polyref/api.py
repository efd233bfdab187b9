"""Runs, searches and registered models from Python, as the commands do them.

What is wrong with the input is raised as `UsageError` (or the `DataError`, `ModelError`, `LossError` or
`SpaceError` of the package that found it), what fails later as `RunFailed`; each has one message.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.config.run import RunConfig
    from orchestrator.config.sweep import SweepConfig
    from orchestrator.driver.record import RunRecord
    from orchestrator.registry.download import ResolvedModel

Source = str | os.PathLike[str] | Mapping[str, Any]
"""The path of a YAML file, or its content."""


def check(run: "RunConfig | Source") -> None:
    """Refuse what can be refused before a device is held, and print what the run reads and needs."""
    from orchestrator.driver.train import check_run

    check_run(_as_run(run))


def train(run: "RunConfig | Source", *, fresh: bool = False) -> "RunRecord":
    """Train and register a policy, or resume where an earlier call was killed.

    Args:
        run: the run file.
        fresh: forget an earlier run of this name and start over.

    Returns:
        The run's record: `record.result.metrics`, `record.registered`, `record.mlflow_run` and more.
    """
    from orchestrator.driver.train import train_run

    return train_run(_as_run(run), fresh=fresh)


def tune(sweep: "SweepConfig | Source", *, fresh: bool = False, retry_failed: bool = False) -> "RunRecord":
    """Search, rank and promote, or resume an earlier search of this name.

    Args:
        sweep: the sweep file.
        fresh: forget an earlier search of this name and start over.
        retry_failed: run its failed trials again.

    Returns:
        The search's record: `record.best_trial`, `record.registered` and more. Its ranking is printed, and
        `trials.csv` in its folder has all trials.
    """
    from orchestrator.config.sweep import SweepConfig, load_sweep
    from orchestrator.search.tune import run_sweep

    config = sweep if isinstance(sweep, SweepConfig) else load_sweep(sweep)
    return run_sweep(config, fresh=fresh, retry_failed=retry_failed)


def find_model(ref: str, *, tracking_uri: str | None = None, storage_path: str = "./runs") -> "ResolvedModel":
    """Look a registered model up, and download it if its files are not on this machine.

    Args:
        ref: `name@alias` or `name/version`, with or without `models:/` in front.
        tracking_uri: the MLflow server; default $MLFLOW_TRACKING_URI, else sqlite under `storage_path`.
        storage_path: the runs' storage_path.

    Returns:
        The version, with `folder`: a transformers folder.
    """
    from orchestrator.registry.download import resolve_model
    from orchestrator.tracking.mlflow import resolve_tracking_uri

    return resolve_model(ref, resolve_tracking_uri(tracking_uri, storage_path))


def _as_run(run: "RunConfig | Source") -> "RunConfig":
    from orchestrator.config.run import RunConfig, load_run

    return run if isinstance(run, RunConfig) else load_run(run)
