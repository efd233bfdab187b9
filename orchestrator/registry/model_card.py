"""The model card: what a trained policy is, how it was trained, how it did, how to load it, and its limits.

Cards are written and checked with `huggingface_hub`, whose metadata hubs read.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.redaction import redact
from orchestrator.registry.license import License
from orchestrator.registry.lineage import HUB, Lineage

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

POLYREF_TAG = "polyref"
"""The tag in the metadata of every card that polyref writes."""

_INTERVAL = "_interval"
_PAIRWISE = ("accuracy", "margin", "rewards", "label_nll", "calibration_error")
"""Metrics of pairs, which say nothing of what a supervised policy learned."""

_MEANINGS = {
    "accuracy": "share of held-out pairs in which the preferred response gained more likelihood over the "
    "primary reference than the other one (without a reference: in which it is the likelier one)",
    "loss": "the training loss on held-out data; comparable only between models of the same loss",
    "margin": "mean log-ratio to the primary reference of the preferred response less the other's, in nats",
    "label_nll": "negative log-likelihood of the soft labels, in nats",
    "calibration_error": "mean distance between predicted probability and soft label, in 10 bins",
    "reward": "mean reward of sampled responses",
}
_HYPERPARAMETERS = {
    "training": (
        *("epochs", "max_steps", "pairs_per_step", "learning_rate", "schedule", "warmup", "weight_decay"),
        *("clip_norm", "precision", "seed"),
    ),
    "parallel": ("workers", "strategy"),
    "data": ("max_length", "max_prompt_length"),
}


@dataclass(frozen=True)
class HubTarget:
    """The repository that a card is for, and whether it holds the adapter alone."""

    repo: str
    adapter_only: bool = False


def render_model_card(name: str, lineage: Lineage, *, adapter: bool, hub: HubTarget | None = None) -> str:
    """Return the README.md of a registered model, whose metadata `huggingface_hub` has parsed.

    Args:
        name: the registered model's.
        lineage: what the card says.
        adapter: whether the version has a separate adapter.
        hub: the repository that the card is for; None: the card of a version in the registry.
    """
    from huggingface_hub import ModelCard

    sections = [
        f"---\n{_render_metadata(name, lineage, adapter=adapter, hub=hub)}\n---\n",
        f"# {name}\n",
        _render_introduction(lineage, adapter_only=hub is not None and hub.adapter_only),
        _render_search(lineage),
        _render_loading(name, lineage, adapter=adapter, hub=hub),
        _render_metrics(lineage),
        "## Training\n",
        _render_references(lineage),
        _render_data(lineage),
        "### Loss\n\n```yaml\n" + yaml.safe_dump(_to_plain_settings(lineage.loss), sort_keys=False) + "```\n",
        _render_hyperparameters(lineage),
        _render_software(lineage),
        _render_limits(lineage),
        _render_licenses(lineage),
    ]
    card = ModelCard(redact("\n".join(section for section in sections if section)))
    return str(card)


def _render_metadata(name: str, lineage: Lineage, *, adapter: bool, hub: HubTarget | None) -> str:
    from huggingface_hub import ModelCardData

    adapter_only = hub is not None and hub.adapter_only
    base = HUB.fullmatch(lineage.base_model)
    results = _list_eval_results(lineage)
    method = "sft" if lineage.is_supervised else "preference-optimization"
    license_fields = lineage.base_license.to_metadata() if lineage.base_license else {}
    metadata = ModelCardData(
        **license_fields,
        base_model=base["id"] if base else None,
        datasets=list(dict.fromkeys(s.name for s in lineage.data_sources if s.is_on_hub)) or None,
        library_name="peft" if adapter_only else "transformers",
        pipeline_tag="text-generation",
        tags=[POLYREF_TAG, method, lineage.preset, *(["lora"] if adapter else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return metadata.to_yaml()


def _list_eval_results(lineage: Lineage) -> "list[EvalResult]":
    """List the held-out metrics after training as hubs read them; one that is not finite is left out."""
    from huggingface_hub import EvalResult

    evaluated = [source for source in lineage.data_sources if source.used_for == "evaluation"]
    is_of_hub = (
        len(evaluated) == 1 and evaluated[0].is_on_hub
    )  # of several, it is not known which is which set
    results = []
    for name, value in sorted(_select_metrics(lineage, lineage.after).items()):
        held_out_set, _, metric = name.rpartition("/")
        is_known = (
            metric in _MEANINGS and held_out_set != lineage.judged_set
        )  # that set's are without its name
        if value is None or not math.isfinite(value) or not is_known:
            continue
        interval = lineage.after.get(f"eval/{name}{_INTERVAL}")
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=evaluated[0].name if is_of_hub else "held-out",
                dataset_name=held_out_set or lineage.judged_set or "held-out data",
                dataset_config=held_out_set or lineage.judged_set,  # results of one configuration are merged
                metric_type=metric,
                metric_name=metric if interval is None else f"{metric} (95 % interval: ± {interval:.2g})",
                metric_value=round(value, 6),
            )
        )
    return results


def _render_introduction(lineage: Lineage, *, adapter_only: bool) -> str:
    what = "A LoRA adapter for" if adapter_only else "A fine-tuned version of"
    base = f"`{_shorten_model_name(lineage.base_model)}`"
    if lineage.is_supervised:
        how = (
            "trained by supervised fine-tuning: it learned to write the responses in its data, and none was "
            "compared with another"
        )
    else:
        how = "trained on pairwise preferences, with the response that was preferred and the one that was not"
    return f"{what} {base}, {how}. Trained with polyref, loss preset `{lineage.preset}`.\n"


def _render_search(lineage: Lineage) -> str:
    if not lineage.search:
        return ""
    search = {name.removeprefix("search."): value for name, value in lineage.search.items()}
    return (
        f"Chosen by the search `{search['search']}`: trial {search['trial']} of {search['trials']}, "
        f"by {search['objective']}.\n"
    )


def _render_references(lineage: Lineage) -> str:
    if not lineage.references:
        return "### References\n\nNone: the loss reads the policy's own likelihoods only.\n"
    rows = [
        [
            f"{name} (primary)" if name == lineage.primary else name,
            f"`{_shorten_model_name(r.model)}`",
            f"`{r.fingerprint[:16]}`",
        ]
        for name, r in lineage.references.items()
    ]
    return "### References\n\n" + _render_table(["reference", "model", "fingerprint"], rows)


def _render_data(lineage: Lineage) -> str:
    rows = [[f"{source.used_for} data", f"`{source.name}`"] for source in lineage.data_sources]
    rows.append(["digest of the training data", f"`{lineage.data_digest[:16]}`"])
    if lineage.eval_digest:
        rows.append(["digest of the held-out data", f"`{lineage.eval_digest[:16]}`"])
    if lineage.judged_set:
        rows.append(["judged by the set", lineage.judged_set])
    rows += [[label, str(count)] for label, count in lineage.counts.items()]
    return "### Data\n\n" + _render_table(["", "source, digest or count"], rows)


def _render_metrics(lineage: Lineage) -> str:
    after, before = _select_metrics(lineage, lineage.after), _select_metrics(lineage, lineage.before)
    if not after:
        return "## Results\n\nNone: the policy was not evaluated on held-out data.\n"
    rows = [
        [f"eval/{name}", _format_measurement(lineage.before, name), _format_measurement(lineage.after, name)]
        for name in sorted(after)
    ]
    kinds = dict.fromkeys(name.rpartition("/")[2] for name in sorted(after | before))
    meanings = [f"- `{kind}`: {_MEANINGS[kind]}.\n" for kind in kinds if kind in _MEANINGS]
    table = _render_table(["metric", "before", "after"], rows)
    has_interval = any(name.endswith(_INTERVAL) for name in lineage.after)
    note = "\n± is half of a 95 % interval over held-out pairs.\n" if has_interval and "±" in table else ""
    explained = "\n" + "".join(meanings) if meanings else ""
    return f"## Results\n\nOn held-out data, before and after training.\n\n{table}{note}{explained}"


def _select_metrics(lineage: Lineage, metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the metrics that the card shows, by name without `eval/`, and no intervals."""
    selected = {
        name.removeprefix("eval/"): value
        for name, value in metrics.items()
        if name.startswith("eval/") and not name.endswith(_INTERVAL) and "/perf/" not in name
    }
    if lineage.is_supervised:
        selected = {name: v for name, v in selected.items() if not set(name.split("/")) & set(_PAIRWISE)}
    return selected


