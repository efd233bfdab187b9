"""A run's record, `run.json` in its folder: its settings, its pinned versions and its result.

Running the same command again reads the record and resumes the run; a run whose settings, data or references
have changed is refused, because its checkpoint would silently mean something else.
"""

import datetime
import json
import os
import uuid
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import UsageError
from orchestrator.files import RecordError, dump_record, load_record, read_regular_file, replace_text
from orchestrator.storage.mirror import Mirror
from orchestrator.worker.result import WorkerResult

RunFolder = Path | Mirror
"""A run's folder, or the mirror of a run that is on an object store."""
RunKind = Literal["run", "search"]
RECORD_FILE = "run.json"
VERSION = 3
"""Version of the record's fields. In version 1 `result` was a dictionary with the references' counts; until
version 2 it had no findings."""
# How a run is distributed, watched and stored may change between restarts; what it computes may not.
MAY_CHANGE = (
    "storage_path",
    "placement",
    "tracking",
    "evaluation.every_steps",
    "evaluation.metric",
    "evaluation.sampling",
    "evaluation.keep",
    "data.allow_hard_labels",
    "references.mode",
    "references.audit",
    "references.load_minutes",
    "references.answer_minutes",
    "training.tokens_per_microbatch",
    "training.save_every",
    "training.keep_last",
    "parallel",
)
_OWN_FOLDERS = ("checkpoints", "export", ".export.part", "plots", "trials", ".tune")
_OWN_FILES = (
    *("best.safetensors", "metrics.jsonl", "dispersion.json", "run.yaml", "sweep.yaml", "trials.csv"),
    RECORD_FILE,  # last: a removal that was killed can be repeated
)
"""What a run or a search writes to its folder."""
_DAMAGED = "it is damaged or of another program"
_MAY_CHANGE_PER_REFERENCE = ("replicas", "resources")
# What a record from before tokens were pinned does not have: it is added when such a run is resumed.
_PINNED_LATER = ("tokens", "data.template_date", "run.data.template_date")


@dataclass(kw_only=True)
class RunRecord:
    """The record of a run or of a search.

    Attributes:
        config: the run file as resolved.
        device_type: "cuda" or "cpu", which decided `dtype: auto`.
        identity: digests of the data, its tokens, the references and the initial policy that results depend
            on. A record from before tokens were pinned has none of the tokens.
        pins: hub revisions and registry versions that names meant when the run began.
        counts: rows read, kept, skipped (by reason) and swapped, per split.
        key: a unique name that never changes, which finds the MLflow run if its id was not written down.
        mlflow_run: the MLflow run's id.
        mlflow_parent: the MLflow run it is nested under.
        result: what the workers returned once training was done.
        reference_counts: how many scores each reference was asked for and computed, by name.
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
    def kind(self) -> RunKind:
        """Whether it is the record of a run or of a search."""
        return "search" if "run" in self.config else "run"

    @property
    def pins_tokens(self) -> bool:
        """Whether the record knows the tokens that the run began with."""
        return "tokens" in self.identity

    @property
    def training_result(self) -> WorkerResult:
        """The result of the run, whose training must be done."""
        assert self.result is not None
        return self.result

    def write(self, folder: RunFolder) -> None:
        """Replace the record atomically.

        Raises:
            RunFailed: the storage refuses the write.
        """
        mirror = _open_mirror(folder)
        with mirror.explain_failures():
            replace_text(mirror.folder / RECORD_FILE, dump_record(self, version=VERSION))
        mirror.push(RECORD_FILE)


def read_record(folder: RunFolder) -> RunRecord | None:
    """Read the record of a run that was started before; return None if there is none.

    Raises:
        UsageError: the record is damaged, or a newer polyref wrote it, or its folder has a folder where a run
            has a file.
    """
    mirror = _open_mirror(folder)
    _refuse_other_kinds(mirror.folder)
    mirror.pull(RECORD_FILE)
    path = mirror.folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        record = load_record(RunRecord, read_regular_file(path), version=VERSION, convert=_convert_fields)
        _check_config(record.config)
        return record
    except (RecordError, OSError) as error:
        place = mirror.describe_path(RECORD_FILE)
        raise UsageError(
            f"{place}: is not a run's record that can be read: {error}. Restore it from a copy, or move its "
            "folder away, with the checkpoints in it, and start again"
        ) from None


def _refuse_other_kinds(folder: Path) -> None:
    """Refuse a run's folder that is none, or has folders, pipes or broken links where a run has files."""
    expected = [(folder, Path.is_dir), *((folder / name, Path.is_dir) for name in _OWN_FOLDERS)]
    expected += [(folder / name, Path.is_file) for name in _OWN_FILES]
    for path, is_kind in expected:
        if os.path.lexists(path) and not is_kind(path):
            kind = "folder" if is_kind is Path.is_dir else "file"
            raise UsageError(f"{path}: a run has a {kind} of this name, and this is none; move it away")


