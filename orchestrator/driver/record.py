"""A run's record, `run.json` in its folder: what was asked, what was pinned, what came of it.

Running the same command again reads it and goes on; a run whose settings, data or references have changed
is refused, because its checkpoint would silently mean something else.
"""

import json
import os
import uuid
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.storage.mirror import Mirror

Kept = Path | Mirror
"""A run's folder, or what stands for it where the run is kept on an object store."""
RECORD = "run.json"
# How a run is spread, watched and stored may change between restarts; what it computes may not.
MAY_CHANGE = (
    "storage_path",
    "placement",
    "tracking",
    "evaluation",
    "references.mode",
    "training.tokens_per_microbatch",
    "training.save_every",
    "training.keep_last",
    "parallel",
)
_MAY_CHANGE_PER_REFERENCE = ("replicas", "resources")


@dataclass(kw_only=True)
class RunRecord:
    """What is kept about a run.

    Attributes:
        config: the run file as resolved.
        device_type: "cuda" or "cpu", what `dtype: auto` was decided for.
        identity: digests of data, references and policy start that results depend on.
        pins: hub revisions and registry versions that names stood for when the run began.
        counts: rows read, kept, skipped (by reason) and swapped, per split.
        key: the run's own name for ever, which finds its MLflow run where the id was not written down.
        mlflow_run: the MLflow run's id.
        mlflow_parent: the MLflow run it is nested under.
        result: what the workers returned once training was done.
        registered: `models:/name/version`, once registered.
        finished: whether plots, artifacts and registration are done too.
    """

    config: dict[str, Any]
    device_type: str
    identity: dict[str, Any]
    pins: dict[str, str]
    counts: dict[str, Any]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    mlflow_run: str | None = None
    mlflow_parent: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    registered: str | None = None
    finished: bool = False

    def write(self, kept: Kept) -> None:
        """Replace the record in one move; RunFailed where the storage does not take it."""
        mirror = _open_mirror(kept)
        with mirror.explain_failures():
            mirror.folder.mkdir(parents=True, exist_ok=True)
            temporary = mirror.folder / f".{RECORD}.{os.getpid()}"
            temporary.write_text(json.dumps(asdict(self), indent=1))
            temporary.replace(mirror.folder / RECORD)
        mirror.push(RECORD)


def read_record(kept: Kept) -> RunRecord | None:
    """The record of a run that was started before, if there is one."""
    mirror = _open_mirror(kept)
    mirror.pull(RECORD)
    path = mirror.folder / RECORD
    if not path.exists():
        return None
    try:
        return RunRecord(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        place = mirror.describe_path(RECORD)
        raise UsageError(f"{place}: is not a run's record ({error}); start over with --fresh") from None


def open_record(
    kept: Kept, new: RunRecord, *, may_change: Collection[str] = MAY_CHANGE, more_to_do: bool = False
) -> RunRecord:
    """The record to go on with: the one that is there if it is of the same run, else the new one, written.

    `may_change` are fields that may differ from the first start; `more_to_do` begins a finished run again.

    Raises:
        UsageError: a run of this name exists with other settings, data or references; lists them.
    """
    old = read_record(kept)
    if old is None:
        new.write(kept)
        return new
    changes = _list_changes(old.config, new.config, may_change) + _list_changes(
        old.identity, new.identity, ()
    )
    if changes:
        listed = "; ".join(changes[:6]) + (f"; and {len(changes) - 6} more" if len(changes) > 6 else "")
        raise UsageError(
            f"run {new.config['name']!r} in {kept} was started with other settings: {listed}. "
            "Give the run another name, take the change back, or start over with --fresh"
        )
    old.config, old.counts = new.config, new.counts
    old.finished = old.finished and not more_to_do
    old.write(kept)
    return old


def find_pin(record: RunRecord | None, field: str, model: str) -> str | None:
    """What `model` at `field` (`policy`, `references.models.<name>`) stood for when the run began."""
    settings: Any = record.config if record else {}
    for part in field.split(".", 2):
        settings = settings.get(part) or {}
    return record.pins.get(field) if record and settings.get("model") == model else None


def lock_run(kept: Kept) -> AbstractContextManager[None]:
    """Hold a run for this process while inside; the lock goes with the process, however it ends.

    Raises:
        UsageError: another process is training this run.
    """
    return _open_mirror(kept).hold_lease()


def remove_run(kept: Kept) -> None:
    """Forget a run: its record, checkpoints, metrics and plots. Scores are kept elsewhere."""
    _open_mirror(kept).remove_run()


def _open_mirror(kept: Kept) -> Mirror:
    return kept if isinstance(kept, Mirror) else Mirror(str(kept))


def _list_changes(old: Any, new: Any, may_change: Collection[str], path: str = "") -> list[str]:
    """`field: old -> new` for every difference that matters."""
    if path in may_change or _is_reference_setting(path):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        paths = {key: f"{path}.{key}" if path else key for key in [*old, *new]}
        return [
            c
            for key, inner in paths.items()
            for c in _list_changes(old.get(key), new.get(key), may_change, inner)
        ]
    return [] if old == new else [f"{path}: {_shorten(old)} -> {_shorten(new)}"]


def _is_reference_setting(path: str) -> bool:
    parts = path.removeprefix("run.").split(".")  # references.models.<name>.<field>
    return parts[:2] == ["references", "models"] and parts[3:] in ([f] for f in _MAY_CHANGE_PER_REFERENCE)


def _shorten(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
