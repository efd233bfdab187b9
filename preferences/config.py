"""Settings of the data: sources, columns and lengths. Imports neither torch nor transformers."""

import datetime
import difflib
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "context",
    "completions",
    "ranks",
    "soft_label",
    "votes_chosen",
    "votes_rejected",
    "tools",
)
"""Fields that a row may have. `context` is another name for `prompt`."""

METADATA_COLUMNS = (
    *("id", "*_id", "idx", "index", "", "_*", "Unnamed: *"),  # the last three: a pandas index
    *("source", "meta", "metadata", "dataset", "category", "language", "lang", "url", "timestamp"),
)
"""Columns that many data sets have and that cannot be mistaken for a field: never read, never refused."""


class DataConfig(BaseModel):
    """Where pairs come from, which of their columns are read, and how long they may be.

    `columns` maps a field to the column that holds it (`chosen: response_a`), or to null (do not read it).
    Any other column is refused, because a misspelt `soft_label` would silently train on hard labels, unless a
    name or pattern in `ignore` (`"*"` for all) or `METADATA_COLUMNS` matches it.

    `max_length` and `max_prompt_length` are counted in the policy's tokens, for a prompt with one response
    and its end-of-turn token; a reference with its own tokenizer is limited by its own positions only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str = Field(min_length=1, description="file, folder, URI or hub id of the training pairs")
    eval: str | None = Field(default=None, min_length=1, description="the same for held-out pairs")
    eval_fraction: float | None = Field(
        default=None, description="share of the training pairs held out, by prompt, when there is no `eval`"
    )
    eval_split: str | None = Field(
        default=None, description="split that holds the held-out pairs: of `eval` if given, else of `train`"
    )
    subset: str | None = Field(default=None, description="configuration of a hub data set")
    split: str = Field(default="train", description="split of a hub data set or of a folder with splits")
    revision: str | None = Field(default=None, description="commit, tag or branch of a hub data set")
    columns: dict[str, str | None] = Field(default_factory=dict, description="field: column, or null")
    ignore: tuple[str, ...] = Field(default=(), description="further columns not to read; patterns allowed")
    ranked_pairs: Literal["all", "adjacent"] = Field(
        default="all", description="pairs made of ranked completions: every two, or neighbours in rank only"
    )
    max_length: int = Field(default=1024, description="tokens of a prompt with one response")
    max_prompt_length: int = Field(default=512, description="tokens of a prompt")
    on_bad_row: Literal["stop", "skip"] = "stop"
    on_long_row: Literal["skip", "stop", "truncate"] = "skip"
    template_date: datetime.date | None = Field(
        default=None,
        description="today's date for chat templates that write it; null: the day on which the run begins",
    )
    allow_hard_labels: bool = Field(
        default=False, description="let a loss that reads soft labels train on pairs that have none"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="passed to every model's chat template, e.g. enable_thinking"
    )

    @field_validator("eval_fraction")
    @classmethod
    def _check_eval_fraction(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError(f"eval_fraction must be between 0 and 1, got {value}; try 0.05, or leave it out")
        return value

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for field in value:
            if field not in FIELDS:
                raise ValueError(
                    f"columns maps a field to a column, and {field!r} is no field"
                    f"{suggest_name(field, FIELDS)}; fields are {', '.join(FIELDS)}"
                )
        named = [column for column in value.values() if column is not None]
        for column in named:
            if named.count(column) > 1:
                raise ValueError(
                    f"columns reads {column!r} for two fields; give each field a column of its own"
                )
        return value

    @field_validator("ignore", mode="before")
    @classmethod
    def _wrap_single_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_lengths(self) -> "DataConfig":
        if self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be >= 1, got {self.max_prompt_length}; try 512")
        if self.max_length < 2:
            raise ValueError(f"max_length must be >= 2, got {self.max_length}; try 1024")
        if self.max_length <= self.max_prompt_length:
            raise ValueError(
                f"max_length must leave room for a response after max_prompt_length, got max_length "
                f"{self.max_length} and max_prompt_length {self.max_prompt_length}; "
                f"try max_prompt_length: {self.max_length // 2}"
            )
        return self

    @model_validator(mode="after")
    def _check_eval_source(self) -> "DataConfig":
        if self.eval_fraction is not None and (self.eval or self.eval_split):
            raise ValueError(
                "eval_fraction holds pairs out of `train`, and eval or eval_split names held-out pairs; "
                "keep one of them"
            )
        if self.eval_split is not None and not self.eval and self.eval_split == self.split:
            raise ValueError(
                f"eval_split and split are both {self.split!r}, so the policy would be judged on its "
                "training pairs; name another split, or set eval_fraction: 0.05"
            )
        return self


def suggest_name(word: str, known: Sequence[str]) -> str:
    """Return ` (did you mean 'chosen'?)`, or an empty text if no known word is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
