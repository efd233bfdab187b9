"""Turn validation errors of a run or sweep file into messages: file, field, problem, remedy."""

from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from orchestrator.config.sections import Section
from orchestrator.errors import did_you_mean
from orchestrator.redaction import redact


def explain_validation_error(error: ValidationError, *, source: str, model: type[BaseModel]) -> str:
    """Format a file's validation error, one line per problem: file, field, problem, remedy.

    Args:
        error: the error of pydantic.
        source: the file, as messages name it.
        model: the config class that the file was validated as.
    """
    lines = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"]) or "the file"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown field" + did_you_mean(
                str(problem["loc"][-1]), _list_sibling_fields(problem["loc"], model)
            )
        elif problem["type"] == "missing":
            message = "is required and missing"
        elif problem["type"] != "value_error" and not isinstance(problem["input"], dict | list):
            message += f", got {redact(repr(problem['input']))}"
        lines.append(f"{source}: {field}: {message}")
    return "\n".join(lines)


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
