"""Domains of searched fields: a range, a choice, or one value. Torch-free.

A sweep file writes `{loguniform: [1.0e-6, 1.0e-4]}`, which is parsed into a domain.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from losses.settings import FrozenSettings, make_unknown_name_error

FiniteFloat = Annotated[float, Field(strict=True, allow_inf_nan=False)]
WholeNumber = Annotated[int, Field(strict=True)]


class SpaceError(ValueError):
    """Error for a space that cannot be searched; the message names the field or domain, and the remedy."""


class Uniform(FrozenSettings):
    """A range of numbers from low to high."""

    low: FiniteFloat
    high: FiniteFloat

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        _check_order(self.low, self.high)
        return self

    def __str__(self) -> str:
        return f"{_format_value(self.low)} to {_format_value(self.high)}"

    def clip(self, value: float) -> float:
        """Return the nearest number in the range."""
        return min(max(value, self.low), self.high)


class LogUniform(Uniform):
    """A range of numbers from low to high, uniform on a logarithmic scale."""

    @model_validator(mode="after")
    def _check_positive(self) -> Self:
        if self.low <= 0:
            raise SpaceError(f"must start above 0, got {_format_value(self.low)}; try [0.01, 1], or uniform")
        return self

    def __str__(self) -> str:
        return f"{super().__str__()}, log"


class RandInt(FrozenSettings):
    """A range of whole numbers from low to high, both included."""

    low: WholeNumber
    high: WholeNumber

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        _check_order(self.low, self.high)
        return self

    def __str__(self) -> str:
        return f"{self.low} to {self.high}, whole"

    def clip(self, value: float) -> int:
        """Return the nearest whole number in the range."""
        return min(max(round(value), self.low), self.high)


class Choice(FrozenSettings):
    """A list of values to choose from, each of them any JSON value."""

    values: tuple[JsonValue, ...]

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        if not self.values:
            raise SpaceError("has no values; give at least one")
        if len(set(map(json.dumps, self.values))) < len(self.values):
            raise SpaceError(f"has a value twice: {self}; leave one out")
        return self

    def __str__(self) -> str:
        return " | ".join(map(_format_value, self.values))


class Grid(Choice):
    """A choice whose values take turns, so that each gets its share of the trials."""

    def __str__(self) -> str:
        return f"{super().__str__()}, in turn"


class Fixed(FrozenSettings):
    """A single value, which is not searched."""

    value: JsonValue

    def __str__(self) -> str:
        return _format_value(self.value)


Numeric = Uniform | LogUniform | RandInt
Domain = Numeric | Choice | Grid | Fixed

_RANGES: Mapping[str, type[Uniform] | type[RandInt]] = {
    "uniform": Uniform,
    "loguniform": LogUniform,
    "randint": RandInt,
}
_LISTS: Mapping[str, type[Choice]] = {"choice": Choice, "grid": Grid}
KEYWORDS = (*_RANGES, *_LISTS)


def parse_domain(value: Any) -> Domain:
    """Parse a domain of a sweep file, such as `{uniform: [0, 1]}`; any other value becomes a Fixed domain.

    Raises:
        SpaceError: the domain is invalid; the message says what to write.
    """
    try:
        if not isinstance(value, Mapping):
            return Fixed(value=value)
        keyword = next((key for key in value if key in KEYWORDS), None)
        if keyword is None:
            return _parse_section(value)
        if len(value) > 1:
            raise SpaceError(
                f"{keyword} must be the only key, got {', '.join(map(str, value))}; leave the others out"
            )
        return _parse_range(keyword, value) if keyword in _RANGES else _parse_list(keyword, value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise SpaceError(f"{_format_value(value)}: {problem['msg'].removeprefix('Value error, ')}") from None


def _parse_range(keyword: str, value: Mapping[str, Any]) -> Domain:
    bounds = value[keyword]
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        example = [1, 8] if keyword == "randint" else [0.01, 1.0]
        raise SpaceError(
            f"{keyword} takes [low, high], got {_format_value(bounds)}; try {{{keyword}: {example}}}"
        )
    return _RANGES[keyword](low=bounds[0], high=bounds[1])


def _parse_list(keyword: str, value: Mapping[str, Any]) -> Domain:
    values = value[keyword]
    if not isinstance(values, list | tuple):
        text = _format_value(values)
        raise SpaceError(f"{keyword} takes a list, got {text}; write {{{keyword}: [{text}]}}")
    return _LISTS[keyword](values=values)


def _parse_section(value: Mapping[str, Any]) -> Fixed:
    """Return a mapping as one value, but refuse it if its only key looks like a misspelt domain."""
    message = str(make_unknown_name_error("domain", next(iter(value), ""), KEYWORDS))
    if len(value) == 1 and "did you mean" in message:
        raise SpaceError(message)
    return Fixed(value=dict(value))


def _check_order(low: float, high: float) -> None:
    if not math.isfinite(high - low):
        raise SpaceError(
            f"is wider than any number, got [{_format_value(low)}, {_format_value(high)}]; "
            "write a narrower range"
        )
    if low >= high:
        raise SpaceError(
            f"must rise, got [{_format_value(low)}, {_format_value(high)}]; write [low, high] with low < high"
        )


def _format_value(value: Any) -> str:
    """Format a value for people: 0.01, base + movie, none."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " + ".join(map(_format_value, value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_format_value(item)}" for key, item in value.items()) + "}"
    return str(value)
