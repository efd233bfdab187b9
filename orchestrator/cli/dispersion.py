"""The command `polyref dispersion`: how much people's preferences scatter, by a reference's entropy."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.config.run import load_run
from orchestrator.errors import UsageError


def dispersion_command(
    run: Annotated[str, typer.Argument(help="The run file (YAML).", metavar="RUN.YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields to override.")] = None,
    split: Annotated[str, typer.Option(help="train or eval.")] = "train",
    to: Annotated[
        Path | None, typer.Option(help="The Parquet file; default: dispersion.parquet in the run's folder.")
    ] = None,
) -> None:
    """Measure the dispersion of a run's pairs, and compare it with how much people disagreed."""
    if split not in ("train", "eval"):
        raise UsageError(f"--split {split}: a run has train and eval")
    config = load_run(run, overrides or ())
    from orchestrator.driver.dispersion import measure_dispersion

    measure_dispersion(config, split_name=split, to=to)
