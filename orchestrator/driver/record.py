"""A run's record, `run.json` in its folder: what was asked, what was pinned, what came of it.

Running the same command again reads it and goes on; a run whose settings, data or references have changed
is refused, because its checkpoint would silently mean something else.
"""

import json
import uuid
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.files import RecordError, dump_record, load_record, replace_text
from orchestrator.storage.mirror import Mirror
from orchestrator.worker.result import WorkerResult

Kept = Path | Mirror
"""A run's folder, or what stands for it where the run is kept on an object store."""
RECORD = "run.json"
VERSION = 2
"""Of the record's fields. 1 had `result` as a dictionary with the references' counts in it."""
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
        reference_counts: what each reference was asked and computed, by name.
        best_trial: of a search, the number of the trial that was promoted.
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
    result: WorkerResult | None = None
    reference_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    best_trial: int | None = None
    registered: str | None = None
    finished: bool = False

    @property
    def training_result(self) -> WorkerResult:
        """The result of a run whose training is done."""
        assert self.result is not None
        return self.result

    def write(self, kept: Kept) -> None:
        """Replace the record in one move; RunFailed where the storage does not take it."""
        mirror = _open_mirror(kept)
        with mirror.explain_failures():
            replace_text(mirror.folder / RECORD, dump_record(self, version=VERSION))
        mirror.push(RECORD)


def read_record(kept: Kept) -> RunRecord | None:
    """The record of a run that was started before, if there is one."""
    mirror = _open_mirror(kept)
    mirror.pull(RECORD)
    path = mirror.folder / RECORD
    if not path.exists():
        return None
    try:
        return load_record(RunRecord, path.read_text(), version=VERSION, convert=_convert_fields)
    except RecordError as error:
        place = mirror.describe_path(RECORD)
        raise UsageError(
            f"{place}: is not a run's record that can be read: {error}. Give the run another name, or start "
            "over with --fresh, which removes its checkpoints"
        ) from None


def _convert_fields(version: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Turn the fields of a record, of version 1 too, into those of RunRecord."""
    result = fields.get("result") or None
    if version == 1 and result is not None:
        fields |= {"reference_counts": result.pop("scores", {}), "best_trial": result.pop("best", None)}
        if "sharing_refused" in result:
            result["plain_rows_reason"] = result.pop("sharing_refused")
    if version == 1:
        fields["counts"] = {
            split: {{"turned_round": "swapped"}.get(name, name): count for name, count in counts.items()}
            for split, counts in fields["counts"].items()
        }
    return fields | {"result": WorkerResult(**result) if result else None}


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