def _check_config(config: Any) -> None:
    """Refuse a record whose settings lack the sections that are read from it.

    Raises:
        RecordError: names the section.
    """
    run = config.get("run", config)
    sections = {"config.run": run} if "run" in config else {}
    if isinstance(run, dict):
        sections |= {f"config.{name}": run.get(name) or {} for name in ("policy", "references", "data")}
    if "run" in config:
        sections["config.search"] = config.get("search")
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise RecordError(f"{_DAMAGED}: {name} is no section of settings")
    models = (run.get("references") or {}).get("models") or {}
    if not isinstance(models, dict) or not all(isinstance(model, dict) for model in models.values()):
        raise RecordError(f"{_DAMAGED}: config.references.models has no models")
    try:
        datetime.date.fromisoformat((run.get("data") or {}).get("template_date") or "2000-01-01")
    except (TypeError, ValueError) as error:
        raise RecordError(f"{_DAMAGED}: config.data.template_date: {error}") from None


def _convert_fields(version: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a record, of version 1 too, to those of RunRecord."""
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
    return fields | {"result": asdict(WorkerResult(**result)) if result else None}


def open_record(
    folder: RunFolder, new: RunRecord, *, may_change: Collection[str] = MAY_CHANGE, reopen: bool = False
) -> RunRecord:
    """Return the existing record if it is of the same run, with today's settings; else write `new`.

    `may_change` are fields that may differ from the first start; `reopen` marks a finished run as unfinished.

    Raises:
        UsageError: a run of this name exists with other settings, data, tokens or references; lists them.
    """
    old = read_record(folder)
    if old is None:
        new.write(folder)
        return new
    added = () if old.pins_tokens else _PINNED_LATER
    changes = _list_changes(old.config, new.config, (*may_change, *added)) + _list_changes(
        old.identity, new.identity, added
    )
    if changes:
        listed = "; ".join(changes[:6]) + (f"; and {len(changes) - 6} more" if len(changes) > 6 else "")
        if any(change.startswith("tokens.") for change in changes):
            listed += (
                " (a tokenizer, a chat template, transformers or polyref makes other tokens of the texts)"
            )
        raise UsageError(
            f"run {new.config['name']!r} in {folder} was started with other settings: {listed}. "
            "Give the run another name, take the change back, or start over with --fresh"
        )
    old.config, old.identity, old.counts = new.config, new.identity, new.counts
    old.finished = old.finished and not reopen
    old.write(folder)
    return old


def find_pin(record: RunRecord | None, field: str, model: str) -> str | None:
    """Return the version that `model` meant when the run began.

    `field` is `policy` or `references.models.<name>`. None without a record, or if the field named another
    model then.
    """
    settings: Any = record.config if record else {}
    for part in field.split(".", 2):
        settings = settings.get(part) or {}
    return record.pins.get(field) if record and settings.get("model") == model else None


def lock_run(folder: RunFolder) -> AbstractContextManager[None]:
    """Lock a run for this process within the block; the lock ends with the process, however that ends.

    Raises:
        UsageError: another process is training this run.
    """
    return _open_mirror(folder).hold_lease()


def refuse_foreign_folder(folder: RunFolder, *, kind: RunKind) -> None:
    """Refuse to start over in a folder that no run of this kind has written.

    Raises:
        UsageError: the folder has files and no record, or the record of another kind, or a damaged one.
    """
    mirror = _open_mirror(folder)
    record, entries = read_record(mirror), mirror.list_entries()
    if record is None and entries:
        raise UsageError(
            f"{mirror}: --fresh removes what a {kind} of this name has written, and no {RECORD_FILE} is "
            f"there, but {', '.join(entries[:3])}; move that away, or give the {kind} another name"
        )
    if record is not None and record.kind != kind:
        raise UsageError(
            f"{mirror}: is the folder of a {record.kind}, which --fresh does not remove for a {kind}; give "
            f"the {kind} another name"
        )


def remove_run(folder: RunFolder, *, kind: RunKind) -> None:
    """Remove what a run or search has written: record, checkpoints, metrics, plots, trials; nothing else.

    Its scores are stored elsewhere and stay, as do files of others in its folder.

    Raises:
        UsageError: as `refuse_foreign_folder`.
    """
    refuse_foreign_folder(folder, kind=kind)
    _open_mirror(folder).remove_entries((*_OWN_FOLDERS, *_OWN_FILES))


def _open_mirror(folder: RunFolder) -> Mirror:
    return folder if isinstance(folder, Mirror) else Mirror(str(folder))


def _list_changes(old: Any, new: Any, may_change: Collection[str], path: str = "") -> list[str]:
    """List `field: old -> new` for every difference outside the fields that may change."""
    if path in may_change or _is_changeable_of_reference(path):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        paths = {key: f"{path}.{key}" if path else key for key in [*old, *new]}
        return [
            change
            for key, inner_path in paths.items()
            for change in _list_changes(old.get(key), new.get(key), may_change, inner_path)
        ]
    return [] if old == new else [f"{path}: {_shorten(old)} -> {_shorten(new)}"]


def _is_changeable_of_reference(path: str) -> bool:
    parts = path.removeprefix("run.").split(".")  # references.models.<name>.<field>
    return parts[:2] == ["references", "models"] and parts[3:] in (
        [field] for field in _MAY_CHANGE_PER_REFERENCE
    )


def _shorten(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
