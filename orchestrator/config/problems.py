"""Validation errors of a file as messages: file, field, what is wrong, what would be right."""

from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from orchestrator.config.sections import Section
from orchestrator.errors import did_you_mean


def explain_validation_error(error: ValidationError, *, source: str, of: type[BaseModel]) -> str:
    """A file's validation error, one line per problem: file, field, what is wrong, what would be right."""
    lines = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"]) or "the file"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown field" + did_you_mean(
                str(problem["loc"][-1]), _list_sibling_fields(problem["loc"], of)
            )
        elif problem["type"] == "missing":
            message = "is required and missing"
        elif problem["type"] != "value_error" and not isinstance(problem["input"], dict | list):
            message += f", got {problem['input']!r}"
        lines.append(f"{source}: {field}: {message}")
    return "\n".join(lines)


def _list_sibling_fields(location: tuple[int | str, ...], of: type[BaseModel]) -> list[str]:
    """Fields that the section of an unknown field does have."""
    section: Any = of
    for part in location[:-1]:
        if get_origin(section) is dict:
            section = get_args(section)[1]
        elif str(part) in _find_model_class(section).model_fields:  # else the name of a union's member
            section = _find_model_class(section).model_fields[str(part)].annotation
    return list(_find_model_class(section).model_fields)


def _find_model_class(annotation: Any) -> type[BaseModel]:
    """The pydantic model in an annotation such as `LossConfig | None`."""
    options = (annotation, *get_args(annotation))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), Section)
