"""Connections to an MLflow server without its global state, and logging of settings without secrets."""

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from orchestrator.config.sections import TrackingConfig
from orchestrator.environment import set_environment
from orchestrator.errors import UsageError
from orchestrator.redaction import hide_secrets, redact, summarize_error
from orchestrator.storage.probe import find_write_problem

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PARAM_LENGTH, _TAG_LENGTH, _KEY_LENGTH = 6000, 8000, 250  # MLflow's limits
_SETTINGS_PER_BATCH = 100
URI_VARIABLE = "MLFLOW_TRACKING_URI"
_SQLITE = "sqlite:///"
_VERSION_TABLE = "alembic_version"
"""The table in which MLflow's databases have the version of their tables."""
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_environment_lock = threading.Lock()


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Convert nested settings to MLflow parameters: dotted keys, values redacted and cut to length."""
    flat: dict[str, str] = {}
    for key, value in hide_secrets(settings).items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten_settings(value, f"{name}.")
        else:
            flat[to_metric_key(name)] = _cut_text(str(value), _PARAM_LENGTH)
    return flat


def refuse_unshared_default(uri: str | None, nodes: int) -> None:
    """Refuse the sqlite file that stands in for a server where more than one node would write to it.

    Network disks do not lock files well enough for sqlite. A file that `tracking.uri` names is the user's
    choice.

    Args:
        uri: `tracking.uri` of the run file.
        nodes: number of nodes that workers may run on.
    """
    if uri is None and not os.environ.get(URI_VARIABLE) and nodes > 1:
        raise UsageError(
            f"tracking.uri is not set, and the sqlite file that takes its place is not safe with {nodes} "
            f"nodes, which would write to it over the network: set tracking.uri or {URI_VARIABLE} to an "
            "MLflow server, as in http://mlflow.example:5000"
        )


def resolve_tracking_uri(uri: str | None, storage_path: str) -> str:
    """Return the MLflow server's URI: `uri`, else $MLFLOW_TRACKING_URI, else `storage_path/mlflow.db`.

    Sqlite paths become absolute. Raises UsageError for a store that MLflow does not support.
    """
    source = "tracking.uri"
    if uri is None:
        uri, source = os.environ.get(URI_VARIABLE) or None, f"${URI_VARIABLE}"
    if uri is None:
        if "://" in storage_path:
            raise UsageError(
                f"storage_path is {redact(storage_path)}, where no sqlite file can live: set tracking.uri "
                f"(or {URI_VARIABLE}) to an MLflow server, as in http://mlflow.example:5000"
            )
        return f"{_SQLITE}{os.path.realpath(storage_path)}/mlflow.db"
    try:
        parts = urlsplit(uri)
        lacks_host = parts.scheme in ("http", "https") and not (parts.hostname and parts.port != 0)
    except ValueError as error:
        raise UsageError(f"{source} {redact(uri)!r} is no URI: {error}; write http://HOST:PORT") from None
    scheme = parts.scheme
    if lacks_host:
        raise UsageError(f"{source} {redact(uri)!r} names no host and port; write http://HOST:PORT")
    if scheme == "file" or (not scheme and uri != "databricks"):
        raise UsageError(
            f"{source} {uri!r} is a folder, which MLflow no longer writes: "
            "use sqlite:///runs/mlflow.db or a server, as in http://mlflow.example:5000"
        )
    if scheme == "sqlite":
        file = Path(os.path.realpath(uri.removeprefix(_SQLITE)))
        if not uri.startswith(_SQLITE) or file.is_dir():
            raise UsageError(f"{source} {uri!r} names no file; write sqlite:///runs/mlflow.db, with its name")
        return f"{_SQLITE}{file}"
    return uri


def find_absent_database(uri: str) -> Path | None:
    """Return the sqlite file that a tracking URI names if it has not been made yet, else None."""
    file = Path(uri.removeprefix(_SQLITE))
    return file if uri.startswith(_SQLITE) and not os.path.lexists(file) else None


def check_name(kind: Literal["experiment", "registered_model", "alias"], name: str, *, field: str) -> None:
    """Refuse a name that MLflow does not take, or that `models:/NAME@ALIAS` cannot have.

    Raises:
        UsageError: names the `field` or option.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils import validation

    validators = {
        "experiment": (validation._validate_experiment_name,),
        "registered_model": (validation._validate_model_name,),
        "alias": (validation._validate_model_alias_name, validation._validate_model_alias_name_reserved),
    }
    try:
        for validate in validators[kind]:
            validate(name)
    except MlflowException as error:
        reason = summarize_error(error).rstrip(".")
        raise UsageError(f"{field} {name[:100]!r}: {reason}; choose another name") from None
    if kind == "registered_model" and "@" in name:
        raise UsageError(
            f"{field} {name!r} has an @, which separates a name from an alias in models:/NAME@ALIAS; choose "
            "another name, and set tracking.alias"
        )


def check_tracking(settings: TrackingConfig, uri: str) -> None:
    """Check what only MLflow knows before anything is trained; a missing sqlite file is not made.

    Args:
        settings: the run file's section.
        uri: as `resolve_tracking_uri` returns it.

    Raises:
        UsageError: MLflow takes no such name, or the server or database does not answer.
    """
    check_name("experiment", settings.experiment, field="tracking.experiment")
    if settings.registered_model is not None:
        check_name("registered_model", settings.registered_model, field="tracking.registered_model")
    if settings.alias is not None:
        check_name("alias", settings.alias, field="tracking.alias")
    absent = find_absent_database(uri)
    if absent is None:
        connect_to_mlflow(uri)
    elif (problem := find_write_problem(absent.parent)) is not None:
        raise UsageError(
            f"the MLflow database {uri} cannot be made ({problem}); set tracking.uri (or {URI_VARIABLE}) to "
            "a file in a folder that can be written, or to a server"
        )


