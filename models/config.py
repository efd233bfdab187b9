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

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Hub id, model folder, .gguf file or adapter folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pinned to a commit in the run's record."""
    gguf_file: str | None = None
    """The file to read inside a hub repository or folder that holds GGUF files."""
    base: str | None = None
    """For an adapter folder: the base model, if it is not where adapter_config.json says."""
    dtype: DTypeName = "auto"
    """auto: float32 on a CPU unless quantised, else bfloat16."""
    quantization: Quantization = "none"
    trust_remote_code: bool = False
    attention: Attention = "auto"
    """auto: sdpa, or eager where the architecture has no sdpa."""
    chat_template: str | None = None
    """A template file, or the template itself, that replaces the tokenizer's own."""
    prefix_sharing: Literal["auto", "off"] = "auto"
    """auto: compute a prompt once for all its responses if that is exact for the model."""

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

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """Module names or suffixes; all-linear: every linear layer but the head."""
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

    adapter: LoraSettings | None = None
    """None trains every weight."""

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
