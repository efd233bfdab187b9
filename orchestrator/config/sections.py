"""The sections of a run file."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from models.config import ModelConfig
from orchestrator.errors import did_you_mean

_LEAST_OF_RESOURCE = 0.0001
_YEAR = 525_600
"""Minutes; more is not meant, and no timer takes it."""
POLICY = "policy"
"""The reference model name that means the initial policy, scored in process with the adapter off."""


_TAKEN_NAMES = ("scores", "mlartifacts", "mlflow.db")
"""What lies under `storage_path` beside the folders of runs and searches."""


def _refuse_taken_name(name: str) -> str:
    if name.lower().startswith("mlflow.db") or name.lower() in _TAKEN_NAMES:
        raise ValueError(
            f"{name} under storage_path is of polyref itself; give another name, such as {name}-run"
        )
    return name


class Section(BaseModel):
    """Base of the run file's sections: frozen, and a field that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


RunName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100), AfterValidator(_refuse_taken_name)
]
"""A run's or a search's name, which is that of its folder under `storage_path`."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed that NumPy, torch and Python take alike."""


class Resources(Section):
    """What one replica or worker requests from Ray; `null` means the default for the connected cluster."""

    cpu: float | None = Field(default=None, ge=0)
    gpu: float | None = Field(default=None, ge=0)
    custom: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _refuse_what_ray_cannot_give(self) -> "Resources":
        """Refuse amounts and names that Ray refuses, before Ray is started."""
        for name in {"", "CPU", "GPU", "memory", "object_store_memory"} & set(self.custom):
            raise ValueError(f"custom has {name!r}, which Ray counts itself; set cpu or gpu, or another name")
        amounts = {"cpu": self.cpu or 0.0, "gpu": self.gpu or 0.0} | self.custom
        for name, amount in amounts.items():
            if 0 < amount < _LEAST_OF_RESOURCE:
                raise ValueError(
                    f"{name} {amount:g} is less than {_LEAST_OF_RESOURCE:g}, Ray's least; set more"
                )
        if self.gpu is not None and self.gpu > 1 and self.gpu % 1:
            raise ValueError(f"gpu {self.gpu:g} is neither whole nor a part of one GPU; set 1, 2, ... or 0.5")
        return self


class ReferenceConfig(ModelConfig):
    """One frozen reference model: what it is, and how many copies serve it with which resources."""

    replicas: int = Field(default=1, ge=1)
    resources: Resources = Resources()

    @property
    def scored_by_workers(self) -> bool:
        """Whether the policy's workers score it themselves, with their adapter off."""
        return self.model == POLICY

    @model_validator(mode="after")
    def _refuse_settings_in_process(self) -> "ReferenceConfig":
        """Refuse settings next to `model: policy`, because the policy's own settings apply."""
        extra = sorted(self.model_fields_set - {"model"})
        if self.scored_by_workers and extra:
            raise ValueError(
                f"`model: policy` is the initial policy, so {', '.join(extra)} cannot be set here; "
                "leave it out, or name the model itself"
            )
        return self


