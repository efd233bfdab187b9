"""Load the model and the tokenizer of a `ModelConfig`, and write a model to a folder.

`locate_model` finds (or downloads) the files and refuses models that cannot work before any weight is read;
the other functions load the files that it found. Weights are read only from safetensors or GGUF.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models.adapters import add_lora, describe_reach, merge_adapter, silence_known_warnings
from models.architecture import find_row_limit, read_setting
from models.chat_template import read_chat_template
from models.config import ModelConfig, ModelError, PolicyConfig
from models.locate import ModelFiles, get_first_error_line, locate_model

__all__ = ["ModelFiles", "export_model", "load_model", "load_tokenizer", "locate_model"]

_ATTENTION = {"auto": None, "sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}


def load_tokenizer(files: ModelFiles, config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer (an adapter's own, else its base's), with `config.chat_template` if set."""
    places = [p for p in (files.path, files.base_path) if p is not None]
    if files.kind == "adapter" and not any(files.path.glob("tokenizer*")):
        places.pop(0)
    place = places[0]
    source, arguments = _name_source(files, place)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
        _check_tokenizer(tokenizer)
    except Exception as error:  # the tokenizers library raises bare Exception
        remedy = "put its files (tokenizer.json, tokenizer_config.json) beside the weights"
        raise ModelError(
            f"{config.model}: no tokenizer could be loaded from {source} ({get_first_error_line(error)}); "
            + (_suggest_trust(files, config, place) or remedy)
        ) from error
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse settings of the wrong type, which transformers takes as they are; raises ValueError."""
    for name, kinds in (("chat_template", str | dict | None), ("model_max_length", int | float)):
        if not isinstance(value := getattr(tokenizer, name), kinds):
            raise ValueError(f"its {name} is {value!r:.80}")


def load_model(
    files: ModelFiles,
    config: ModelConfig,
    *,
    device: torch.device | str,
    trainable: bool,
    seed: int = 0,
    activation_checkpointing: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load the model onto `device`.

    Frozen: no gradients, eval mode, the dtype that `config` gives for the device; an adapter folder gives a
    PeftModel.

    Trainable: train mode, the model's own dropout off (the policy must start as its own reference). With
    `PolicyConfig.adapter` the base is frozen in its dtype behind a new float32 LoRA drawn from `seed`;
    without, every weight is a float32 master (`models.parallel` casts it to the dtype that it computes in).
    An adapter folder is merged first: the policy starts as base plus adapter. `activation_checkpointing`
    trades time for memory.

    Raises ModelError for weights that are missing from the files or are not finite, and if quantisation does
    not run on this machine.
    """
    device = torch.device(device)
    lora = config.adapter if trainable and isinstance(config, PolicyConfig) else None
    full_training = trainable and lora is None
    _check_device(config, device, trainable)
    dtype = torch.float32 if full_training else getattr(torch, config.resolve_dtype(device.type))
    model: PreTrainedModel | PeftModel = _load_base(files, config, device, dtype)
    if files.kind == "adapter":
        model = _load_adapter(model, files, config)
    _refuse_non_finite_weights(model, config)
    if not trainable:
        return model.requires_grad_(False).eval()
    if files.kind == "adapter":
        if config.quantization != "none":
            raise ModelError(
                f"{config.model}: an adapter cannot be merged into a quantised base without loss before "
                "training; set quantization: none, or export base and adapter as one model first"
            )
        model = merge_adapter(model)
    _disable_dropout(model)
    if activation_checkpointing:
        _enable_activation_checkpointing(model)
    if lora is not None:
        return add_lora(model, lora, seed=seed).train()
    return model.requires_grad_(True).train()


