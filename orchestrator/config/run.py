"""The run file: one frozen tree of settings, composed of the configs of the packages that own them.

This module imports neither torch nor Ray, so that a wrong file is refused in a fraction of a second.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from losses.config import LossConfig
from losses.presets import (
    ALIASES,
    PRESETS,
    explain_preset_name,
    loss_config_from_settings,
    resolve_preset_name,
)
from models.config import PolicyConfig
from orchestrator.config.eval_sets import refuse_set_names
from orchestrator.config.problems import explain_validation_error, refuse_booleans
from orchestrator.config.sections import (
    EvaluationConfig,
    ParallelConfig,
    PlacementConfig,
    ReferencesConfig,
    RunName,
    Section,
    TrackingConfig,
    TrainingConfig,
)
from orchestrator.config.yaml import apply_overrides, read_yaml
from orchestrator.errors import UsageError, did_you_mean
from orchestrator.redaction import redact
from preferences.config import DataConfig


def _parse_loss(value: Any) -> Any:
    """Parse a loss section with its preset; a `LossConfig` is returned as it is."""
    if not isinstance(value, Mapping | LossConfig):
        raise ValueError(f"must be a section such as {{preset: dpo, beta: 0.1}}, got {value!r}")
    return loss_config_from_settings(value) if isinstance(value, Mapping) else value


class RunConfig(Section):
    """A whole run file."""

    name: RunName = Field(
        description="letters, digits, `.`, `_`, `-`; the run's folder is `<storage_path>/<name>`",
        examples=["sentiment"],
    )
    policy: PolicyConfig = Field(description="the model that is trained: all its weights, or a LoRA adapter")
    references: ReferencesConfig = Field(
        default=ReferencesConfig(), description="the frozen models that the policy is compared with"
    )
    data: DataConfig = Field(
        description="where pairs come from, which of their columns are read, and how long they may be"
    )
    loss: Annotated[LossConfig, BeforeValidator(_parse_loss)] = Field(
        description="a named loss, or one of your own, stage by stage"
    )
    training: TrainingConfig = Field(
        default=TrainingConfig(), description="the optimisation: how long, how much per step, how fast"
    )
    parallel: ParallelConfig = Field(
        default=ParallelConfig(), description="how many policy workers, and how they share the policy"
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="what is measured on held-out pairs, and when"
    )
    tracking: TrackingConfig = Field(
        default=TrackingConfig(),
        description="where MLflow records the run, and what its result is registered as",
    )
    placement: PlacementConfig = Field(
        default=PlacementConfig(), description="how long the run waits for room on the cluster"
    )
    storage_path: str = Field(
        default="./runs",
        min_length=1,
        description="folder that every node sees, or the URI of an object store: runs, scores, the default "
        "registry",
        examples=["s3://bucket/runs"],
    )
    _written_preset: str | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_preset(cls, values: Any, handler: ModelWrapValidatorHandler["RunConfig"]) -> "RunConfig":
        """Keep the preset's name, because the settings it expands to no longer contain it."""
        config = handler(values)
        loss = values.get("loss") if isinstance(values, Mapping) else None
        if isinstance(loss, Mapping) and "preset" in loss:
            config._written_preset = str(loss["preset"])
        return config

    @model_validator(mode="before")
    @classmethod
    def _order_named_weights(cls, values: Any) -> Any:
        """Turn `loss.references.weights: {base: 0.7, movie: 0.3}` into a list in the references' order."""
        if not isinstance(values, Mapping):
            return values
        loss, references = values.get("loss"), values.get("references") or {}
        loss = loss if isinstance(loss, Mapping) else {}
        combination = loss.get("references")
        weights = combination.get("weights") if isinstance(combination, Mapping) else None
        if not (
            isinstance(combination, Mapping)
            and isinstance(weights, Mapping)
            and isinstance(references, Mapping)
        ):
            return values
        use, models = references.get("use"), references.get("models") or {}
        use = [use] if isinstance(use, str) else use
        if not isinstance(models, Mapping) or not isinstance(use, list | tuple | None):
            return values  # refused where references are parsed
        primary = references.get("primary")
        names = [name for name in models if use is None or name in use]
        if set(weights) != set(names):
            raise ValueError(
                f"loss.references.weights names {sorted(map(str, weights))}, references.models "
                f"{sorted(map(str, names))}: "
                "give every reference one weight"
            )
        ordered = sorted(names, key=lambda name: name != primary)
        combination = {**combination, "weights": [weights[name] for name in ordered]}
        return {**values, "loss": {**loss, "references": combination}}

    @field_validator("storage_path")
    @classmethod
    def _refuse_unknown_store(cls, value: str) -> str:
        """Refuse the URI of a store that runs cannot be kept at, and one that lacks a slash."""
        scheme, mark, rest = value.partition(":/")
        if not mark or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
            return value
        from preferences.buckets import SCHEMES

        if not rest.startswith("/") and scheme.lower() in SCHEMES:
            raise ValueError(f"{redact(value)} lacks a slash; write {scheme.lower()}://{redact(rest)}")
        if scheme not in SCHEMES:
            stores = ", ".join(f"{known}://" for known in SCHEMES)
            raise ValueError(
                f"{redact(value)} is a URI that runs cannot be kept at; give a folder that all nodes share, "
                f"or one of {stores}"
            )
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> "RunConfig":
        """Refuse sections that are valid alone and do not fit together."""
        self._refuse_unsuitable_references()
        self._refuse_unscored_samples()
        self._refuse_unsuitable_policy()
        self._refuse_unsuitable_sets()
        self._refuse_best_of_nothing()
        return self

    def _refuse_unsuitable_references(self) -> None:
        """Refuse a number of references or weights that the loss cannot use."""
        count, loss = len(self.references.models), self.loss
        if count < loss.min_references:
            raise ValueError(
                f"the loss needs {loss.min_references} reference(s), references.models has {count}: "
                "add references, or choose a loss without (preset simpo, cpo, orpo, sft)"
            )
        if loss.references.combine == "single" and count > 1 and not loss.reference_free:
            raise ValueError(
                f"references.models has {count} references, but loss.references.combine is single: "
                "choose harmonic, geometric or multi_loss, or keep only the primary"
            )
        weights = loss.references.weights
        if not isinstance(weights, str) and len(weights) != count:
            raise ValueError(f"loss.references.weights has {len(weights)} weights for {count} references")

    def _refuse_unsuitable_policy(self) -> None:
        """Refuse a policy that the parallel strategy or a reference `model: policy` cannot use."""
        if self.policy.quantization != "none" and self.parallel.shards_weights:
            raise ValueError(
                f"policy.quantization {self.policy.quantization} packs weights, which parallel.strategy "
                f"{self.parallel.strategy} would have to cut: set strategy: ddp, or quantization: none"
            )
        dtype, precision = self.policy.dtype, self.training.precision
        if precision == "float32" and self.policy.quantization != "none":
            raise ValueError(
                "training.precision float32 does not fit a quantised policy, which computes in bfloat16: "
                "leave it out, or set policy.quantization: none"
            )
        if "auto" not in (dtype, precision) and dtype != precision:
            raise ValueError(
                f"policy.dtype {dtype} and training.precision {precision} differ, but a policy computes in "
                "the dtype of its weights (AdamW's copies are float32 in any case): leave one of them out"
            )
        if self.policy.attention == "flex" and self.parallel.shards_weights:
            raise ValueError(
                "policy.attention: flex needs the whole policy on a GPU when it is opened, and "
                f"parallel.strategy {self.parallel.strategy} reads it into main memory: set attention: sdpa, "
                "or strategy: ddp"
            )
        if self.policy.adapter is None and any(r.scored_by_workers for r in self.references.models.values()):
            raise ValueError(
                "a reference with `model: policy` is the policy with its adapter off, but policy.adapter is "
                "not set: set policy.adapter, or name the reference's model itself"
            )

    def _refuse_unscored_samples(self) -> None:
        """Refuse sampling whose samples no reference would be there to score."""
        sampling, references = self.evaluation.sampling, self.references
        if sampling is None:
            return
        if sampling.kl_budget is not None and not references.models:
            raise ValueError(
                "evaluation.sampling.kl_budget limits KL to the primary reference, but references.models is "
                "empty: add one, or leave the budget out"
            )
        served = [name for name, reference in references.models.items() if not reference.scored_by_workers]
        if references.mode == "precompute" and served:
            raise ValueError(
                f"evaluation.sampling needs scores of samples from references ({', '.join(served)}), but "
                "references.mode: precompute ends them before training; set mode: live, or model: policy"
            )

    def _refuse_unsuitable_sets(self) -> None:
        """Refuse set names that metrics cannot carry, and a judged set that `data.eval` does not have."""
        sets, judged = self.data.eval if isinstance(self.data.eval, dict) else {}, self.evaluation.set
        refuse_set_names(sets)
        if judged is None or judged in sets:
            return
        if not sets:
            raise ValueError(
                f"evaluation.set names {judged!r}, but data.eval has no named sets: name them "
                f"(data.eval: {{{judged}: held-out.jsonl}}), or leave evaluation.set out"
            )
        raise ValueError(
            f"evaluation.set names {judged!r}, which is no set of data.eval{did_you_mean(judged, sets)}"
        )

    def _refuse_best_of_nothing(self) -> None:
        """Refuse to keep the best weights where nothing is held out that says which they are."""
        data = self.data
        if self.evaluation.keep == "best" and not (data.eval or data.eval_fraction or data.eval_split):
            raise ValueError(
                "evaluation.keep: best needs held-out pairs that say which weights are best: set data.eval "
                "or data.eval_fraction, or keep: last"
            )

    @property
    def judged_set(self) -> str | None:
        """The named held-out set that the run is judged by; None if the held-out pairs have no named sets."""
        sets = self.data.eval
        return (self.evaluation.set or next(iter(sets))) if isinstance(sets, dict) else None

    @property
    def preset(self) -> str:
        """The named loss that the file starts from, under the name it has here, or "custom"."""
        return "custom" if self._written_preset is None else resolve_preset_name(self._written_preset)

    @property
    def loss_notice(self) -> str | None:
        """A sentence about the preset's name, if users of TRL know another loss by it."""
        return self._written_preset and explain_preset_name(self._written_preset, self.loss)

    @property
    def policy_model(self) -> PolicyConfig:
        """The policy with the dtype that it computes in: its own, or that of `training.precision`."""
        dtype = self.training.precision if self.policy.dtype == "auto" else self.policy.dtype
        return self.policy.model_copy(update={"dtype": dtype})

    @property
    def folder(self) -> Path:
        """The run's folder under `storage_path`."""
        return Path(self.storage_path) / self.name


