"""Settings of the data: sources, columns and lengths. Imports neither torch nor transformers."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from preferences.naming import suggest_name
from preferences.reading.label_rules import LabelRule

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "context",
    "completions",
    "ranks",
    "scores",
    "soft_label",
    "votes_chosen",
    "votes_rejected",
    "system",
    "input",
    "tools",
)
"""Fields that a row may have. `context` is another name for `prompt`."""

LABEL_FIELDS = ("soft_label", "votes_chosen", "votes_rejected")
MAPPED_FIELDS = ("input", "scores")
"""Fields that are read from no column unless one is named: their names mean many things in data sets."""


class RowSettings(BaseModel):
    """How the rows of a source are read: which of its rows, and what its columns mean.

    `columns` maps a field to the column that holds it, or part of one (`chosen: answers.0.text`), or to null
    (do not read it). Other columns are passed over, but for one whose name is nearly a field's, because a
    misspelt `soft_label` would silently train on hard labels, unless a pattern in `ignore` matches it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subset: str | None = Field(
        default=None, description="configuration of a hub data set", examples=["default"]
    )
    split: str = Field(
        default="train",
        description="split of a hub data set or of a folder with splits",
        examples=["train_prefs"],
    )
    revision: str | None = Field(
        default=None, description="commit, tag or branch of a hub data set", examples=["main"]
    )
    columns: dict[str, str | None] = Field(
        default_factory=dict,
        description="which column a field is read from, as field: column; null: the field is not read",
        examples=[{"chosen": "better", "rejected": "worse"}],
    )
    pair: tuple[str, str] | None = Field(
        default=None,
        description="columns of the two responses, where neither is the better one by name",
        examples=[["response_a", "response_b"]],
    )
    label: LabelRule | None = Field(
        default=None,
        description="how a column says which response people preferred, and by how much",
        examples=[{"type": "scores", "columns": ["score_a", "score_b"]}],
    )
    weight: str | None = Field(
        default=None,
        description="column of each pair's weight in the loss and in metrics",
        examples=["weight"],
    )
    ignore: tuple[str, ...] = Field(
        default=(),
        description="columns that are passed over although they look like misspellings of a field; "
        "patterns allowed",
        examples=[["scores_*"]],
    )
    ranked_pairs: Literal["all", "adjacent"] = Field(
        default="all", description="pairs made of ranked completions: every two, or neighbours in rank only"
    )

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

    @model_validator(mode="after")
    def _refuse_two_labels(self) -> Self:
        labels = [name for name in LABEL_FIELDS if self.columns.get(name) is not None]
        if self.label is not None and labels:
            raise ValueError(f"label and columns.{labels[0]} both give the label; keep one of them")
        sides = [name for name in ("chosen", "rejected") if self.columns.get(name) is not None]
        if self.pair is not None and sides:
            raise ValueError(f"pair and columns.{sides[0]} both name a response; keep one of them")
        if self.pair is not None and self.pair[0] == self.pair[1]:
            raise ValueError(f"pair names {self.pair[0]!r} twice; name the columns of both responses")
        return self

    @field_validator("ignore", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _wrap_single_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class SourceConfig(RowSettings):
    """One source of pairs, its share of a mixture, and how its rows are read.

    In a run file, settings that a source leaves out are those of `data`.
    """

    source: str = Field(
        description="file, folder, URI or hub id; a text alone means this", examples=["data/helpful.jsonl"]
    )
    name: str | None = Field(
        default=None,
        min_length=1,
        description="what metrics and counts call it; null: the name of its file or data set",
        examples=["helpful"],
    )
    share: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="relative share of the mixture: as many pairs as possible in these proportions, none "
        "twice",
        examples=[0.5],
    )
    count: int | None = Field(
        default=None,
        ge=1,
        description="that many pairs are taken from it, drawn by `training.seed`",
        examples=[1000],
    )
    cap: int | None = Field(
        default=None,
        ge=1,
        description="at most so many pairs are taken from it, drawn by `training.seed`",
        examples=[1000],
    )


