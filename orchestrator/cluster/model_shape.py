"""A model's number of weights and its widths, counted without reading any weight."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import LoraSettings, ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from models.locate import ModelFiles


_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.516}  # NF4 with doubly quantised scales: 4.127 bits a weight


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder-only model that determine its memory: weights, and widths of activations.

    Attributes:
        layers: number of decoder layers.
        hidden: width of the residual stream.
        intermediate: width of a token's MLP (of all the experts it is routed to).
        attention: heads times head width.
        vocabulary: rows of the lm head.
        body: weights in all layers.
        layer: weights in the largest layer.
        root: weights outside the layers, a tied head counted once.
        adapter: weights of a LoRA adapter.
        lora: weights per rank of a LoRA adapter on every linear layer; 0 where they were not counted.
    """

    layers: int
    hidden: int
    intermediate: int
    attention: int
    vocabulary: int
    body: int
    layer: int
    root: int
    adapter: int = 0
    lora: int = 0

    @property
    def parameters(self) -> int:
        """Number of the model's weights without an adapter."""
        return self.body + self.root

    @classmethod
    def from_dimensions(
        cls,
        *,
        layers: int,
        hidden: int,
        intermediate: int,
        heads: int,
        kv_heads: int,
        vocabulary: int,
        head_width: int | None = None,
        tied: bool = False,
    ) -> "Shape":
        """Build the shape of a Llama-like model from its config's numbers."""
        query = heads * (head_width or hidden // heads)
        key = kv_heads * (head_width or hidden // heads)
        linear = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
        linear += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
        layer = sum(rows * columns for rows, columns in linear) + 2 * hidden
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            attention=query,
            vocabulary=vocabulary,
            body=layers * layer,
            layer=layer,
            root=vocabulary * hidden * (1 if tied else 2) + hidden,
            lora=layers * sum(rows + columns for rows, columns in linear),
        )

    def with_lora(self, rank: int) -> "Shape":
        """Return the shape with a LoRA adapter of that rank on every linear layer; 0 for no adapter."""
        return replace(self, adapter=rank * self.lora)


def get_bytes_per_weight(config: ModelConfig, device_type: str) -> tuple[float, float]:
    """Return the bytes of a frozen weight in a layer, and outside the layers."""
    outer = _DTYPE_BYTES[config.resolve_dtype(device_type)]
    return _QUANTIZED_BYTES.get(config.quantization, outer), outer


def read_model_shape(
    located: "ModelFiles", config: ModelConfig, *, lora: LoraSettings | None = None
) -> Shape:
    """Count a located model's weights without reading any, with a new adapter where `lora` is given.

    Raises:
        ModelError: the config cannot be read, or its architecture is unknown.
    """
    from models.load import build_empty_model

    model = build_empty_model(located, config)
    adapter = _count_adapter_weights(model, lora) if lora is not None else 0
    if lora is None and located.kind == "adapter":
        adapter = _count_stored_weights(located.path / "adapter_model.safetensors")
    return replace(_count_shape(model), adapter=adapter)


def _count_shape(model: "nn.Module") -> Shape:
    from torch import nn

    from models.architecture import read_setting

    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    layers = [_count_weights(layer) for layer in max(lists, key=_count_weights, default=())]
    hidden = text.hidden_size
    heads = read_setting(text, "num_attention_heads") or 1
    experts = read_setting(text, "num_experts_per_tok") or 1
    width = read_setting(text, "moe_intermediate_size") if experts > 1 else None
    width = width or read_setting(text, "intermediate_size") or read_setting(text, "n_inner") or 4 * hidden
    if isinstance(width, list):
        width = max(width)
    return Shape(
        layers=len(layers),
        hidden=hidden,
        intermediate=experts * width,
        attention=heads * (read_setting(text, "head_dim") or hidden // heads),
        vocabulary=text.vocab_size,
        body=sum(layers),
        layer=max(layers, default=0),
        root=_count_weights(model) - sum(layers),
    )


def _count_weights(module: "nn.Module") -> int:
    """Count the weights of a module, tied ones once."""
    return sum(weight.numel() for weight in module.parameters())


def _count_adapter_weights(model: Any, lora: LoraSettings) -> int:
    import copy

    import torch

    from models.adapters import add_lora

    with torch.device("meta"):
        adapted = add_lora(copy.deepcopy(model), lora)
    return sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def _count_stored_weights(file: Path) -> int:
    """Count the weights in a safetensors file from its header: 8 bytes of length, then JSON."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    return sum(_multiply(shape) for shape in shapes)


def _multiply(numbers: list[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total
