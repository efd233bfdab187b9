"""Settings of labels: how a column says which of two responses people preferred, and by how much.

`first` and `second` are the responses in the order of `data.pair`, or chosen and rejected.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Scalar = str | int | float | bool | None


def _wrap_single_value(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Values = Annotated[
    tuple[Scalar, ...],
    BeforeValidator(_wrap_single_value, json_schema_input_type=Scalar | tuple[Scalar, ...]),
]
Side = Literal["first", "second"]


class _LabelRule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def columns_read(self) -> tuple[str, ...]:
        """The columns that the label is read from; parts of one behind a dot."""
        return ()


def _check_range(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] < value[1]:
        raise ValueError(f"range must be [low, high] with low below high, got {list(value)}")
    return value


class StrengthLabel(_LabelRule):
    """How much better one response is, as a number: the label is linear over the range."""

    type: Literal["strength"] = Field(description="how much better one response is: linear over the range")
    column: str = Field(min_length=1, description="column of the strength", examples=["overall_preference"])
    range: tuple[float, float] = Field(
        description="the numbers at which every rater prefers one response", examples=[[-3, 3]]
    )
    prefers: Side = Field(description="the response that the upper end of the range favours")

    _check_range = field_validator("range")(_check_range)

    @property
    def columns_read(self) -> tuple[str, ...]:
        """The column of the strength."""
        return (self.column,)


class RatersLabel(_LabelRule):
    """One number of each rater: the label is the share who preferred a response; the middle counts half."""

    type: Literal["raters"] = Field(
        description="a number of each rater: the share of those who preferred the first response; the middle "
        "of the range counts half"
    )
    column: str = Field(min_length=1, description="column of the raters' numbers", examples=["preferences"])
    field: str | None = Field(
        default=None,
        description="where a rater's number is, if each gave more than one",
        examples=["helpfulness"],
    )
    range: tuple[float, float] = Field(
        description="least and most that a rater can give; ties in the middle", examples=[[1, 5]]
    )
    prefers: Side = Field(description="the response that the upper end of the range favours")

    _check_range = field_validator("range")(_check_range)

    @property
    def columns_read(self) -> tuple[str, ...]:
        """The column of the raters' numbers."""
        return (self.column,)


class ScoresLabel(_LabelRule):
    """A score of each response: the label is sigma((first - second) / temperature) (Bradley and Terry)."""

    type: Literal["scores"] = Field(
        description="a score of each response: sigma((first - second) / temperature)"
    )
    columns: tuple[str, str] = Field(
        description="columns of the first and of the second response's score",
        examples=[["score_a", "score_b"]],
    )
    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="what the difference of the scores is divided by"
    )

    @property
    def columns_read(self) -> tuple[str, ...]:
        """The columns of the scores."""
        return self.columns


class WinnerLabel(_LabelRule):
    """Who won, in a column: values that mean the first or the second response, or a tie."""

    type: Literal["winner"] = Field(
        description="who won, by the value in a column: 1, 0, or one half for a tie"
    )
    column: str = Field(min_length=1, description="column of the winner", examples=["winner"])
    first: Values = Field(
        description="a value, or a list of them, that means the first response", examples=[["model_a"]]
    )
    second: Values = Field(
        description="a value, or a list of them, that means the second response", examples=[["model_b"]]
    )
    tie: Values = Field(
        default=(), description="a value, or a list of them, that means a tie", examples=[["tie"]]
    )

    @model_validator(mode="after")
    def _refuse_value_twice(self) -> "WinnerLabel":
        known = [str(value) for value in (*self.first, *self.second, *self.tie)]
        for value in known:
            if known.count(value) > 1:
                raise ValueError(f"{value!r} stands twice among first, second and tie; leave it in one")
        return self

    @property
    def columns_read(self) -> tuple[str, ...]:
        """The column of the winner."""
        return (self.column,)


class FirstLabel(_LabelRule):
    """The first response is the better one in every row, though its column's name does not say so."""

    type: Literal["first"] = Field(description="the first response is the better one in every row")


LabelRule = Annotated[
    StrengthLabel | RatersLabel | ScoresLabel | WinnerLabel | FirstLabel, Field(discriminator="type")
]
