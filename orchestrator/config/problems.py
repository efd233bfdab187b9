"""Turn validation errors of a run or sweep file into messages: file, field, problem, remedy."""

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from losses.settings import UnknownFieldError
from orchestrator.config.sections import Section
from orchestrator.errors import UsageError, did_you_mean
from orchestrator.redaction import shorten_input
from preferences.config import SourceConfig

_LENGTHS = "set data.max_length for prompt and response together, data.max_prompt_length for the prompt"
_ADAPTER = "set policy.adapter, such as {r: 16, alpha: 32}"
_FIELDS_OF_TRL = {
    "activation_offloading": "set training.gradient_checkpointing: true to save the memory of activations",
    "beta": "set loss.beta",
    "bf16": "set training.precision: bfloat16; auto means it on a GPU",
    "dataset_name": "set data.train to a hub id or a file",
    "eval_steps": "set evaluation.every_steps",
    "fp16": "set training.precision: bfloat16, as policies do not train in float16",
    "gradient_accumulation_steps": "set training.pairs_per_step to the pairs of a whole step; "
    "training.tokens_per_microbatch is what a worker takes at a time",
    "gradient_checkpointing": "set training.gradient_checkpointing",
    "label_smoothing": "set loss.link.flip_probability of preset robust_dpo, or loss.link.label_smoothing of "
    "exo; preset cdpo reads a label per pair instead",
    "learning_rate": "set training.learning_rate",
    "load_in_4bit": "set policy.quantization: 4bit",
    "load_in_8bit": "set policy.quantization: 8bit",
    "logging_steps": "leave it out: every step is logged",
    "lora_alpha": "set policy.adapter.alpha",
    "lora_dropout": "set policy.adapter.dropout",
    "lora_r": "set policy.adapter.r",
    "lora_target_modules": "set policy.adapter.target_modules",
    "loss_type": "set loss.preset, which takes TRL's names too",
    "loss_weights": "set loss.sft_weight for supervised fine-tuning beside a loss, as preset rpo does",
    "lr_scheduler_type": "set training.schedule",
    "max_completion_length": _LENGTHS,
    "max_grad_norm": "set training.clip_norm",
    "max_length": _LENGTHS,
    "max_prompt_length": _LENGTHS,
    "max_steps": "set training.max_steps",
    "model_name_or_path": "set policy.model",
    "num_train_epochs": "set training.epochs",
    "output_dir": "set name and storage_path; a run's files are in <storage_path>/<name>",
    "peft_config": _ADAPTER,
    "per_device_eval_batch_size": "set training.tokens_per_microbatch, in tokens",
    "per_device_train_batch_size": "set training.pairs_per_step to the pairs of a step over all workers",
    "precompute_ref_log_probs": "set references.mode: precompute",
    "ref_model": "set references.models, by name, and references.primary",
    "reference_free": "set loss.references: {combine: none}",
    "report_to": "set tracking.uri to an MLflow server",
    "run_name": "set name, at the top of the file",
    "save_steps": "set training.save_every",
    "save_total_limit": "set training.keep_last",
    "simpo_gamma": "set loss.margin to gamma / beta",
    "use_peft": _ADAPTER,
    "warmup_ratio": "set training.warmup",
    "warmup_steps": "set training.warmup to a share of all steps",
    "weight_decay": "set training.weight_decay",
}
"""The remedy for each setting of TRL that a run file has under another name or in another section."""


def explain_validation_error(error: ValidationError, *, source: str, model: type[BaseModel]) -> str:
    """Format a file's validation error, one line per problem: file, field, problem, remedy.

    Args:
        error: the error of pydantic.
        source: the file, as messages name it.
        model: the config class that the file was validated as.
    """
    lines = []
    for problem in error.errors(include_url=False):
        # A member of a union is named by its type, such as `tuple[SourceConfig, ...]`.
        field = ".".join(str(part) for part in problem["loc"] if "[" not in str(part)) or "the file"
        message = problem["msg"].removeprefix("Value error, ")
        unknown = _find_unknown_field(problem)
        if unknown in _FIELDS_OF_TRL:
            message = f"unknown field {unknown!r}; {_FIELDS_OF_TRL[unknown]}"
        elif problem["type"] == "extra_forbidden":
            message = "unknown field" + did_you_mean(
                str(problem["loc"][-1]), _list_sibling_fields(problem["loc"], model)
            )
        elif problem["type"] == "missing":
            message = "is required and missing"
        elif problem["type"] != "value_error" and not isinstance(problem["input"], dict | list):
            message += f", got {shorten_input(repr(problem['input']))}"
        lines.append(f"{source}: {field}: {message}")
    return "\n".join(lines)


def build_source(option: str, **settings: Any) -> SourceConfig:
    """Build the settings of a source that an option or argument names.

    Raises:
        UsageError: they cannot be meant; names the `option`.
    """
    try:
        return SourceConfig(**settings)
    except ValidationError as error:
        raise UsageError(explain_validation_error(error, source=option, model=SourceConfig)) from None


def refuse_booleans(content: Any, parsed: Any, *, source: str, field: str = "") -> None:
    """Refuse `true` or `false` where a number belongs, which pydantic would read as 1 or 0.

    Args:
        content: what the file says.
        parsed: what it was read as.
        source: the file, as messages name it.
        field: the field of `content`.

    Raises:
        UsageError: one of these is a number now.
    """
    if isinstance(content, bool) and isinstance(parsed, int | float) and not isinstance(parsed, bool):
        raise UsageError(f"{source}: {field}: must be a number, got {str(content).lower()}; write the number")
    if isinstance(content, Mapping) and isinstance(parsed, tuple):  # a single source, or weights by name
        content = [content] if isinstance(parsed[0], BaseModel) else list(content.values())
    if isinstance(content, Mapping) and isinstance(parsed, Mapping | BaseModel):
        get = parsed.get if isinstance(parsed, Mapping) else lambda name: getattr(parsed, str(name), None)
        pairs = [(name, inner, get(name)) for name, inner in content.items()]
    elif isinstance(content, list | tuple) and isinstance(parsed, list | tuple):
        pairs = [(number, *both) for number, both in enumerate(zip(content, parsed, strict=False))]
    else:
        return
    for name, inner, value in pairs:
        refuse_booleans(inner, value, source=source, field=f"{field}.{name}" if field else str(name))


def _find_unknown_field(problem: ErrorDetails) -> str | None:
    """Return the name of the unknown field that a problem is about; None if it is about something else."""
    if problem["type"] == "extra_forbidden":
        return str(problem["loc"][-1])
    error = problem.get("ctx", {}).get("error")
    return error.field if isinstance(error, UnknownFieldError) else None


def _list_sibling_fields(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """List the known fields of the section that has an unknown field at `location`."""
    section: Any = model
    for part in location[:-1]:
        if get_origin(section) is dict:
            section = get_args(section)[1]
        elif str(part) in _find_model_class(section).model_fields:  # else the name of a union's member
            section = _find_model_class(section).model_fields[str(part)].annotation
    return list(_find_model_class(section).model_fields)


def _find_model_class(annotation: Any) -> type[BaseModel]:
    """Return the pydantic model in an annotation such as `LossConfig | None`, else `Section`."""
    members = (annotation, *get_args(annotation))
    return next(
        (member for member in members if isinstance(member, type) and issubclass(member, BaseModel)), Section
    )
