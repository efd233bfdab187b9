"""What a model's config says about its layers: which keys a query attends to, and how long a row may be.

Log-probs of a response must depend on its own row alone. Most architectures see to that themselves; the
functions here name the ones that do not, or only within a length.
"""

import re
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from models.config import ModelError

_ALIBI = frozenset({"bloom", "mpt"})
_FULL_ATTENTION = frozenset({"full_attention", "attention"})
# Settings that hold the width of a window, such as GPT-Neo's `window_size` and Llama 4's chunks.
_WINDOW = re.compile(r"window(_size|_len)?$|^local_attention$|^attention_chunk_size$")
# Settings that hold how many keys a learned index selects for a query. Up to that length it selects them all;
# beyond it, the choice depends on the padding of the other rows too.
_SELECTED_KEYS = ("index_topk", "keep_window_size", "indexer_budget")


class RowLimit(NamedTuple):
    """The longest prompt with response whose log-probs do not depend on the other rows, and why."""

    tokens: int
    reason: str


def read_setting(config: PreTrainedConfig, name: str) -> Any:
    """Return a setting of a model's config; None if it has none, or not one value for all layers."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers refuses to give one value where layers differ
        return None


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the module that turns token ids into the last hidden states.

    Raises ModelError where there is none, or none that is clearly a part of the whole model.
    """
    decoder: Any = model.get_decoder()
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        decoder = getattr(model, "model", None)  # get_decoder found the model itself, or its linear head
    while isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
        decoder = getattr(decoder, "model", None)
    if not isinstance(decoder, nn.Module):
        raise ModelError(f"{model.config.model_type} has no decoder that can be run without its head")
    return decoder


def find_row_limit(config: PreTrainedConfig) -> RowLimit | None:
    """Return the longest row for which a score depends on the row alone; None without such a limit."""
    config = config.get_text_config()
    limits = [
        RowLimit(int(count), f"each query attends to {count} keys that a learned index selects ({name})")
        for name in _SELECTED_KEYS
        if isinstance(count := read_setting(config, name), int)
    ]
    if "minimax_m3_sparse" in (read_setting(config, "layer_types") or ()):
        count = config.index_topk_blocks * config.index_block_size
        limits.append(RowLimit(count, f"each query attends to {count} keys in blocks that an index selects"))
    positions = read_setting(config, "max_position_embeddings")
    if positions is not None and any("dynamic" in rope["rope_type"] for rope in _list_ropes(config)):
        reason = "dynamic rotary positions change with the longest row that was seen"
        limits.append(RowLimit(int(positions), reason))
    return min(limits, default=None)


def find_rope_switch(config: PreTrainedConfig) -> int | None:
    """Return the length beyond which rows use other rotary frequencies (LongRoPE); None if there is none.

    The model chooses the frequencies of a whole batch by its longest row.
    """
    lengths = [
        rope["original_max_position_embeddings"]
        for rope in _list_ropes(config.get_text_config())
        if rope["rope_type"] == "longrope"
    ]
    return min(map(int, lengths), default=None)


def explain_row_dependence(model: PreTrainedModel) -> str | None:
    """Return why the config rules out several responses in one row; None if it does not."""
    config = model.config.get_text_config()
    kind = config.model_type
    if kind not in CONFIG_MAPPING_NAMES:
        return f"{kind} is not one of transformers' own architectures, so what its layers read is unknown"
    layers = set(read_setting(config, "layer_types") or ()) - _FULL_ATTENTION
    if layers:
        return f"{kind} has layers of type {', '.join(sorted(layers))}"
    if (window := _find_window(config)) is not None:
        return f"{kind} has a sliding window of {window} tokens"
    if getattr(model, "_is_stateful", False):
        return f"{kind} is recurrent: its state runs through the whole row"
    if kind in _ALIBI or read_setting(config, "alibi"):
        return f"{kind} has ALiBi attention, whose bias counts columns, not positions"
    if scaled := [r["rope_type"] for r in _list_ropes(config) if r["rope_type"] in ("dynamic", "longrope")]:
        return f"{kind} scales its rotary positions by the row's length ({scaled[0]})"
    if (limit := find_row_limit(config)) is not None:
        return f"{kind}: {limit.reason}"
    if model.config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
        return f"attention {model.config._attn_implementation} takes no block mask"
    return None


class ModelSizes(NamedTuple):
    """Weights that a token uses in the body and in the head; heads x head width, summed over layers."""

    body: float
    head: float
    attention: float

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> "ModelSizes":
        """Count the weights of a model by its layers' features, which also holds for quantised ones."""
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        experts = read_setting(config, "num_experts") or read_setting(config, "num_local_experts") or 1
        share = (read_setting(config, "num_experts_per_tok") or 1) / experts
        body = 0.0
        for name, module in model.named_modules():
            if module is head or isinstance(module, nn.Embedding):
                continue
            for key, weight in module.named_parameters(recurse=False):
                if weight.dim() < 2:
                    continue
                dense = isinstance(module, (nn.Linear, Conv1D)) and key == "weight"
                size = _count_layer_weights(module) if dense else weight.numel()
                body += size * (share if ".experts" in name else 1.0)
        layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else None
        widths = [_read_attention_width(layer) for layer in layers or [config]]
        attention = sum(widths) if layers else widths[0] * config.num_hidden_layers
        return cls(body, float(_count_layer_weights(head)), float(attention))


def _find_window(config: PreTrainedConfig) -> int | None:
    """Return the width of a window that some layer attends within, if the config names one."""
    if read_setting(config, "use_sliding_window") is False:
        return None
    names = [name for name in config.to_dict() if _WINDOW.search(name)]
    widths = [width for name in names if isinstance(width := read_setting(config, name), int) and width > 0]
    return min(widths, default=None)


def _list_ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the settings of rotary positions: one for the model, or one for each kind of layer."""
    settings = read_setting(config, "rope_parameters") or {}
    ropes = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    return [rope for rope in ropes if rope.get("rope_type")]


def _read_attention_width(config: PreTrainedConfig) -> int:
    heads = read_setting(config, "num_attention_heads") or 0  # a purely recurrent model has none
    return heads * (read_setting(config, "head_dim") or (config.hidden_size // heads if heads else 0))


def _count_layer_weights(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return sum(p.numel() for p in layer.parameters() if p.dim() >= 2)
