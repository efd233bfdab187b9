"""Load a text classifier, such as a reward model."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from models.config import ModelConfig, ModelError
from models.locate import ModelFiles, get_first_error_line


def load_classifier(files: ModelFiles, config: ModelConfig, *, dtype: Any = "auto") -> PreTrainedModel:
    """Load a classifier in eval mode; its weights are read from safetensors alone.

    Args:
        files: its files.
        config: its settings.
        dtype: of its weights; auto: as they are stored.

    Raises:
        ModelError: the files are no whole model, cannot be loaded, or are no classifier.
    """
    if files.kind != "folder":
        raise ModelError(f"{config.model} is no whole model; merge the adapter, or give another model")
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            files.path, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"{config.model} could not be loaded: {get_first_error_line(error)}") from error
    if loaded["missing_keys"]:
        raise ModelError(
            f"{config.model} is no classifier: it has no weights {min(loaded['missing_keys'])}; give a "
            "model that was trained for sequence classification"
        )
    return model.eval()
