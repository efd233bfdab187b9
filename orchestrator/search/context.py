"""What the parts of a search share."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from orchestrator.config.run import RunConfig
from orchestrator.config.sweep import SweepConfig
from orchestrator.driver.prepare import PreparedRun


@dataclass(frozen=True, kw_only=True)
class SearchContext:
    """A search, as everything that runs or promotes its trials needs to know it.

    Attributes:
        sweep: the sweep file.
        prepared: the run file that trials start from, prepared, with every reference served.
        folder: of the search, with its journal and record.
        mlflow_run: the search's own MLflow run, above those of its trials.
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
