"""The sweep file: which runs a search makes of one run file, how it looks for them and what it keeps.

Nothing here imports torch or Ray, so that a file is refused in a fraction of a second.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from orchestrator.config import (
    METRICS,
    RunConfig,
    Settings,
    UsageError,
    did_you_mean,
    explain,
    merged,
    parse_run,
    read_yaml,
)
from tune_spaces.schedulers import Fifo, SchedulerConfig
from tune_spaces.spaces import SPACES, Domain, parse

KL = "eval/kl/"
Point = Mapping[str, Any]
"""Dotted run-file fields and their values: what a trial changes."""


class SearchConfig(Settings):
    """How points are chosen, and how often each is run."""

    algorithm: Literal["random", "grid", "tpe"] = "random"
    trials: int | None = Field(
        default=None, ge=1, description="points to try; repeats and controls come on top"
    )
    repeats: int = Field(default=1, ge=1, description="seeds per point")
    controls: bool = Field(default=False, description="a DPO of matched beta for each soft or dispersed point")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _ends(self) -> "SearchConfig":
        if self.trials is None and self.algorithm != "grid":
            raise ValueError(f"trials must say how many points a {self.algorithm} search tries, e.g. trials: 16")
        return self


class Objective(Settings):
    """A metric and which way is better; both known metrics and `eval/kl/<reference>` have a direction."""

    metric: str
    mode: Literal["max", "min"]

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        values = {"metric": values} if isinstance(values, str) else values
        metric = values.get("metric") if isinstance(values, Mapping) else None
        if not isinstance(metric, str):
            return values
        if metric not in METRICS and not metric.startswith(KL):
            raise ValueError(
                f"metric {metric!r} is none{did_you_mean(metric, [*METRICS, KL + '<reference>'])}"
            )
        return {"mode": METRICS.get(metric, "min"), **values}


class PlateauConfig(Settings):
    """Stop a trial whose metric no longer moves: its standard deviation over the last results."""

    std: float = Field(default=0.005, gt=0)
    results: int = Field(default=4, ge=2)
    grace: int = Field(default=4, ge=1, description="evaluations before a trial may be stopped")


def _objectives(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class SweepConfig(Settings):
    """A whole sweep file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run: dict[str, Any] = Field(description="the run file that every trial starts from: its path, or its content")
    spaces: tuple[str, ...] = ()
    space: dict[str, Any] = Field(default_factory=dict, description="dotted run-file field: domain or value")
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = Fifo()
    plateau: PlateauConfig | None = None
    objective: Annotated[
        tuple[Objective, ...], BeforeValidator(_objectives), Field(min_length=1)
    ] = (Objective(metric="eval/accuracy", mode="max"),)
    max_concurrent: int | None = Field(default=None, ge=1, description="default: as many as fit")
    max_failures: int | None = Field(default=None, ge=0, description="failed trials that end the search when exceeded")
    time_budget: float | None = Field(default=None, gt=0, description="minutes of this call")
    promote: Literal["best", "retrain"] | None = "best"
    _base: RunConfig = PrivateAttr()
    _domains: dict[str, Domain] = PrivateAttr()

    @model_validator(mode="after")
    def _makes_sense(self) -> "SweepConfig":
        for name in self.spaces:
            if name not in SPACES:
                raise ValueError(f"spaces: there is no space {name!r}{did_you_mean(name, SPACES)}")
        if not self.spaces and not self.space:
            raise ValueError(f"nothing to search; name spaces ({', '.join(SPACES)}) or fields under space")
        if len(self.objective) > 1 and self.search.algorithm != "tpe":
            raise ValueError("several objectives need search.algorithm: tpe")
        return self

    @property
    def base(self) -> RunConfig:
        """The run file without any drawn field."""
        return self._base

    @property
    def domains(self) -> Mapping[str, Domain]:
        """The fields under `space`."""
        return self._domains

    @property
    def folder(self) -> Path:
        """The search's own folder."""
        return Path(self.base.storage_path) / self.name
