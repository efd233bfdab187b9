"""The settings that the parts of a search share."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.config.run import RunConfig
from orchestrator.config.sweep import SweepConfig
from orchestrator.driver.prepare import PreparedRun
from tune_spaces.spaces import Space

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """A search that has passed all checks and can start.

    Attributes:
        sweep: the sweep file.
        space: the space that points are drawn from.
        scheduler: decides which trials continue.
        total_steps: optimizer steps of a trial; of the longest, where lengths differ.
        prepared: the run file that trials start from, prepared, with every reference served.
    """

    sweep: SweepConfig
    space: Space
    scheduler: "TrialScheduler"
    total_steps: int
    prepared: PreparedRun


@dataclass(frozen=True, kw_only=True)
class SearchContext:
    """A running search, for the code that promotes one of its trials.

    Attributes:
        sweep: the sweep file.
        prepared: the run file that trials start from, prepared, with every reference served.
        folder: the search's folder, with its journal and record.
        mlflow_run: the search's own MLflow run, the parent of those of its trials.
        console: where progress and results are printed.
    """

    sweep: SweepConfig
    prepared: PreparedRun
    folder: Path
    mlflow_run: str
    console: Console

    @property
    def base(self) -> RunConfig:
        """The run file that trials start from, with paths resolved."""
        return self.prepared.config
