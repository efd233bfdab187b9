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

    cpu: float | None = Field(
        default=None,
        ge=0,
        description="CPUs; null: 1 where the cluster has GPUs, else 0.75 for a worker and 0.1 for a replica",
        examples=[2],
    )
    gpu: float | None = Field(
        default=None,
        ge=0,
        description="GPUs, a part of one or whole ones; null: 1 where the cluster has any",
        examples=[0.5],
    )
    custom: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="custom resources of Ray's nodes, by name",
        examples=[{"highmem": 1}],
    )

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

    replicas: int = Field(default=1, ge=1, description="copies of the reference that serve it")
    resources: Resources = Field(default=Resources(), description="what one replica requests from Ray")

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

    primary: str | None = Field(
        default=None,
        description="one of the names under `models`, required where there are any: centre of the trust "
        "region, source of the entropy, zero of `eval/accuracy`",
        examples=["base"],
    )
    mode: Literal["live", "precompute"] = Field(
        default="live",
        description="live: score while training; precompute: score everything, free the devices, then train",
    )
    models: dict[str, ReferenceConfig] = Field(
        default_factory=dict,
        description="the references by name. The primary comes first, the others follow in the file's order",
        examples=[{"base": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}}],
    )
    use: tuple[str, ...] | None = Field(
        default=None,
        description="names of the references that the run uses, the primary among them; null: all. The "
        "others are as good as not in the file",
        examples=[["base"]],
    )
    load_minutes: float = Field(
        default=60, gt=0, le=_YEAR, description="how long a replica may load its model before it is replaced"
    )
    answer_minutes: float = Field(
        default=5,
        gt=0,
        le=_YEAR,
        description="how long a replica may take for any batch before it is replaced; one that should take "
        "long by the speed seen gets 20 times that",
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

    epochs: int = Field(default=1, ge=1, description="passes over the training pairs")
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="optimizer steps; overrules `epochs`, and may exceed one epoch",
        examples=[500],
    )
    pairs_per_step: int = Field(
        default=64,
        ge=1,
        description="pairs of one optimizer step over all workers. The last step of an epoch may be "
        "smaller; no pair is dropped",
    )
    tokens_per_microbatch: int = Field(
        default=8192,
        ge=1,
        description="tokens that go through the policy at once on one worker, padding included: a matter of "
        "memory, not of results",
    )
    learning_rate: float = Field(default=5.0e-6, gt=0, description="AdamW's learning rate, at its peak")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="course of the learning rate after the warmup"
    )
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="share of all steps over which the learning rate rises linearly"
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="AdamW's weight decay; not on biases and norms", examples=[0.01]
    )
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of the whole gradient")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="dtype that the policy computes in, if `policy.dtype` does not say; auto: float32 on a "
        "CPU unless quantised, else bfloat16. What is trained has float32 masters in either",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="less memory for activations, for more time"
    )
    save_every: int = Field(
        default=200, ge=1, description="steps between checkpoints; the last step always has one"
    )
    keep_last: int = Field(default=2, ge=1, description="checkpoints that are kept")
    seed: Seed = Field(
        default=0,
        description="seed of the order of pairs, the adapter's start, dropout and the held-out share",
    )


class ParallelConfig(Section):
    """How many policy workers, what each requests from the cluster, and how they share the policy."""

    workers: int = Field(default=1, ge=1, description="policy workers, each a process of its own")
    strategy: Literal["ddp", "fsdp", "deepspeed"] = Field(
        default="ddp",
        description="ddp: a whole policy per worker; fsdp: shards by FSDP2; deepspeed: ZeRO by DeepSpeed",
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        default=None,
        description="of deepspeed, which shards the optimizer (1), gradients too (2), weights too (3); "
        "null: 2",
        examples=[3],
    )
    offload: bool = Field(
        default=False, description="of fsdp and deepspeed: keep what is sharded in main memory"
    )
    resources: Resources = Field(default=Resources(), description="what one worker requests from Ray")
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
        default=None,
        description="`package.module:function`, of two lists of texts, prompts and responses, to a number "
        "per response; found in the working folder or installed, and called by the workers",
        examples=["my_rewards:helpfulness"],
    )
    model: str | None = Field(
        default=None,
        description="a sequence classifier: hub id or folder, safetensors only; one actor serves it",
        examples=["a/classifier"],
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit of the classifier on the hub", examples=["main"]
    )
    label: str | int | None = Field(
        default=None,
        description="the class, by name or index, whose probability is the reward; left out where the model "
        "has one output",
        examples=["helpful"],
    )
    resources: Resources = Field(
        default=Resources(), description="what the classifier's actor requests from Ray"
    )

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

    prompts: int = Field(
        default=64,
        ge=1,
        description="that many different held-out prompts, the first of the file or of the judged set",
    )
    max_new_tokens: int = Field(
        default=64,
        ge=1,
        description="longest response; it ends earlier with the end token. Drawn at temperature 1",
    )
    kl_budget: float | None = Field(
        default=None,
        gt=0,
        description="nats per response to the primary reference, for the metrics at a KL budget",
        examples=[10],
    )
    reward: RewardConfig | None = Field(
        default=None,
        description="what judges the samples: `function` or `model`",
        examples=[{"function": "my_rewards:helpfulness"}],
    )


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

    every_steps: int = Field(
        default=50,
        ge=1,
        description="held-out pairs are evaluated before the first step, after every so many, and after the "
        "last",
    )
    metric: str = Field(
        default="eval/accuracy",
        description="what the run is judged by; shown first at its end",
        json_schema_extra={"enum": list(METRICS)},
    )
    set: str | None = Field(
        default=None,
        description="which of the named sets of `data.eval` the run is judged by; null: the first",
        examples=["safety"],
    )
    sampling: SamplingConfig | None = Field(
        default=None,
        description="let the policy write responses at every evaluation, for KL and reward",
        examples=[{"prompts": 64, "kl_budget": 10}],
    )
    keep: Literal["last", "best"] = Field(
        default="last",
        description="which weights are exported: the last, or the best by `metric` of all evaluations",
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
        default=None,
        description="MLflow's server or database; null: `$MLFLOW_TRACKING_URI`, else a sqlite file under "
        "`storage_path`",
        examples=["http://mlflow.example.com:5000"],
    )
    experiment: str = Field(default="polyref", description="MLflow experiment that the run is in")
    registered_model: str | None = Field(
        default=None,
        description="registered model that the result becomes a version of; null: none",
        examples=["sentiment"],
    )
    alias: str | None = Field(
        default=None,
        description="alias for that version, given with the checks of `polyref models promote`",
        examples=["champion"],
    )


class PlacementConfig(Section):
    """How long references and workers that fit the cluster may wait for other jobs to make room."""

    wait_minutes: float = Field(
        default=10,
        gt=0,
        le=_YEAR,
        description="how long references and workers may wait for other jobs to make room, and for an "
        "autoscaler's nodes",
    )
