"""Settings of one model: its source, dtype and adapter. Imports neither torch nor transformers."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "8bit", "4bit"]
Attention = Literal["auto", "sdpa", "eager", "flex"]


class ModelError(ValueError):
    """The user's model cannot be used as configured; the message is complete and names the remedy."""


class ModelConfig(BaseModel):
    """One model to load: a hub id, a local folder, a GGUF file or a PEFT adapter folder.

    `models:/name@alias` is resolved to a local folder before a `ModelConfig` reaches this package.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: Annotated[str, Field(examples=["HuggingFaceTB/SmolLM2-135M-Instruct"])]
    """Hub id, model folder, `.gguf` file, PEFT adapter folder, `models:/name@alias` or `models:/name/3`;
    of a reference also `policy`, the policy's own start with its adapter off."""
    revision: Annotated[str | None, Field(examples=["main"])] = None
    """Branch, tag or commit on the hub; pinned to a commit in the run's record."""
    gguf_file: Annotated[str | None, Field(examples=["model-q8_0.gguf"])] = None
    """The file to read inside a hub repository or folder that holds GGUF files."""
    base: Annotated[str | None, Field(examples=["meta-llama/Llama-3.2-1B"])] = None
    """For an adapter: its base model, if it is not where `adapter_config.json` says, or to trust its code.
    The revision that the adapter names is then not used."""
    dtype: DTypeName = "auto"
    """The dtype of the weights; auto: float32 on a CPU unless quantised, else bfloat16. float16 is for
    references only. The policy computes in it as a reference does; AdamW steps float32 masters."""
    quantization: Quantization = "none"
    """Load the weights in 8 or 4 bits, with the extra `polyref[quantization]`. A quantised policy needs an
    `adapter` and a GPU."""
    trust_remote_code: bool = False
    """Run code that comes with the model; of an adapter's base only where `base` names it."""
    attention: Attention = "auto"
    """The implementation of attention; auto: sdpa, or eager where the architecture has no sdpa. flex needs a
    GPU."""
    chat_template: Annotated[str | None, Field(examples=["chat.jinja"])] = None
    """A template file, or the template itself, that replaces the tokenizer's own."""
    prefix_sharing: Literal["auto", "off"] = "auto"
    """auto: compute a prompt once for all its responses wherever that is exact for the model; off: never."""

    @field_validator("model", "base", "gguf_file", "revision")
    @classmethod
    def _refuse_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must not be empty; give a hub id or a path, or leave the field out")
        return value

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.model.startswith("models:/") and self.revision is not None:
            raise ValueError(
                "revision is for hub models; a registry model is pinned by its version: "
                "models:/<name>/<version>"
            )
        if self.quantization != "none" and self.is_gguf:
            raise ValueError(
                "quantization must be none for a GGUF file (it is dequantised when loaded); "
                "use a safetensors model to load in 4 or 8 bits"
            )
        if self.quantization != "none" and self.dtype == "float32":
            raise ValueError(
                "dtype float32 with quantization is slow and no more exact; use bfloat16 or auto"
            )
        return self

    def resolve_dtype(self, device_type: str) -> str:
        """Return the dtype of the weights on a device of that type (`cpu`, `cuda`)."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if device_type == "cpu" and self.quantization == "none" else "bfloat16"

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are read from a GGUF file."""
        return self.gguf_file is not None or self.model.endswith(".gguf")


class LoraSettings(BaseModel):
    """A LoRA adapter (Hu et al. 2021, arXiv:2106.09685): W + (alpha / r) B A, B = 0 at the start."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    r: Annotated[int, Field(ge=1)] = 16
    """Rank of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale of the adapter: W + (alpha / r) B A."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input; its masks change with workers and micro-batches. A model's own dropout
    is always off."""
    target_modules: Annotated[str | tuple[str, ...], Field(examples=[["q_proj", "v_proj"]])] = "all-linear"
    """Module names or suffixes; all-linear: every linear layer but the head. `polyref check` and `train` say
    which modules that is, and what it does not reach."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA; Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353)."""

    @field_validator("target_modules")
    @classmethod
    def _check_targets(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one module; try all-linear or [q_proj, v_proj]")
        return value


class PolicyConfig(ModelConfig):
    """The model that is trained: all its weights, or a LoRA adapter."""

    adapter: Annotated[LoraSettings | None, Field(examples=[{"r": 16, "alpha": 32}])] = None
    """The LoRA adapter to train; null trains every weight."""

    @model_validator(mode="after")
    def _check_trainable(self) -> Self:
        if self.quantization != "none" and self.adapter is None:
            raise ValueError(
                "a quantised policy trains only through an adapter; add adapter: {r: 16} or set "
                "quantization: none"
            )
        if self.dtype == "float16":
            raise ValueError(
                "policy dtype float16 would need loss scaling, which is not offered; use bfloat16 or auto"
            )
        return self
