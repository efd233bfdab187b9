"""Building blocks of a loss's settings: bounded numbers, and errors for unknown names. Torch-free."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema


class LossError(ValueError):
    """Error for a loss that cannot be computed; the message names the field and the remedy."""


class UnknownFieldError(LossError):
    """Error for a field that a section of the loss does not have; `field` is its name."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def make_unknown_name_error(what: str, name: object, options: Iterable[str]) -> LossError:
    """Return the error for a name that is not in `options`; the message suggests the nearest option."""
    names = list(options)
    near = get_close_matches(str(name).lower()[:100], names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return LossError(f"unknown {what} {name!r}{hint} Choose from: {', '.join(names)}")


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, for validation and the JSON Schema; `example` is a valid value for the message."""

    example: float
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def _list_bounds(self) -> list[tuple[str, str, float]]:
        """List the bounds that are set: sign, JSON Schema keyword, value."""
        named = [
            (">", "exclusiveMinimum", self.above),
            (">=", "minimum", self.at_least),
            ("<", "exclusiveMaximum", self.below),
            ("<=", "maximum", self.at_most),
        ]
        return [(sign, keyword, bound) for sign, keyword, bound in named if bound is not None]

    def check_value(self, value: float | str, info: ValidationInfo) -> float | str:
        """Return the value if it is within the bounds, or a word that is replaced by a number later.

        Raises:
            LossError: the value is out of bounds or not finite.
        """
        if isinstance(value, str):
            return value
        inside = (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )
        if not (inside and math.isfinite(value)):
            rule = " and ".join(f"{sign} {bound:g}" for sign, _, bound in self._list_bounds()) or "finite"
            raise LossError(f"{info.field_name} must be {rule}, got {value:g}; try {self.example:g}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self.check_value, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), **{keyword: bound for _, keyword, bound in self._list_bounds()}}


class FrozenSettings(BaseModel):
    """Base of frozen settings; an unknown field is refused with the nearest known one in the message."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for name in values:
                if name not in cls.model_fields:
                    message = str(make_unknown_name_error("field", name, cls.model_fields))
                    raise UnknownFieldError(message, str(name))
        return values