def connect_to_mlflow(uri: str) -> "MlflowClient":
    """Return a client for one server, without MLflow's global state or telemetry.

    Raises UsageError within seconds if the server does not answer; MLflow itself would retry for minutes.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # The URL is printed once, at the end of a run (`find_run_url`).
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    if not sys.stderr.isatty():
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for noisy in ("mlflow.store.model_registry.abstract_store", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs each error that it raises
    try:
        if (absent := find_absent_database(uri)) is not None:
            absent.parent.mkdir(parents=True, exist_ok=True)
        elif urlsplit(uri).scheme.partition("+")[0] in _DATABASES:
            _open_database(uri)
        with fail_fast():
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except UsageError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy and drivers raise errors of any class
        raise UsageError(f"the MLflow server {redact(uri)} {_explain_mlflow_error(error)}") from error
    return client


def _open_database(uri: str) -> None:
    """Open a database once: MLflow itself would try again for minutes."""
    import sqlalchemy
    from sqlalchemy.exc import DatabaseError

    file = Path(uri.removeprefix(_SQLITE))
    if uri.startswith(_SQLITE) and not file.is_file():
        raise UsageError(
            f"the MLflow database {file} is a folder, a pipe or a broken link, not a file; move it away, or "
            f"set tracking.uri (or {URI_VARIABLE}) to another"
        )
    engine = None
    try:
        engine = sqlalchemy.create_engine(uri)
        tables = sqlalchemy.inspect(engine).get_table_names()
    except ImportError as error:
        raise UsageError(
            f"the MLflow database {redact(uri)} needs a Python package that is not installed: {error}; "
            f"install it, or set tracking.uri (or {URI_VARIABLE}) to an MLflow server (http://HOST:PORT)"
        ) from None
    except DatabaseError as error:
        raise UsageError(
            f"the MLflow database {redact(uri)} cannot be used: {summarize_error(error)}; restore it from a "
            f"copy, move it away, or set tracking.uri (or {URI_VARIABLE}) to another"
        ) from None
    finally:
        if engine is not None:
            engine.dispose()
    if tables and _VERSION_TABLE not in tables:
        raise UsageError(
            f"the database {redact(uri)} is of another program, with tables such as {tables[0]!r}; give "
            f"MLflow one of its own: set tracking.uri (or {URI_VARIABLE})"
        )


def _explain_mlflow_error(error: Exception) -> str:
    """Explain a failed connection and what to do about it."""
    message = str(error).lower()
    if "error code 401" in message:
        return "knows no such user: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or ..._TOKEN)"
    if "invalid host header" in message:
        return "does not answer to this name: start it with --allowed-hosts and the host name in this URI"
    return (
        f"does not answer: {summarize_error(error)}; check tracking.uri (or {URI_VARIABLE}) and that the "
        "server runs, or leave both out for a sqlite file"
    )


def find_run_url(uri: str, run_id: str | None) -> str | None:
    """Return the URL of a run's page; None for a database without server or if the server does not answer."""
    if run_id is None or not uri.startswith("http"):
        return None
    try:
        experiment = connect_to_mlflow(uri).get_run(run_id).info.experiment_id
    except Exception:  # no failure of the server may fail a finished run
        return None
    return f"{redact(uri).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


@contextmanager
def fail_fast() -> Iterator[None]:
    """Let MLflow's requests within the block fail in seconds; by itself it repeats them for minutes."""
    # MLflow reads these variables at every request and offers no argument for them.
    with (
        _environment_lock,
        set_environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT="10"),
    ):
        yield


_TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}
"""Tags that make MLflow open an experiment at its runs; by default it shows pages for application traces."""


def get_or_create_experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """Return the id of the experiment, which is created if missing. Raises UsageError if it was deleted."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # With a sqlite file no server chooses the artifact location; MLflow would take the current folder.
        folder = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
        try:
            location = folder.as_uri() if uri.startswith("sqlite:///") else None
            return client.create_experiment(name, location, tags=_TRAINING_PAGES)
        except MlflowException as error:
            experiment = client.get_experiment_by_name(name)  # another run may have created it meanwhile
            if experiment is None:
                raise UsageError(f"tracking.experiment {name!r}: {summarize_error(error)}") from error
    if experiment.lifecycle_stage != "active":
        raise UsageError(
            f"tracking.experiment {name!r} was deleted in MLflow: choose another name, or restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return experiment.experiment_id


def log_settings(
    client: "MlflowClient", run_id: str, params: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    """Write parameters and tags in batches that MLflow accepts; tag values are redacted and cut."""
    from mlflow.entities import Param, RunTag

    mlflow_params = [Param(key, value) for key, value in params.items()]
    mlflow_tags = [
        RunTag(to_metric_key(key), _cut_text(redact(str(value)), _TAG_LENGTH)) for key, value in tags.items()
    ]
    for start in range(0, max(len(mlflow_params), len(mlflow_tags)), _SETTINGS_PER_BATCH):
        batch = slice(start, start + _SETTINGS_PER_BATCH)
        client.log_batch(run_id, params=mlflow_params[batch], tags=mlflow_tags[batch])


def to_metric_key(name: str) -> str:
    """Replace characters that MLflow refuses in a key, and cut it to MLflow's limit."""
    return re.sub(r"[^\w./ -]", "_", name)[:_KEY_LENGTH]


def _cut_text(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