def load_run(file: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, or take its content, apply `field.name=value` overrides and validate the whole.

    Raises:
        UsageError: one message naming the file and the line or the field, and the remedy.
    """
    if isinstance(file, Mapping):
        return parse_run(apply_overrides(file, overrides), source="run")
    return parse_run(read_yaml(file, overrides), source=str(file))


def parse_run(content: Mapping[str, Any], *, source: str) -> RunConfig:
    """Validate the content of a run file; `source` names it in messages."""
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        raise UsageError(explain_validation_error(error, source=source, model=RunConfig)) from None
    refuse_booleans(content, config, source=source)
    return config


def build_run_schema() -> dict[str, Any]:
    """Build the JSON Schema of the run file for editors, with what only a file may say of a loss."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    aliases = ", ".join(f"{theirs} is {ours}" for theirs, ours in ALIASES.items())
    preset = {
        "enum": sorted([*PRESETS, *ALIASES]),
        "default": None,
        "description": "a named loss to start from; other fields override it; null: `link` is required. Of "
        f"TRL's names, {aliases}, and its ipo is ipo_length_normalized",
        "examples": ["dpo"],
    }
    loss = definitions["LossConfig"]["properties"]
    definitions["LossConfig"]["properties"] = {"preset": preset, **loss}
    by_name = {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}}
    definitions["ReferenceStageConfig"]["properties"]["weights"]["anyOf"].append(by_name)
    for stage in loss["link"]["oneOf"]:  # a link without a type changes a knob of the preset's
        link = definitions[stage["$ref"].rpartition("/")[2]]
        link["required"] = [name for name in link["required"] if name != "type"]
    return schema
