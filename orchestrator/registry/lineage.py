"""The lineage of a registered policy, which `lineage.json` keeps: what it was trained from, on and with."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.files import RecordError, load_record
from orchestrator.redaction import hide_secrets
from orchestrator.registry.license import License

HUB = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)@(?P<commit>\w+)")
"""A pinned hub model as a run's record writes it: `id@commit`."""

LINEAGE_FILE = "lineage.json"
LINEAGE_VERSION = 2
"""Of the fields in `lineage.json`. Version 1 had no licences, data sources and libraries."""

_LIBRARIES = ("torch", "transformers", "peft", "datasets", "tokenizers", "ray", "deepspeed")


@dataclass(frozen=True)
class PinnedReference:
    """A frozen reference model, pinned as in the run's record."""

    model: str
    """Its pinned source: `hub/id@commit`, `models:/name/3`, or a folder."""
    fingerprint: str


@dataclass(frozen=True)
class DataSource:
    """A source of training or held-out data."""

    name: str
    """Its hub id, or the name of its file or folder without the path."""
    is_on_hub: bool
    used_for: str
    """`training` or `evaluation`."""
    license: License | None = None
    """What its card states; None if nothing is known."""


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The origin of a policy. Metrics are those of the held-out pairs, by name; None is not finite."""

    base_model: str
    """Pinned like `PinnedReference.model`."""
    base_license: License | None = None
    """What the base model's card or config states; None if nothing is known."""
    preset: str
    loss: Mapping[str, Any]
    references: Mapping[str, PinnedReference] = field(default_factory=dict)
    primary: str | None = None
    data_digest: str
    eval_digest: str | None = None
    data_sources: Sequence[DataSource] = ()
    judged_set: str | None = None
    """The named set of the held-out data that metrics such as `eval/accuracy` are of; None: all of it."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Numbers of pairs used and skipped: `{"train pairs": 900, "skipped, too long": 3}`."""
    before: Mapping[str, float | None] = field(default_factory=dict)
    after: Mapping[str, float | None] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    """The complete run file."""
    code: Mapping[str, str] = field(default_factory=dict)
    """Tags from `orchestrator.tracking.code_version.read_code_tags`."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries that trained it, by name."""
    search: Mapping[str, str] = field(default_factory=dict)
    """The search that chose this run: its name, trial, number of trials, objective; else empty."""

    @property
    def is_supervised(self) -> bool:
        """Whether the loss read no rejected response, so that no preference was learned."""
        link = self.loss.get("link")
        return isinstance(link, Mapping) and link.get("type") == "none"

    def to_json(self) -> str:
        """Return all fields as JSON text, without secrets."""
        fields = {"version": LINEAGE_VERSION, **hide_secrets(asdict(self))}
        return json.dumps(fields, indent=2, default=str) + "\n"


def parse_lineage(text: str, uri: str) -> Lineage:
    """Return what `Lineage.to_json` wrote; `uri` names the version in the UsageError if it cannot be read."""
    try:
        return load_record(Lineage, text, version=LINEAGE_VERSION)
    except RecordError as error:
        raise UsageError(f"{LINEAGE_FILE} of {uri} cannot be read: {error}") from error


def read_library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that training depends on, by name."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # deepspeed is Linux's only
            continue
    return versions
