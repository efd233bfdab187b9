"""LoRA adapters: add, disable, merge and find them."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from models.config import LoraSettings, ModelError


def add_lora(model: PreTrainedModel, settings: LoraSettings, *, seed: int = 0) -> PeftModel:
    """Freeze `model` and add a trainable LoRA adapter to it, in place.

    Adapter weights are float32 whatever the base's dtype; A is drawn from `seed` alone and B is zero, so the
    policy starts as exactly its base. Raises ModelError where the model has an adapter already, and where no
    module matches `target_modules`.
    """
    if isinstance(model, PeftModel):
        raise ModelError(
            "the model already carries an adapter; merge it first (models.adapters.merge_adapter)"
        )
    targets = settings.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
    )
    with torch.random.fork_rng(), silence_known_warnings():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            names = sorted(
                {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            )
            raise ModelError(
                f"adapter.target_modules {targets!r} does not fit {model.config.model_type}: {error}; "
                f"its linear layers are {', '.join(names)}, or use all-linear"
            ) from error


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run `model` (a PeftModel, or a module that contains one: a Scorer, a DDP wrapper) as its frozen base.

    Inside the context dropout is off as well and no gradient is recorded; modes are restored afterwards.
    The frozen base is the policy's start; a model without adapter has nothing to disable and raises
    ModelError.
    """
    peft = find_adapter(model)
    if peft is None:
        raise ModelError(
            "a reference with model: policy is the policy without its adapter, and this policy has none; "
            "add policy.adapter: {r: 16}, or name the start as a model of its own under references.models"
        )
    training = [m for m in peft.modules() if m.training]
    peft.eval()
    try:
        with torch.no_grad(), peft.disable_adapter():
            yield
    finally:
        for module in training:
            module.training = True


def merge_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Add the adapter's product to the weights, in place; return a model without adapter unchanged."""
    return model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model


def describe_reach(model: PeftModel) -> str:
    """Say which modules of a model have an adapter, and which kinds of weights stay frozen without one."""
    causal: PreTrainedModel = model.get_base_model()
    wrapped = {name: part for name, part in causal.named_modules() if isinstance(part, BaseTunerLayer)}
    ends = (causal.get_input_embeddings(), causal.get_output_embeddings())
    reached = {id(w) for part in (*wrapped.values(), *ends) if part is not None for w in part.parameters()}
    frozen: Counter[str] = Counter()
    for name, weight in causal.named_parameters():
        owner, _, key = name.rpartition(".")
        if weight.dim() >= 2 and id(weight) not in reached:
            frozen[f"{type(causal.get_submodule(owner)).__name__}.{key}"] += weight.numel()
    names = sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in wrapped})
    text = f"adapter on {len(wrapped)} modules ({', '.join(names)})"
    if not frozen:
        return text
    share = frozen.total() / sum(weight.numel() for weight in causal.parameters() if weight.dim() >= 2)
    kinds = ", ".join(kind for kind, _ in frozen.most_common(4)) + (", ..." if len(frozen) > 4 else "")
    return f"{text}; none on {kinds}: {100 * share:.0f} % of the weights stay frozen without one"


@contextmanager
def silence_known_warnings() -> Iterator[None]:
    """Silence PEFT's warnings about its own code and about GPT-2's layers, which it handles itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        yield


def find_adapter(model: nn.Module) -> PeftModel | None:
    """Return the PeftModel that `model` is or contains; None if there is no adapter."""
    return next((m for m in model.modules() if isinstance(m, PeftModel)), None)
