"""The commands `polyref data show` and `polyref init`: see how data is read, and write a run file for it."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.config.problems import build_source
from orchestrator.config.run import load_run
from orchestrator.errors import UsageError

app = typer.Typer(help="Data: show what is read of it.", no_args_is_help=True)

_DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

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


def _complete_example(incomplete: str) -> list[str]:
    """List the names of examples, for shells that complete them."""
    from orchestrator.driver.examples import list_examples

    return [example.name for example in list_examples() if example.name.startswith(incomplete)]


def init_command(
    name: Annotated[
        str | None,
        typer.Argument(help="An example, such as dpo or sweeps/pbt.", autocompletion=_complete_example),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Instead: a file, folder, URI or hub id with preferences.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the examples.")] = False,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="The file to write; default: run.yaml, or the example's name."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The policy: a hub id, a folder, or a registered model.", show_default=_DEFAULT_MODEL
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="The loss; default: gdpo where labels are soft, else dpo.")
    ] = None,
    split: Split = "train",
    subset: Subset = None,
) -> None:
    """Write a run file for your data, with a comment on each choice, or an example of a run or a search."""
    if sum((name is not None, data is not None, list_all)) != 1:
        raise UsageError(
            "init takes --data SOURCE, or the name of an example, or --list, which lists the examples; "
            "polyref init --help explains them"
        )
    if data is None:
        other_split = None if split == "train" else split
        given = {"--model": model, "--preset": preset, "--split": other_split, "--subset": subset}
        for option in (option for option, value in given.items() if value is not None):
            raise UsageError(f"{option} is for --data; change the example after it is written")
        for line in _list_examples() if name is None else _write_example(name, to):
            print(line)
        return
    from orchestrator.driver.write_run_file import write_run_file

    source = build_source("--data", source=data, split=split, subset=subset)
    path, policy = to or Path("run.yaml"), _DEFAULT_MODEL if model is None else model
    for line in write_run_file(source, path, model=policy, preset=preset):
        print(line)


def _list_examples() -> Iterator[str]:
    """Yield a line or two on each example."""
    from orchestrator.driver.examples import list_examples

    examples = list_examples()
    width = max(len(example.name) for example in examples) + 2
    for example in examples:
        yield from textwrap.wrap(
            example.summary,
            80,
            initial_indent=f"{example.name:<{width}}",
            subsequent_indent=" " * width,
            break_on_hyphens=False,
        )
    yield "polyref init NAME writes one; polyref init --data SOURCE writes a run file for your data"


def _write_example(name: str, to: Path | None) -> Iterator[str]:
    from orchestrator.driver.examples import write_example

    return write_example(name, to)
