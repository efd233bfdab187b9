"""Check that a model's files fit together, from its configs and the headers of its weights."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from models.adapters import silence_known_warnings
from models.architecture import read_setting
from models.config import ModelConfig, ModelError
from models.load import read_model_limits
from models.locate import ModelFiles
from models.weight_files import get_first_error_line, list_weight_files, read_shapes


def verify_weights(files: ModelFiles, config: ModelConfig, *, is_classifier: bool = False) -> int | None:
    """Refuse weights that are not those of the config, and an adapter that does not fit its base.

    Args:
        files: the model's files.
        config: its settings.
        is_classifier: whether it is loaded as a text classifier instead of a language model.

    Returns:
        How many token ids the model has; None for models that are not looked at: GGUF files, those with code
        of their own, and those stored quantised.

    Raises:
        ModelError: the message names what does not fit, and the remedy.
    """
    base = files.base_path or files.path
    if is_classifier and files.kind != "folder":
        raise ModelError(f"{config.model} is no whole model; merge the adapter, or give another model")
    with _quiet_transformers():
        read_model_limits(files, config)
        if not base.is_dir() or base in files.trusted:
            return None
        settings = AutoConfig.from_pretrained(base)
        if read_setting(settings, "quantization_config") is not None:
            return None
        stored = read_shapes(list_weight_files(base))
        layers = read_setting(settings.get_text_config(), "num_hidden_layers")
        if isinstance(layers, int) and not 1 <= layers <= len(stored):
            raise ModelError(
                f"{config.model}: config.json has {layers} layers (num_hidden_layers), and the weights are "
                f"{len(stored)} tensors; correct config.json, or copy the model again"
            )
        model = _load_without_values(files, config, is_classifier)
        if files.kind == "adapter":
            _refuse_foreign_adapter(model, files, config)
    return int(model.get_input_embeddings().weight.shape[0])


def verify_vocabulary(tokenizer: PreTrainedTokenizerBase, token_ids: int | None, config: ModelConfig) -> None:
    """Refuse a tokenizer with more tokens than the model has; tokens added to it later do not count.

    Raises:
        ModelError: the message names both numbers.
    """
    if token_ids is not None and tokenizer.vocab_size > token_ids:
        raise ModelError(
            f"{config.model}: the tokenizer has {tokenizer.vocab_size} tokens and the model {token_ids}; use "
            "the tokenizer that belongs to the model"
        )


def read_class_names(files: ModelFiles) -> dict[int, str]:
    """Read the names of a text classifier's outputs by index; one that `verify_weights` has not refused."""
    with _quiet_transformers():
        return dict(AutoConfig.from_pretrained(files.path).id2label)


def _load_without_values(files: ModelFiles, config: ModelConfig, is_classifier: bool) -> PreTrainedModel:
    """Load the model onto the meta device, where weights have names and shapes only."""
    base = files.base_path or files.path
    kind = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    try:
        model, found = kind.from_pretrained(
            base,
            use_safetensors=True,
            dtype="auto",
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers hardly checks a config, and what then fails may be anything
        raise ModelError(
            f"{config.model}: {base / 'config.json'} makes no model ({type(error).__name__}: "
            f"{get_first_error_line(error)}); correct it, or copy the model again"
        ) from error
    if found["mismatched_keys"]:
        name, stored, expected = min(found["mismatched_keys"])
        raise ModelError(
            f"{config.model}: {name} has the shape {list(stored)} in {base}, and {list(expected)} by its "
            "config.json; copy both from the same model"
        )
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        if is_classifier:
            raise ModelError(
                f"{config.model} is no classifier: it has no weights {names[0]}; give a model that was "
                "trained for sequence classification"
            )
        raise ModelError(
            f"{config.model}: {len(names)} weights are missing from {base}, such as {names[0]}; they would "
            "be random. Give a complete model (an adapter must be merged before it is saved whole)"
        )
    loaded: PreTrainedModel = model
    return loaded


def _refuse_foreign_adapter(base: PreTrainedModel, files: ModelFiles, config: ModelConfig) -> None:
    """Refuse an adapter whose weights are not those that its config puts into the base."""
    stored = read_shapes([files.path / "adapter_model.safetensors"])
    try:
        with torch.device("meta"), silence_known_warnings():
            model = get_peft_model(base, PeftConfig.from_pretrained(str(files.path)))
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
    except Exception as error:  # PEFT checks its config no more than transformers does
        raise ModelError(
            f"adapter {config.model} does not fit its base {files.base_path}: {get_first_error_line(error)}; "
            "give the base it was trained on as base: <model>"
        ) from error
    expected = {name: tuple(weight.shape) for name, weight in state.items()}
    remedy = "save the adapter again, or give the base it was trained on as base: <model>"
    if missing := expected.keys() - stored.keys():
        raise ModelError(
            f"adapter {config.model} lacks {len(missing)} weights that its config requires, such as "
            f"{min(missing)}; {remedy}"
        )
    if foreign := [name for name in stored.keys() - expected.keys() if ".lora_" in name]:
        raise ModelError(
            f"adapter {config.model} has {len(foreign)} weights for which its base {files.base_path} has no "
            f"module, such as {min(foreign)}; {remedy}"
        )
    for name, shape in expected.items():
        if stored[name] != shape:
            raise ModelError(
                f"adapter {config.model}: {name} has the shape {list(stored[name])}, and its base "
                f"{files.base_path} takes {list(shape)}; {remedy}"
            )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence what transformers prints of a model, which a refusal says in one line."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