class ReferencesConfig(Section):
    """The references by name. `primary` centres the trust region and gives entropy and accuracy."""

    primary: str | None = None
    mode: Literal["live", "precompute"] = "live"
    models: dict[str, ReferenceConfig] = Field(default_factory=dict)
    use: tuple[str, ...] | None = Field(default=None, description="those of models to use; default all")
    load_minutes: float = Field(
        default=60, gt=0, le=_YEAR, description="how long a replica may load its model before it is replaced"
    )
    answer_minutes: float = Field(
        default=5,
        gt=0,
        le=_YEAR,
        description="how long a replica may take for any batch before it is replaced; long batches get more",
    )
    audit: int = Field(
        default=0, ge=0, description="stored responses per reference that are scored anew before training"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_unused_models(cls, values: Any) -> Any:
        """Drop the models that are not in `use`, before they are validated."""
        if not isinstance(values, Mapping) or not isinstance(values.get("models"), Mapping):
            return values
        use = values.get("use")
        use = [use] if isinstance(use, str) else use
        if not isinstance(use, list | tuple) or not all(isinstance(name, str) for name in use):
            return values
        models = values["models"]
        for name in use:
            if name not in models:
                raise ValueError(f"use names {name!r}{did_you_mean(str(name), models)}")
        return {**values, "models": {name: model for name, model in models.items() if name in use}}

    @model_validator(mode="after")
    def _require_primary(self) -> "ReferencesConfig":
        """Refuse references without a primary, or a primary that is not among them."""
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
        """The names, primary first and the others in the file's order: the order of references in losses."""
        return sorted(self.models, key=lambda name: name != self.primary)


class TrainingConfig(Section):
    """The optimisation: how long, how much per step, how fast."""

    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    pairs_per_step: int = Field(default=64, ge=1)
    tokens_per_microbatch: int = Field(default=8192, ge=1)
    learning_rate: float = Field(default=5.0e-6, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of all steps")
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    save_every: int = Field(default=200, ge=1)
    keep_last: int = Field(default=2, ge=1)
    seed: Seed = 0


class ParallelConfig(Section):
    """How many policy workers, what each requests from the cluster, and how they share the policy."""

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
    max_failures: int = Field(
        default=3,
        ge=0,
        description="worker crashes without a new checkpoint in between before the run gives up",
    )

    @model_validator(mode="after")
    def _refuse_unsuitable_settings(self) -> "ParallelConfig":
        """Refuse settings that the strategy does not have."""
        if self.zero_stage is not None and self.strategy != "deepspeed":
            raise ValueError(
                f"zero_stage is DeepSpeed's, and strategy is {self.strategy}: set strategy: deepspeed, "
                "or leave zero_stage out"
            )
        if self.offload and self.strategy == "ddp":
            raise ValueError("offload needs sharded states: set strategy: fsdp or deepspeed")
        if self.workers > 1 and 0 < (self.resources.gpu or 0) < 1:
            raise ValueError(
                f"resources.gpu {self.resources.gpu:g} would put several workers on one GPU, between which "
                "NCCL does not communicate: set gpu: 1, or workers: 1"
            )
        return self

    @property
    def stage(self) -> int:
        """The ZeRO stage of DeepSpeed, 2 by default."""
        return self.zero_stage or 2

    @property
    def shards_weights(self) -> bool:
        """Whether weights are sharded, and not only gradients and optimizer states."""
        return self.strategy == "fsdp" or (self.strategy == "deepspeed" and self.stage == 3)


class RewardConfig(Section):
    """The reward of sampled responses: a Python function, or a model that classifies text, as an actor."""

    function: str | None = Field(
        default=None, description="package.module:function, (prompts, responses) -> one number each"
    )
    model: str | None = Field(default=None, description="a sequence classifier: hub id or folder")
    revision: str | None = None
    label: str | int | None = Field(default=None, description="the class whose probability is the reward")
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _require_one_scorer(self) -> "RewardConfig":
        """Refuse both or neither of function and model, and a model's settings for a function."""
        if (self.function is None) == (self.model is None):
            raise ValueError("a reward is either function: package.module:name or model: ..., not both")
        has_model_settings = (
            self.revision is not None or self.label is not None or self.resources != Resources()
        )
        if self.function is not None and has_model_settings:
            raise ValueError("revision, label and resources are for a reward model, not for a function")
        return self


class SamplingConfig(Section):
    """Responses that the policy writes at every evaluation, for KL and reward."""

    prompts: int = Field(default=64, ge=1, description="held-out prompts, the first of the judged set")
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
"""The metrics that a run can be judged by, and whether more or less is better."""
KL_PREFIX = "eval/kl/"
"""Prefix of the KL to a reference, whose name follows; measured if the policy is sampled."""


class EvaluationConfig(Section):
    """Held-out evaluation: before the first step, every so many steps, and at the end."""

    every_steps: int = Field(default=50, ge=1)
    metric: str = Field(
        default="eval/accuracy",
        description="what the run is judged by; shown first at its end",
        json_schema_extra={"enum": list(METRICS)},
    )
    set: str | None = Field(
        default=None, description="the named held-out set that the run is judged by; default: the first"
    )
    sampling: SamplingConfig | None = None
    keep: Literal["last", "best"] = Field(
        default="last", description="which weights are exported: the last, or the best by metric"
    )

    @model_validator(mode="after")
    def _require_measured_metric(self) -> "EvaluationConfig":
        """Refuse an unknown metric, or one whose reward, KL budget or `keep: best` is not set."""
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r} is unknown{did_you_mean(self.metric, METRICS)}")
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


class TrackingConfig(Section):
    """Where MLflow records the run, and the registered model that gets a version of its result."""

    uri: str | None = Field(
        default=None, description="default: MLFLOW_TRACKING_URI, else sqlite under storage_path"
    )
    experiment: str = "polyref"
    registered_model: str | None = None
    alias: str | None = Field(default=None, description="alias that the version requests")


class PlacementConfig(Section):
    """How long references and workers that fit the cluster may wait for other jobs to make room."""

    wait_minutes: float = Field(default=10, gt=0, le=_YEAR)