def _format_measurement(metrics: Mapping[str, float | None], name: str) -> str:
    value, interval = metrics.get(f"eval/{name}"), metrics.get(f"eval/{name}{_INTERVAL}")
    if value is None or interval is None:
        return _format_number(value)
    return f"{_format_number(value)} ± {interval:.2g}"


def _render_hyperparameters(lineage: Lineage) -> str:
    settings = {
        f"{section}.{field}": (lineage.config.get(section) or {}).get(field)
        for section, fields in _HYPERPARAMETERS.items()
        for field in fields
    }
    adapter = (lineage.config.get("policy") or {}).get("adapter") or {}
    settings |= {f"policy.adapter.{field}": value for field, value in adapter.items()}
    rows = [[name, _format_setting(value)] for name, value in settings.items() if value is not None]
    if not rows:
        return ""
    return "### Hyperparameters\n\n" + _render_table(["field of the run file", "value"], rows)


def _format_setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _render_software(lineage: Lineage) -> str:
    versions = {POLYREF_TAG: lineage.code.get("polyref.version", "unknown"), **lineage.libraries}
    return "### Software\n\n" + _render_table(["library", "version"], [[*row] for row in versions.items()])


def _render_loading(name: str, lineage: Lineage, *, adapter: bool, hub: HubTarget | None) -> str:
    if hub is not None and hub.adapter_only:
        return "## How to load it\n\n" + _render_adapter_loading(lineage, f'"{hub.repo}"')
    place = hub.repo if hub else name
    copied = "" if hub else f"As a folder, after `polyref models get {name}@ALIAS --to {name}`:\n\n"
    section = f"""## How to load it

{copied}```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```
"""
    if hub is None:
        section += f"""
From the registry:

```python
import mlflow
model = mlflow.transformers.load_model("models:/{name}@ALIAS", return_type="components")["model"]
```
"""
    if adapter:
        source = f'"{place}", subfolder="adapter"' if hub else f'"{place}/adapter"'
        section += "\nThe adapter alone, on its base model:\n\n" + _render_adapter_loading(lineage, source)
    return section


