"""The run file: one frozen tree of settings, composed of the configs of the packages that own them.

Nothing here imports torch or Ray, so that a file is refused in a fraction of a second.
"""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from losses.config import LossConfig
from losses.presets import PRESETS, from_settings
from models.config import ModelConfig, PolicyConfig
from preferences.config import DataConfig

POLICY = "policy"
"""The reference model name that means: the policy's own start, scored in process with the adapter off."""


class UsageError(ValueError):
    """The user's input is wrong; the message says where and what to do. The command exits with 2."""


class RunFailed(RuntimeError):
    """The run itself failed, not its input; the message says why. The command exits with 1."""


class Settings(BaseModel):
    """Base of the run file's sections: frozen, and a field that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Resources(Settings):
    """What one replica or worker asks of Ray; `null` means the default for the cluster at hand."""

    cpu: float | None = Field(default=None, ge=0)
    gpu: float | None = Field(default=None, ge=0)
    custom: dict[str, float] = Field(default_factory=dict)


class ReferenceConfig(ModelConfig):
    """One frozen reference model: what it is, and how many copies serve it with which resources."""

    replicas: int = Field(default=1, ge=1)
    resources: Resources = Resources()

    @property
    def in_process(self) -> bool:
        """Whether the policy's workers score it themselves, with their adapter off."""
        return self.model == POLICY

    @model_validator(mode="after")
    def _in_process_has_no_settings(self) -> "ReferenceConfig":
        extra = sorted(self.model_fields_set - {"model"})
        if self.in_process and extra:
            raise ValueError(
                f"`model: policy` is the policy's own start, so {', '.join(extra)} cannot be set here; "
                "leave it out, or name the model itself"
            )
        return self


class ReferencesConfig(Settings):
    """The references by name. `primary` centres the trust region and gives entropy and accuracy."""

    primary: str | None = None
    mode: Literal["live", "precompute"] = "live"
    models: dict[str, ReferenceConfig] = Field(default_factory=dict)
    use: tuple[str, ...] | None = Field(default=None, description="those of models to use; default all")

    @model_validator(mode="before")
    @classmethod
    def _only_those_used(cls, values: Any) -> Any:
        """A model that is not in `use` is as good as not in the file."""
        if not isinstance(values, Mapping) or not isinstance(values.get("models"), Mapping):
            return values
        use = values.get("use")
        if use is None:
            return values
        models = values["models"]
        for name in [use] if isinstance(use, str) else use:
            if name not in models:
                raise ValueError(f"use names {name!r}{did_you_mean(str(name), models)}")
        return {**values, "models": {name: model for name, model in models.items() if name in use}}

    @model_validator(mode="after")
    def _primary_is_named(self) -> "ReferencesConfig":
        names = list(self.models)
        if not names and self.primary is not None:
            raise ValueError(f"primary names {self.primary!r}, but references.models is empty")
        if names and self.primary is None:
            raise ValueError(f"primary must name one of the references: {', '.join(names)}")
        if names and self.primary not in names:
            left_out = ", and use leaves it out" if self.use is not None else ""
            raise ValueError(f"primary is {self.primary!r}{left_out}{did_you_mean(str(self.primary), names)}")
        return self

    @property
    def ordered(self) -> list[str]:
        """Names with the primary first, the others as the file has them: the order losses see."""
        return sorted(self.models, key=lambda name: name != self.primary)


class TrainingConfig(Settings):
    """The optimisation: how long, how much per step, how fast."""

    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    pairs_per_step: int = Field(default=64, ge=1)
    tokens_per_microbatch: int = Field(default=8192, ge=1)
    learning_rate: float = Field(default=5.0e-6, gt=0, allow_inf_nan=False)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of all steps")
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    save_every: int = Field(default=200, ge=1)
    keep_last: int = Field(default=2, ge=1)
    seed: int = Field(default=0, ge=0)


class ParallelConfig(Settings):
    """How many policy workers, what each asks of the cluster, and how they share the policy."""

    workers: int = Field(default=1, ge=1)
    strategy: Literal["ddp", "fsdp", "deepspeed"] = Field(
        default="ddp", description="a whole policy per worker; shards by FSDP2; ZeRO by DeepSpeed"
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        default=None,
        description="deepspeed shards the optimizer (1), gradients too (2, the default), weights too (3)",
    )
    offload: bool = Field(default=False, description="keep what is sharded in main memory (fsdp, deepspeed)")
    resources: Resources = Resources()
    max_failures: int = Field(default=3, ge=0, description="worker crashes before the run gives up")

    @model_validator(mode="after")
    def _settings_suit_the_strategy(self) -> "ParallelConfig":
        if self.zero_stage is not None and self.strategy != "deepspeed":
            raise ValueError(
                f"zero_stage is DeepSpeed's, and strategy is {self.strategy}: set strategy: deepspeed, "
                "or leave zero_stage out"
            )
        if self.offload and self.strategy == "ddp":
            raise ValueError("offload needs sharded states: set strategy: fsdp or deepspeed")
        return self

    @property
    def stage(self) -> int:
        """DeepSpeed's ZeRO stage."""
        return self.zero_stage or 2

    @property
    def shards_weights(self) -> bool:
        """Whether weights are cut, and not gradients and moments alone."""
        return self.strategy == "fsdp" or (self.strategy == "deepspeed" and self.stage == 3)


class RewardConfig(Settings):
    """What judges sampled responses: a Python function, or a model that classifies text, as an actor."""

    function: str | None = Field(
        default=None, description="package.module:function, (prompts, responses) -> one number each"
    )
    model: str | None = Field(default=None, description="a sequence classifier: hub id or folder")
    revision: str | None = None
    label: str | int | None = Field(default=None, description="the class whose probability is the reward")
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _one_judge(self) -> "RewardConfig":
        if (self.function is None) == (self.model is None):
            raise ValueError("a reward is either function: package.module:name or model: ..., not both")
        of_model = self.revision is not None or self.label is not None or self.resources != Resources()
        if self.function is not None and of_model:
            raise ValueError("revision, label and resources are for a reward model, not for a function")
        return self


class SamplingConfig(Settings):
    """Responses that the policy writes at every evaluation, for KL and reward."""

    prompts: int = Field(default=64, ge=1, description="held-out prompts, the first of the file")
    max_new_tokens: int = Field(default=64, ge=1)
    kl_budget: float | None = Field(
        default=None, gt=0, description="nats per response to the primary, for the metrics at a KL budget"
    )
    reward: RewardConfig | None = None


METRICS: Mapping[str, Literal["max", "min"]] = {
    "eval/accuracy": "max",
    "eval/label_nll": "min",
    "eval/loss": "min",
    "eval/rewards/margins": "max",
    "eval/margin": "max",
    "eval/margin_at_kl": "max",
    "eval/reward": "max",
    "eval/reward_at_kl": "max",
}
"""What a run can be judged by, and which way is better."""


class EvaluationConfig(Settings):
    """Held-out evaluation: before the first step, every so many steps, and at the end."""

    every_steps: int = Field(default=50, ge=1)
    metric: str = Field(
        default="eval/accuracy",
        description="what the run is judged by; shown first at its end",
        json_schema_extra={"enum": list(METRICS)},
    )
    sampling: SamplingConfig | None = None
    keep: Literal["last", "best"] = Field(
        default="last", description="which weights are exported: the last, or the best by metric"
    )

    @model_validator(mode="after")
    def _metric_is_measured(self) -> "EvaluationConfig":
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r} is none{did_you_mean(self.metric, METRICS)}")
        sampling = self.sampling or SamplingConfig()
        if self.metric in ("eval/reward", "eval/reward_at_kl") and sampling.reward is None:
            raise ValueError(
                f"metric {self.metric} needs a reward; set evaluation.sampling.reward: "
                "{function: package.module:name} or {model: ...}"
            )
        if self.metric.endswith("_at_kl"):
            if sampling.kl_budget is None:
                raise ValueError(
                    f"metric {self.metric} needs a budget; set evaluation.sampling.kl_budget, "
                    "in nats per response"
                )
            if self.keep != "best":
                raise ValueError(
                    f"metric {self.metric} is the best within the budget, so its weights are the ones to "
                    "keep; set evaluation.keep: best"
                )
        return self


class TrackingConfig(Settings):
    """Where MLflow records the run, and the registered model its result becomes a version of."""

    uri: str | None = Field(
        default=None, description="default: MLFLOW_TRACKING_URI, else sqlite under storage_path"
    )
    experiment: str = "polyref"
    registered_model: str | None = None
    alias: str | None = Field(default=None, description="alias that the version asks for")


class PlacementConfig(Settings):
    """How long references and workers that fit the cluster may wait for other jobs to make room."""

    wait_minutes: float = Field(default=10, gt=0)


def _loss(value: Any) -> Any:
    if not isinstance(value, Mapping | LossConfig):
        raise ValueError(f"must be a section such as {{preset: dpo, beta: 0.1}}, got {value!r}")
    return from_settings(value) if isinstance(value, Mapping) else value


class RunConfig(Settings):
    """A whole run file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    policy: PolicyConfig
    references: ReferencesConfig = ReferencesConfig()
    data: DataConfig
    loss: Annotated[LossConfig, BeforeValidator(_loss)]
    training: TrainingConfig = TrainingConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    placement: PlacementConfig = PlacementConfig()
    storage_path: str = "./runs"
    _preset: str = PrivateAttr(default="custom")

    @model_validator(mode="before")
    @classmethod
    def _weights_by_name(cls, values: Any) -> Any:
        """`loss.references.weights: {base: 0.7, movie: 0.3}` becomes a list in the references' order."""
        if not isinstance(values, Mapping):
            return values
        loss, references = values.get("loss"), values.get("references") or {}
        loss = loss if isinstance(loss, Mapping) else {}
        stage = loss.get("references")
        weights = stage.get("weights") if isinstance(stage, Mapping) else None
        if not (
            isinstance(stage, Mapping) and isinstance(weights, Mapping) and isinstance(references, Mapping)
        ):
            return values
        use = references.get("use")
        primary = references.get("primary")
        names = [n for n in references.get("models") or {} if use is None or n in use]
        if set(weights) != set(names):
            raise ValueError(
                f"loss.references.weights names {sorted(weights)}, references.models {sorted(names)}: "
                "give every reference one weight"
            )
        ordered = sorted(names, key=lambda name: name != primary)
        by_order = {**stage, "weights": [weights[name] for name in ordered]}
        return {**values, "loss": {**loss, "references": by_order}}

    @model_validator(mode="after")
    def _makes_sense(self) -> "RunConfig":
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
        self._refuse_unsampled()
        if self.policy.quantization != "none" and self.parallel.shards_weights:
            raise ValueError(
                f"policy.quantization {self.policy.quantization} packs weights, which parallel.strategy "
                f"{self.parallel.strategy} would have to cut: set strategy: ddp, or quantization: none"
            )
        if self.policy.attention == "flex" and self.parallel.shards_weights:
            raise ValueError(
                "policy.attention: flex needs the whole policy on a GPU when it is opened, and "
                f"parallel.strategy {self.parallel.strategy} reads it into main memory: set attention: sdpa, "
                "or strategy: ddp"
            )
        if self.policy.adapter is None and any(r.in_process for r in self.references.models.values()):
            raise ValueError(
                "a reference with `model: policy` is the policy with its adapter off, but policy.adapter is "
                "not set: set policy.adapter, or name the reference's model itself"
            )
        return self

    def _refuse_unsampled(self) -> None:
        sampling, references = self.evaluation.sampling, self.references
        if sampling is None:
            return
        if sampling.kl_budget is not None and not references.models:
            raise ValueError(
                "evaluation.sampling.kl_budget is of KL to the primary reference, but references.models is "
                "empty: add one, or leave the budget out"
            )
        served = [name for name, reference in references.models.items() if not reference.in_process]
        if references.mode == "precompute" and served:
            raise ValueError(
                f"evaluation.sampling asks references ({', '.join(served)}) for scores of fresh samples, but "
                "references.mode: precompute ends them before training; set mode: live, or model: policy"
            )

    @property
    def preset(self) -> str:
        """The named loss the file started from, or "custom"."""
        return self._preset

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return Path(self.storage_path) / self.name


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of the options, or the list of them."""
    options = list(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(map(str, options))}"


def load_run(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply `field.name=value` overrides and validate the whole.

    Raises:
        UsageError: one message naming the file and the line or the field, and the remedy.
    """
    return parse_run(read_yaml(path, overrides), source=str(path))


