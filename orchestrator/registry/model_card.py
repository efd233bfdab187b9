"""The model card: a trained policy's base model, references, data and metrics, and how to load it."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any

import yaml

from orchestrator.redaction import hide_secrets, redact

HUB = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)@(?P<commit>\w+)")
"""A pinned hub model as a run's record writes it: `id@commit`."""


LINEAGE_VERSION = 1
"""Of the fields in `lineage.json`, which polyref writes and does not read."""


@dataclass(frozen=True)
class PinnedReference:
    """A frozen reference model, pinned as in the run's record."""

    model: str
    """Its pinned source: `hub/id@commit`, `models:/name/3`, or a folder."""
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The origin of a policy. Metrics are those of the held-out pairs, by name; None is not finite."""

    base_model: str
    """Pinned like `PinnedReference.model`."""
    preset: str
    loss: Mapping[str, Any]
    references: Mapping[str, PinnedReference] = field(default_factory=dict)
    primary: str | None = None
    data_digest: str
    eval_digest: str | None = None
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
    search: Mapping[str, str] = field(default_factory=dict)
    """The search that chose this run: its name, trial, number of trials, objective; else empty."""

    def to_json(self) -> str:
        """Return all fields as JSON text, without secrets."""
        fields = {"version": LINEAGE_VERSION, **hide_secrets(asdict(self))}
        return json.dumps(fields, indent=2, sort_keys=True, default=str) + "\n"


def render_model_card(name: str, lineage: Lineage, *, adapter: bool) -> str:
    """Return the README.md of a registered model: YAML front matter as hubs read it, then Markdown."""
    front_matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if hub := HUB.fullmatch(lineage.base_model):
        front_matter["base_model"] = hub["id"]
    front_matter["tags"] = ["polyref", "preference-optimization", lineage.preset]
    sections = [
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---\n",
        f"# {name}\n",
        f"`{_shorten_model_name(lineage.base_model)}` fine-tuned on human preferences with polyref, "
        f"loss preset `{lineage.preset}`.\n",
        _render_search(lineage),
        _render_references(lineage),
        _render_data(lineage),
        _render_metrics(lineage),
        "## Loss\n\n```yaml\n" + yaml.safe_dump(_to_plain_settings(lineage.loss), sort_keys=False) + "```\n",
        _render_loading(name, lineage, adapter=adapter),
    ]
    return redact("\n".join(section for section in sections if section))


def _render_references(lineage: Lineage) -> str:
    if not lineage.references:
        return "## References\n\nNone: this loss compares the policy with itself only.\n"
    rows = [
        [
            f"{name} (primary)" if name == lineage.primary else name,
            f"`{_shorten_model_name(r.model)}`",
            f"`{r.fingerprint[:16]}`",
        ]
        for name, r in lineage.references.items()
    ]
    return "## References\n\n" + _render_table(["reference", "model", "fingerprint"], rows)


def _render_search(lineage: Lineage) -> str:
    if not lineage.search:
        return ""
    search = {name.removeprefix("search."): value for name, value in lineage.search.items()}
    return (
        f"Chosen by the search `{search['search']}`: trial {search['trial']} of {search['trials']}, "
        f"by {search['objective']}.\n"
    )


def _render_data(lineage: Lineage) -> str:
    rows = [["training data", f"`{lineage.data_digest[:16]}`"]]
    if lineage.eval_digest:
        rows.append(["held-out data", f"`{lineage.eval_digest[:16]}`"])
    if lineage.judged_set:
        rows.append(["judged by the set", lineage.judged_set])
    rows += [[label, str(count)] for label, count in lineage.counts.items()]
    return "## Data\n\n" + _render_table(["", "digest or count"], rows)


def _render_metrics(lineage: Lineage) -> str:
    if not lineage.after:
        return ""
    rows = [
        [name, _format_number(lineage.before.get(name)), _format_number(value)]
        for name, value in sorted(lineage.after.items())
        if not name.startswith("perf/")
    ]
    return "## Held-out metrics\n\n" + _render_table(["metric", "before", "after"], rows)


def _render_loading(name: str, lineage: Lineage, *, adapter: bool) -> str:
    section = f"""## Loading

As a folder, after `polyref models get {name}@ALIAS --to {name}`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

From the registry:

```python
import mlflow
model = mlflow.transformers.load_model("models:/{name}@ALIAS", return_type="components")["model"]
```
"""
    if adapter:
        section += f"""
The adapter alone, on its base model:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({_render_load_arguments(lineage.base_model)})
model = PeftModel.from_pretrained(base, "{name}/adapter")
```
"""
    return section


def _shorten_model_name(model: str) -> str:
    """Return a pinned model's name; of a folder only the last part, since its path is this machine's."""
    is_public = HUB.fullmatch(model) or model.startswith("models:/")
    return model if is_public else PurePath(model).name


def _render_load_arguments(model: str) -> str:
    hub = HUB.fullmatch(model)
    return (
        f'"{hub["id"]}", revision="{hub["commit"]}"' if hub else f'"FOLDER-OF-{_shorten_model_name(model)}"'
    )


def _render_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _to_plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings to types that YAML writes: no tuples, no enums."""
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain
