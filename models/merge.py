"""Merging a trained adapter into unquantised weights, and choosing the dtype that they are saved in."""

import copy

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.adapters import merge_adapter, silence_known_warnings
from models.logprobs import get_causal_model
from models.probe import LogitProbe, compute_probe_logits


def copy_in_float32(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Copy a model with its adapter to the CPU in float32, quantised layers dequantised.

    An adapter on a quantised base was trained over the values that its layers dequantise to, so these are
    what it is merged into. The base's original weights differ from them by the quantisation error, which is
    larger than what training changes: on SmolLM2-135M in 4 bits, original weights plus adapter are 0.54 nats
    per token from the trained model, the untrained model 0.07, and dequantised weights plus adapter 1e-11.

    `model` is not changed. Weights that are float32 on the CPU already are shared with it until one of the
    two replaces them, as merging does.
    """
    plain = _copy_causal_model(get_causal_model(model))
    if not isinstance(model, PeftModel):
        return plain
    with silence_known_warnings():
        adapted = get_peft_model(plain, copy.deepcopy(model.active_peft_config))
    # Not model.state_dict(), by which fully_shard would split the weights again.
    adapter = get_peft_model_state_dict(model, dict(model.named_parameters()), save_embedding_layers=False)
    set_peft_model_state_dict(adapted, adapter)
    return adapted.eval()


def merge_and_round(
    model: PreTrainedModel | PeftModel,
    exact: PreTrainedModel | PeftModel,
    probe: LogitProbe,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Merge the adapter of a model in float32 and round the sum to the dtype that the policy computes in.

    It stays float32 where rounding would make it another model than `probe` was taken from: a small change is
    lost in half-precision weights.

    Args:
        model: the trained model.
        exact: its copy by `copy_in_float32`, which is changed in place.
        probe: the trained model's.
        dtype: that the policy computes in.
    """
    merged = merge_adapter(exact)
    if dtype == torch.float32:
        return merged
    _cast_weights(merged, dtype)
    _cast_weights(merged, torch.float32)
    if probe.find_fault(compute_probe_logits(merged, probe.rows), dtype) is not None:
        return merge_adapter(copy_in_float32(model))
    _cast_weights(merged, dtype)
    return merged


def _copy_causal_model(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model without its adapter to the CPU, in float32 and unquantised."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = None  # the architecture's own choice: flex is no kernel for a CPU
    with init_empty_weights(include_buffers=False):
        plain: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32)
    weights = {}
    for name in plain.state_dict():
        owner, _, key = name.rpartition(".")
        weights[name] = _read_weight(model.get_submodule(owner), key, plain.get_submodule(owner))
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config, plain.name_or_path = model.generation_config, model.name_or_path
    return plain.requires_grad_(False).eval()


def _read_weight(module: nn.Module, key: str, plain: nn.Module) -> Tensor:
    """Return a weight or buffer of `module` as float32 on the CPU, laid out as in its counterpart `plain`."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    value: Tensor = getattr(module, key)
    if get_bnb_param_type(value):
        value = dequantize_bnb_weight(value, state=getattr(module, "state", None))
        if isinstance(plain, Conv1D):  # bitsandbytes' layers hold its weight transposed
            value = value.T.contiguous()
    value = value.detach().cpu()
    return value.float() if value.is_floating_point() else value


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights in place, and not the buffers: rotary frequencies stay float32 in any model."""
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