def export_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str
) -> Path:
    """Write a model (or an adapter alone) with its tokenizer as safetensors and JSON; return the folder.

    Files appear under their final names only when complete; weights of an earlier export there are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        if isinstance(model, PeftModel):
            model.save_pretrained(scratch, save_embedding_layers=False)
        else:
            model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        new = {p.name for p in Path(scratch).iterdir()}
        for name in sorted(new):
            (Path(scratch) / name).replace(folder / name)
    for stale in folder.glob("*.safetensors*"):
        if stale.name not in new:
            stale.unlink()
    return folder


def _check_device(config: ModelConfig, device: torch.device, trainable: bool) -> None:
    if device.type != "cpu":
        return
    # With a GPU, the model may be here only to be sharded onto it; `models.parallel.prepare_parallel` checks
    # again.
    if config.attention == "flex" and not torch.cuda.is_available():
        raise ModelError(
            f"{config.model}: attention: flex has no backward pass on a CPU; set attention: sdpa, or run on "
            "a GPU"
        )
    # After one forward pass in eval mode bitsandbytes' CPU kernels no longer pass gradients on.
    if trainable and config.quantization != "none":
        raise ModelError(
            f"{config.model}: a quantised policy trains on a GPU only; set quantization: none, or run on a "
            "GPU with parallel.strategy: ddp (quantised weights cannot be split over workers)"
        )


def _load_base(
    files: ModelFiles, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    path = files.base_path if files.kind == "adapter" else files.path
    assert path is not None
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": path in files.trusted,
        "output_loading_info": True,
    }
    if _ATTENTION[config.attention] is not None:
        arguments["attn_implementation"] = _ATTENTION[config.attention]
    if config.quantization != "none":
        arguments["quantization_config"] = _build_quantization_config(config, dtype)
    if path.suffix == ".gguf":
        arguments["gguf_file"], source = path.name, path.parent
    else:
        arguments["use_safetensors"], source = True, path
        # Load directly onto the device: a large model may not fit into main memory, a quantised one cannot be
        # moved.
        if device.type != "cpu" or config.quantization != "none":
            arguments["device_map"] = {"": device}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, **arguments)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{config.model} could not be loaded from {path}: {get_first_error_line(error)}"
        ) from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ModelError(
            f"{config.model}: {len(names)} weights are missing from {path}, such as {names[0]}; "
            "they would be random. Give a complete model (an adapter must be merged before it is saved whole)"
        )
    if path.suffix == ".gguf":
        model = _copy_without_gguf(model, dtype)
    if config.quantization == "none":
        return model.to(device)
    _check_quantized(model, config)
    return model


def _check_quantized(model: PreTrainedModel, config: ModelConfig) -> None:
    """Run three tokens: only a run shows whether the kernels support this device and these shapes."""
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 3, dtype=torch.long, device=model.device))
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{config.model}: quantization {config.quantization} does not run on {model.device.type} here "
            f"({get_first_error_line(error)}); set quantization: none, or run on another device"
        ) from error


def _copy_without_gguf(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Copy the weights into a model that can be saved: transformers saves no model read from GGUF."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config).from_dict(settings)
    plain = type(model)._from_config(
        config, dtype=dtype, attn_implementation=model.config._attn_implementation
    )
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _build_quantization_config(config: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    try:
        import bitsandbytes  # noqa: F401  (transformers' own message comes late and hides the reason)
    except (ImportError, RuntimeError, OSError) as error:
        raise ModelError(
            f"{config.model}: quantization {config.quantization} needs bitsandbytes, which does not import "
            f"here ({get_first_error_line(error)}); install polyref[quantization], or set quantization: none"
        ) from error
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _load_adapter(base: PreTrainedModel, files: ModelFiles, config: ModelConfig) -> PeftModel:
    try:
        with silence_known_warnings(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # raised below
            model = PeftModel.from_pretrained(base, str(files.path), torch_device=str(base.device))
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"adapter {config.model} does not fit its base {files.base_path}: {get_first_error_line(error)}; "
            "give the base it was trained on as base: <model>"
        ) from error
    with safe_open(files.path / "adapter_model.safetensors", framework="pt") as file:
        missing = set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(file.keys())
    if missing:
        raise ModelError(
            f"adapter {config.model} lacks {len(missing)} weights that its config requires, such as "
            f"{min(missing)}; save the adapter again, or give the base it was trained on as base: <model>"
        )
    return model


def _refuse_non_finite_weights(model: nn.Module, config: ModelConfig) -> None:
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ModelError(
                f"{config.model}: the weight {name} has values that are not finite, so every score would be "
                "NaN; copy or download the model again, or take another checkpoint"
            )


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of the model to 0; its config is not changed."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def _enable_activation_checkpointing(model: PreTrainedModel) -> None:
    # transformers renamed this during version 5.
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _name_source(files: ModelFiles, place: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the arguments with which transformers reads what lies at one of the paths."""
    arguments: dict[str, Any] = {"trust_remote_code": place in files.trusted}
    if place.suffix == ".gguf":
        return place.parent, {**arguments, "gguf_file": place.name}
    return place, arguments