def read_yaml(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    what: str = "run file (name, policy, data, ...)",
) -> dict[str, Any]:
    """The mapping in a YAML file with dotted overrides merged over it; `what` it should be, for messages."""
    try:
        loaded = OmegaConf.load(Path(path))
        if not OmegaConf.is_dict(loaded):
            raise UsageError(f"{path}: is no mapping of sections, as a {what} is")
        content = override(OmegaConf.to_container(loaded, resolve=True), overrides)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; start from one in configs/, a {what}") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder; name the YAML file in it") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    return content


def override(content: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """A mapping with dotted `field.name=value` overrides merged over it."""
    merged = OmegaConf.to_container(OmegaConf.merge(content, *map(_override, overrides)), resolve=True)
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def _override(text: str) -> Any:
    if "=" not in text or text.startswith("="):
        raise UsageError(f"override {text!r} is not of the form field.name=value, e.g. loss.beta=0.2")
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"override {text!r}: the value is not valid YAML: {reason}") from None


def parse_run(content: Mapping[str, Any], *, source: str) -> RunConfig:
    """Validate the content of a run file; `source` names it in messages."""
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        raise UsageError(explain(error, source=source)) from None
    config._preset = content["loss"].get("preset", "custom")
    return config


def explain(error: ValidationError, *, source: str, of: type[BaseModel] = RunConfig) -> str:
    """A file's validation error, one line per problem: file, field, what is wrong, what would be right."""
    lines = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"]) or "the file"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown field" + did_you_mean(str(problem["loc"][-1]), _siblings(problem["loc"], of))
        elif problem["type"] == "missing":
            message = "is required and missing"
        elif problem["type"] != "value_error" and not isinstance(problem["input"], dict | list):
            message += f", got {problem['input']!r}"
        lines.append(f"{source}: {field}: {message}")
    return "\n".join(lines)


def _siblings(location: tuple[int | str, ...], of: type[BaseModel]) -> list[str]:
    """Fields that the section of an unknown field does have."""
    section: Any = of
    for part in location[:-1]:
        if get_origin(section) is dict:
            section = get_args(section)[1]
        elif str(part) in _model_in(section).model_fields:  # else the name of a union's member
            section = _model_in(section).model_fields[str(part)].annotation
    return list(_model_in(section).model_fields)


def _model_in(annotation: Any) -> type[BaseModel]:
    """The pydantic model in an annotation such as `LossConfig | None`."""
    options = (annotation, *get_args(annotation))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), Settings)


def run_schema() -> dict[str, Any]:
    """JSON Schema of the run file, for editors; `loss.preset` included."""
    schema = RunConfig.model_json_schema()
    preset = {"enum": sorted(PRESETS), "description": "a named loss; other fields override it"}
    schema["$defs"]["LossConfig"]["properties"]["preset"] = preset
    return schema