class DataConfig(RowSettings):
    """Where pairs come from, which of their columns are read, and how long they may be.

    `max_length` and `max_prompt_length` are counted in the policy's tokens, for a prompt with one response
    and its end-of-turn token; a reference with its own tokenizer is limited by its own positions only.
    """

    train: str | tuple[SourceConfig, ...] = Field(
        min_length=1,
        description="the training pairs: file, folder, URI or hub id, or a list of sources",
        examples=["data/train.jsonl"],
    )
    eval: str | dict[str, SourceConfig] | None = Field(
        default=None,
        min_length=1,
        description="held-out pairs: another file, folder, URI or hub id, or several sets as name: source",
        examples=["data/eval.jsonl"],
    )
    eval_fraction: float | None = Field(
        default=None,
        description="share of the training prompts that is held out, where there is no `eval`",
        examples=[0.05],
        json_schema_extra={"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    )
    eval_split: str | None = Field(
        default=None,
        description="split that has the held-out pairs: of `eval` if given, else of `train`",
        examples=["test"],
    )
    max_length: int = Field(
        default=1024,
        description="longest prompt with one response, in the policy's tokens; above `max_prompt_length`",
        json_schema_extra={"minimum": 2},
    )
    max_prompt_length: int = Field(
        default=512, description="longest prompt, in the policy's tokens", json_schema_extra={"minimum": 1}
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop",
        description="what a row that cannot be used does: stop the run, or be left out and counted",
    )
    on_long_row: Literal["skip", "stop", "truncate"] = Field(
        default="skip",
        description="what a pair that is too long does: be left out and counted, stop the run, or be cut",
    )
    template_date: datetime.date | None = Field(
        default=None,
        description="today's date for chat templates that write it (Llama 3.2, SmolLM3, gpt-oss); null: the "
        "day on which the run begins, kept for every resume. Runs of different days share "
        "stored scores only under the same date",
        examples=["2026-11-25"],
    )
    allow_hard_labels: bool = Field(
        default=False, description="let a loss that reads soft labels train on pairs that have none"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="what every model's chat template is given besides",
        examples=[{"enable_thinking": False}],
    )

    @field_validator(
        "train", mode="before", json_schema_input_type=str | SourceConfig | tuple[str | SourceConfig, ...]
    )
    @classmethod
    def _read_source_list(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(_expand_source(source) for source in value)
        return (value,) if isinstance(value, Mapping) else value

    @field_validator("eval", mode="before", json_schema_input_type=str | dict[str, str | SourceConfig] | None)
    @classmethod
    def _read_named_sources(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: _expand_source(source) for name, source in value.items()}
        return value

    @property
    def train_sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the training pairs, complete with what they leave to `data`; names differ."""
        sources = (SourceConfig(source=self.train),) if isinstance(self.train, str) else self.train
        return tuple(
            self._complete_source(source, name=name)
            for source, name in zip(sources, _name_sources(sources), strict=True)
        )

    @property
    def eval_sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the held-out pairs; none if they are a fraction of the training pairs."""
        if isinstance(self.eval, dict):
            return tuple(
                self._complete_source(source, name=name, split=self.eval_split)
                for name, source in self.eval.items()
            )
        if self.eval is not None:
            source = SourceConfig(source=self.eval)
            return (self._complete_source(source, name=_name_sources([source])[0], split=self.eval_split),)
        if self.eval_split is not None:
            return tuple(
                source.model_copy(
                    update={"split": self.eval_split, "share": None, "count": None, "cap": None}
                )
                for source in self.train_sources
            )
        return ()

    def list_sources(self) -> dict[str, str]:
        """List what the settings name as sources, by field."""
        train = self.train if isinstance(self.train, str) else dict(enumerate(self.train))
        sources: dict[str, str] = {}
        for field, named in (("data.train", train), ("data.eval", self.eval)):
            if isinstance(named, str):
                sources[field] = named
            elif named is not None:
                sources |= {f"{field}.{key}.source": source.source for key, source in named.items()}
        return sources

    def map_sources(self, function: Callable[[str], str]) -> "DataConfig":
        """Return the settings with every source replaced by the function's result."""

        def map_source(source: SourceConfig) -> SourceConfig:
            return source.model_copy(update={"source": function(source.source)})

        train = function(self.train) if isinstance(self.train, str) else tuple(map(map_source, self.train))
        if isinstance(self.eval, dict):
            named = {name: map_source(source) for name, source in self.eval.items()}
            return self.model_copy(update={"train": train, "eval": named})
        return self.model_copy(update={"train": train, "eval": self.eval and function(self.eval)})

    def _complete_source(self, source: SourceConfig, *, name: str, split: str | None = None) -> SourceConfig:
        inherited = {field: getattr(self, field) for field in RowSettings.model_fields}
        if split is not None:
            inherited["split"] = split
        own = {field: getattr(source, field) for field in source.model_fields_set}
        return SourceConfig(**inherited | own | {"name": name})

    @field_validator("eval_fraction")
    @classmethod
    def _check_eval_fraction(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError(f"eval_fraction must be between 0 and 1, got {value}; try 0.05, or leave it out")
        return value

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
    def _check_mixture(self) -> "DataConfig":
        sources = () if isinstance(self.train, str) else self.train
        for source in sources:
            if source.share is not None and source.count is not None:
                raise ValueError(f"{source.source} has a share and a count in train; keep one of them")
            is_free = source.share is None and source.count is None
            if is_free and any(other.share is not None for other in sources):
                raise ValueError(
                    f"{source.source} has neither share nor count, and other sources of train have shares; "
                    "give it one"
                )
        for name, source in self.eval.items() if isinstance(self.eval, dict) else ():
            if source.share is not None:
                raise ValueError(f"eval.{name} has a share, which is of a mixture; set its count or cap")
        return self

    @model_validator(mode="after")
    def _refuse_equal_names(self) -> "DataConfig":
        names = [] if isinstance(self.train, str) else [source.name for source in self.train]
        for name in names:
            if name is not None and names.count(name) > 1:
                raise ValueError(f"train has two sources of name {name!r}; give each a name of its own")
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


def _expand_source(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _name_sources(sources: Sequence[SourceConfig]) -> list[str]:
    """Name each source as metrics do: its own name, else that of its file or data set, numbered if taken."""
    names: list[str] = []
    for source in sources:
        path = source.source.partition("?")[0].rstrip("/")
        name = source.name or path.rpartition("/")[2].partition(".")[0] or path
        number = 2
        base = name
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names
