"""What a searched field may be: a range, a choice, or one value. Torch-free.

A sweep file writes `{loguniform: [1.0e-6, 1.0e-4]}`; `parse` makes a domain of it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from losses.settings import Settings, unknown

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]


class SpaceError(ValueError):
    """A space that cannot be searched; the message names the field or the domain, and the remedy."""


class Uniform(Settings):
    """Any number from low to high."""

    low: Finite
    high: Finite

    @model_validator(mode="after")
    def _rises(self) -> Self:
        _check_order(self.low, self.high)
        return self

    def __str__(self) -> str:
        return f"{_text(self.low)} to {_text(self.high)}"

    def clip(self, value: float) -> float:
        """The nearest number inside."""
        return min(max(value, self.low), self.high)


class LogUniform(Uniform):
    """Any number from low to high, every factor alike."""

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.low <= 0:
            raise SpaceError(f"must start above 0, got {_text(self.low)}; try [0.01, 1], or uniform")
        return self

    def __str__(self) -> str:
        return f"{super().__str__()}, log"


class RandInt(Settings):
    """Any whole number from low to high, both included."""

    low: Whole
    high: Whole

    @model_validator(mode="after")
    def _rises(self) -> Self:
        _check_order(self.low, self.high)
        return self

    def __str__(self) -> str:
        return f"{self.low} to {self.high}, whole"

    def clip(self, value: float) -> int:
        """The nearest whole number inside."""
        return min(max(round(value), self.low), self.high)


class Choice(Settings):
    """One of some values, each of them any JSON value."""

    values: tuple[JsonValue, ...]

    @model_validator(mode="after")
    def _all_differ(self) -> Self:
        if not self.values:
            raise SpaceError("has no values; give at least one")
        if len(set(map(json.dumps, self.values))) < len(self.values):
            raise SpaceError(f"has a value twice: {self}; leave one out")
        return self

    def __str__(self) -> str:
        return " | ".join(map(_text, self.values))


class Grid(Choice):
    """A choice whose values are gone through in turn, so that every one gets its share of the trials."""

    def __str__(self) -> str:
        return f"{super().__str__()}, in turn"


class Fixed(Settings):
    """One value, which is not searched."""

    value: JsonValue

    def __str__(self) -> str:
        return _text(self.value)


Numeric = Uniform | LogUniform | RandInt
Domain = Numeric | Choice | Grid | Fixed

_RANGES: Mapping[str, type[Uniform] | type[RandInt]] = {
    "uniform": Uniform,
    "loguniform": LogUniform,
    "randint": RandInt,
}
_LISTS: Mapping[str, type[Choice]] = {"choice": Choice, "grid": Grid}
KEYWORDS = (*_RANGES, *_LISTS)


def parse(value: Any) -> Domain:
    """The domain that a sweep file writes as `{uniform: [0, 1]}`; any other value stands for itself.

    Raises:
        SpaceError: the domain is unknown or empty; says what to write.
    """
    try:
        if not isinstance(value, Mapping):
            return Fixed(value=value)
        keyword = next((key for key in value if key in KEYWORDS), None)
        if keyword is None:
            return _no_misspelt_domain(value)
        if len(value) > 1:
            raise SpaceError(f"{keyword} stands alone, got {', '.join(map(str, value))} too; leave them out")
        return _range(keyword, value) if keyword in _RANGES else _list(keyword, value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise SpaceError(f"{_text(value)}: {problem['msg'].removeprefix('Value error, ')}") from None


def _range(keyword: str, value: Mapping[str, Any]) -> Domain:
    bounds = value[keyword]
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        example = [1, 8] if keyword == "randint" else [0.01, 1.0]
        raise SpaceError(f"{keyword} takes [low, high], got {_text(bounds)}; try {{{keyword}: {example}}}")
    return _RANGES[keyword](low=bounds[0], high=bounds[1])


def _list(keyword: str, value: Mapping[str, Any]) -> Domain:
    values = value[keyword]
    if not isinstance(values, list | tuple):
        raise SpaceError(
            f"{keyword} takes a list, got {_text(values)}; write {{{keyword}: [{_text(values)}]}}"
        )
    return _LISTS[keyword](values=values)


def _no_misspelt_domain(value: Mapping[str, Any]) -> Fixed:
    """A section as one value, unless its only key looks like a domain."""
    refusal = str(unknown("domain", next(iter(value), ""), KEYWORDS))
    if len(value) == 1 and "did you mean" in refusal:
        raise SpaceError(refusal)
    return Fixed(value=dict(value))


def _check_order(low: float, high: float) -> None:
    if low >= high:
        raise SpaceError(f"must rise, got [{_text(low)}, {_text(high)}]; write [low, high] with low < high")


def _text(value: Any) -> str:
    """A value as a person writes it: 0.01, base + movie, none."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " + ".join(map(_text, value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    return str(value)
