"""Turn validation errors of a run or sweep file into messages: file, field, problem, remedy."""

from collections.abc import Mapping
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from losses.settings import UnknownFieldError
from orchestrator.config.fields import ANY_NUMBER, FileField, find_fields_by_name, list_fields
from orchestrator.config.other_trainers import BY_NAME
from orchestrator.config.sections import Section
from orchestrator.errors import UsageError, did_you_mean
from orchestrator.redaction import shorten_input
from preferences.config import SourceConfig


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
        if unknown is not None:
            message = _explain_unknown_field(unknown, problem, model)
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


def _explain_unknown_field(name: str, problem: ErrorDetails, model: type[BaseModel]) -> str:
    """Say what a field may mean that its section does not have: another trainer's, a typo, another place."""
    # An unknown field of the loss is reported for its section, and so not named by the place.
    unknown = "unknown field" if problem["loc"][-1:] == (name,) else f"unknown field {name!r}"
    counterpart = BY_NAME.get(name)
    if counterpart and all(field.partition(".")[0] in model.model_fields for field in counterpart.fields):
        return f"{unknown}; {counterpart.remedy}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = unknown + did_you_mean(name, _list_sibling_fields(problem["loc"], model))
    elsewhere = [field.path for field in find_fields_by_name(_list_model_fields(model), name)]
    if "did you mean" not in message and len(elsewhere) == 1 and f".{ANY_NUMBER}." not in elsewhere[0]:
        return f"{unknown}; set {elsewhere[0]}"
    return f"{unknown}; in the run file, {counterpart.remedy}" if counterpart else message


@cache
def _list_model_fields(model: type[BaseModel]) -> list[FileField]:
    return list_fields(model.model_json_schema())


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