def _render_adapter_loading(lineage: Lineage, source: str) -> str:
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({_render_load_arguments(lineage.base_model)})
model = PeftModel.from_pretrained(base, {source})
```
"""


def _render_limits(lineage: Lineage) -> str:
    limits = ["It has the limits of its base model, and may have learned what its training data gets wrong."]
    if lineage.after:
        limits.append(
            "The results are of the held-out data alone: of other prompts and languages they say nothing."
        )
    if not lineage.is_supervised:
        limits.append(
            "Agreement with preferences is measured on given responses, by likelihood: it is not the quality "
            "of text that the model writes."
        )
    limits.append("It was not examined for safety, bias or truthfulness: do so before others use it.")
    if lineage.search:
        limits.append("It is the best of several trials by the number shown, which flatters that number.")
    return "## Limits\n\n" + "".join(f"- {limit}\n" for limit in limits)


def _render_licenses(lineage: Lineage) -> str:
    unknown = "not stated where polyref could read it"
    base = f"base model `{_shorten_model_name(lineage.base_model)}`"
    rows = [[base, str(lineage.base_license or unknown)]]
    licenses: dict[str, License | None] = {}
    for source in lineage.data_sources:
        licenses[source.name] = licenses.get(source.name) or source.license
    rows += [[f"data `{name}`", str(found or unknown)] for name, found in licenses.items()]
    text = (
        "As the base model and the data state them. Check that they allow it before you pass the model on.\n"
    )
    return f"## Licences\n\n{text}\n" + _render_table(["of", "licence"], rows)


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