def _suggest_trust(files: ModelFiles, config: ModelConfig, place: Path) -> str | None:
    """Say what to do where a model could not be read because code of its own was not run."""
    settings = [place / name for name in ("config.json", "tokenizer_config.json")]
    has_code = any(b"auto_map" in file.read_bytes() for file in settings if file.is_file())
    if not has_code or place in files.trusted:
        return None
    if config.trust_remote_code:
        return (
            "its base brings code of its own, which trust_remote_code does not cover where only the adapter "
            "names the base: read the code, then name the base as base: <model> if you trust it"
        )
    named = (
        "base: <model> and trust_remote_code: true" if place == files.base_path else "trust_remote_code: true"
    )
    return f"it brings code of its own: read it, then set {named} if you trust it"


def build_empty_model(files: ModelFiles, config: ModelConfig) -> PreTrainedModel:
    """Build a model on the meta device: names and shapes of its weights, and no values.

    Raises ModelError where its config cannot be read, or its architecture is unknown.
    """
    source, arguments = _name_source(files, files.base_path or files.path)
    try:
        settings = AutoConfig.from_pretrained(source, **arguments)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                settings, trust_remote_code=arguments["trust_remote_code"]
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{config.model}: its weights cannot be counted: {get_first_error_line(error)}"
        ) from error
    return model


def describe_training(files: ModelFiles, config: PolicyConfig) -> list[str]:
    """Say what training a policy does not reach: weights without an adapter, and a router's own loss.

    Raises ModelError where the adapter does not fit the model.
    """
    model, lines = build_empty_model(files, config), []
    text = model.config.get_text_config()
    if config.adapter is not None:
        with torch.device("meta"):
            lines.append(describe_reach(add_lora(model, config.adapter)))
    if read_setting(text, "router_aux_loss_coef"):
        lines.append(
            f"{text.model_type} routes tokens to experts, and its router's auxiliary loss (coefficient "
            f"{text.router_aux_loss_coef:g}) is not part of the training: watch that experts stay in use, or "
            "train an adapter that leaves the router alone"
        )
    return lines


class ModelLimits(NamedTuple):
    """What a model accepts.

    positions:  the longest row that it can score by itself: its positions, or less where scores depend on
                other rows beyond a length; None without a limit.
    vocabulary: the number of its token ids; None if its config names none.
    """

    positions: int | None
    vocabulary: int | None


def read_model_limits(files: ModelFiles, config: ModelConfig) -> ModelLimits:
    """Read from the model's config which rows and token ids it accepts.

    Raises ModelError for an architecture that transformers does not have, or that comes with its own code.
    """
    place = files.base_path or files.path
    source, arguments = _name_source(files, place)
    try:
        settings = AutoConfig.from_pretrained(source, **arguments).get_text_config()
    except Exception as error:  # transformers hardly checks a config, and what then fails may be anything
        remedy = "use a causal language model that the installed transformers knows"
        raise ModelError(
            f"{config.model}: its config.json is of no known architecture ({get_first_error_line(error)}); "
            + (_suggest_trust(files, config, place) or remedy)
        ) from error
    row_limit = find_row_limit(settings)
    limits = [read_setting(settings, "max_position_embeddings"), row_limit and row_limit.tokens]
    # XLNet says -1 for no limit.
    positions = min((int(limit) for limit in limits if limit is not None and limit != -1), default=None)
    if positions is not None and positions < 1:
        raise ModelError(
            f"{config.model}: its config.json has {positions} positions (max_position_embeddings), which no "
            "text fits into; correct it, or copy the model again"
        )
    vocabulary = read_setting(settings, "vocab_size")
    return ModelLimits(positions, None if vocabulary is None else int(vocabulary))
