"""The commands `polyref data show` and `polyref init`: see how data is read, and write a run file for it."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.config.problems import build_source
from orchestrator.config.run import load_run
from orchestrator.errors import UsageError

app = typer.Typer(help="Data: show what is read of it.", no_args_is_help=True)

Split = Annotated[str, typer.Option(help="The split of a hub data set or of a folder with splits.")]
Subset = Annotated[str | None, typer.Option(help="The configuration of a hub data set.")]


@app.command("show")
def show_command(
    target: Annotated[
        str, typer.Argument(help="A run file (YAML), or a file, folder, URI or hub id.", metavar="RUN|SOURCE")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of a run file: fields to override, e.g. data.max_length=2048.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="How many pairs to print.", min=0)] = 3,
    split: Split = "train",
    subset: Subset = None,
) -> None:
    """Show what is read of a run's data or of a source: counts, labels, lengths, and the first pairs."""
    from orchestrator.driver.show_data import show_run_data, show_source
    from orchestrator.tracking.progress import make_plain_console

    console = make_plain_console()
    if target.endswith((".yaml", ".yml")):
        show_run_data(load_run(target, overrides or ()), pairs=pairs, console=console)
        return
    if overrides:
        raise UsageError(f"{overrides[0]}: only a run file has fields to override; give --split or --subset")
    source = build_source("SOURCE", source=target, split=split, subset=subset)
    show_source(source, pairs=pairs, console=console)


def init_command(
    data: Annotated[str, typer.Option("--data", help="A file, folder, URI or hub id with preferences.")],
    to: Annotated[Path, typer.Option("--to", help="The run file to write.")] = Path("run.yaml"),
    model: Annotated[
        str, typer.Option(help="The policy: a hub id, a folder, or a registered model.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    preset: Annotated[
        str | None, typer.Option(help="The loss; default: gdpo where labels are soft, else dpo.")
    ] = None,
    split: Split = "train",
    subset: Subset = None,
) -> None:
    """Write a run file for your data, with what its columns mean and a comment on each choice."""
    from orchestrator.driver.write_run_file import write_run_file

    source = build_source("--data", source=data, split=split, subset=subset)
    for line in write_run_file(source, to, model=model, preset=preset):
        print(line)
