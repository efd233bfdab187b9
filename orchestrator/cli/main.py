"""The commands of `polyref`.

Exit codes: 0 success; 2 wrong input (one message, no traceback); 130 interrupted; 143 stopped by
SIGTERM after a checkpoint; 1 everything else.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from losses.settings import LossError
from models.config import ModelError
from orchestrator.cli import data as data_cli
from orchestrator.cli import label as label_cli
from orchestrator.cli import models as models_cli
from orchestrator.cli.dispersion import dispersion_command
from orchestrator.cli.explain import explain_command, list_run_overrides, list_sweep_overrides
from orchestrator.cli.interruption import Interrupted, turn_ctrl_c_into_interruption
from orchestrator.cluster.job_secrets import load_secrets
from orchestrator.config.run import build_run_schema, load_run
from orchestrator.errors import RunFailed, RunStopped, UsageError
from orchestrator.redaction import redact
from preferences.pairs import DataError
from tune_spaces.domains import SpaceError

app = typer.Typer(
    help="Preference training against several frozen reference models, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models_cli.app, name="models")
app.add_typer(data_cli.app, name="data")
app.command("init")(data_cli.init_command)
app.command("dispersion")(dispersion_command)
app.command("label")(label_cli.label_command)
app.command("explain")(explain_command)

_LONGEST_MESSAGE = 3800
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[1]  # typer does not export it

RunFile = Annotated[str, typer.Argument(help="The run file (YAML).", metavar="RUN.YAML")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Fields to override, e.g. loss.beta=0.2 parallel.workers=4.", autocompletion=list_run_overrides
    ),
]
SweepOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Fields to override, e.g. search.trials=64 run.training.epochs=2.",
        autocompletion=list_sweep_overrides,
    ),
]


@app.callback(invoke_without_command=True)
def _show_version(
    _context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from orchestrator.tracking.code_version import read_code_tags

        print(f"polyref {read_code_tags()['polyref.version']}")
        raise typer.Exit


@app.command("train")
def train_command(
    run: RunFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Forget an earlier run of this name and start over.")] = False,
) -> None:
    """Train a policy and register it; the same command resumes a killed run from its last checkpoint."""
    config = load_run(run, overrides or ())
    from orchestrator.driver.train import train_run

    with turn_ctrl_c_into_interruption():
        train_run(config, fresh=fresh)


@app.command("tune")
def tune_command(
    sweep: Annotated[str, typer.Argument(help="The sweep file (YAML).", metavar="SWEEP.YAML")],
    overrides: SweepOverrides = None,
    fresh: Annotated[bool, typer.Option(help="Forget an earlier search of this name.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            help="Print the space, some points, the placement and the responses that references must score."
        ),
    ] = False,
    samples: Annotated[int, typer.Option(help="With --dry-run: how many points.", min=0)] = 5,
    time_budget: Annotated[
        float | None,
        typer.Option(help="Minutes until the search ends; the same command resumes it.", min=0),
    ] = None,
    max_failures: Annotated[
        int | None, typer.Option(help="More failed trials than this end the search.", min=0)
    ] = None,
    retry_failed: Annotated[bool, typer.Option(help="Try failed trials again.")] = False,
) -> None:
    """Search losses, dispersion and references, and register the best; the same command resumes."""
    limits = {"time_budget": time_budget, "max_failures": max_failures}
    limits = {name: value for name, value in limits.items() if value is not None}
    from orchestrator.config.sweep import load_sweep

    config = load_sweep(sweep, [*(overrides or ()), *(f"{name}={value}" for name, value in limits.items())])
    from orchestrator.search.tune import dry_run as print_dry_run
    from orchestrator.search.tune import run_sweep

    with turn_ctrl_c_into_interruption():
        if dry_run:
            print_dry_run(config, samples=samples)
        else:
            run_sweep(config, fresh=fresh, retry_failed=retry_failed)


@app.command()
def score(
    run: RunFile,
    overrides: Overrides = None,
    audit: Annotated[
        int,
        typer.Option(help="Instead, score this many stored responses per reference anew and compare.", min=0),
    ] = 0,
) -> None:
    """Score all data of a run with its references and store the scores, so that training only reads them."""
    config = load_run(run, overrides or ())
    from orchestrator.driver.train import score_run

    with turn_ctrl_c_into_interruption():
        score_run(config, audit=audit)


@app.command("check")
def check_command(run: RunFile, overrides: Overrides = None) -> None:
    """Check settings, data, models, placement and tracking of a run without occupying any device."""
    config = load_run(run, overrides or ())
    from orchestrator.driver.train import check_run

    check_run(config)


@app.command()
def submit(
    command: Annotated[list[str], typer.Argument(help="The arguments of polyref, after --.")],
    address: Annotated[
        str | None,
        typer.Option(help="The cluster's job server; default: RAY_ADDRESS, or port 8265 of this machine."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the log, and exit with the job's exit code.")] = True,
    env: Annotated[
        list[str] | None, typer.Option(help="Environment variable to pass to the job, by name; repeatable.")
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(help="The same, for a value that must not be shown or logged; repeatable."),
    ] = None,
    code: Annotated[
        bool,
        typer.Option(
            help="Send the polyref of this machine instead of using the one installed on the nodes."
        ),
    ] = False,
    insecure: Annotated[
        bool,
        typer.Option(help="Send the cluster's token and secrets over plain HTTP to another machine too."),
    ] = False,
) -> None:
    """Run a command as a job on a cluster: polyref submit -- train run.yaml loss.beta=0.2."""
    from orchestrator.jobs.submit import submit_job

    code_of_job = submit_job(
        command,
        address=address,
        wait=wait,
        env=env or (),
        secret=secret or (),
        code=code,
        insecure=insecure,
    )
    sys.exit(code_of_job)


@app.command()
def schema(of: Annotated[str, typer.Argument(help="Kind of file: run or sweep.")] = "run") -> None:
    """Print the JSON Schema of the run file or of the sweep file, for editors."""
    if of not in ("run", "sweep"):
        raise UsageError(f"schema {of!r} does not exist; known are: run, sweep")
    from orchestrator.config.sweep import build_sweep_schema

    print(json.dumps(build_run_schema() if of == "run" else build_sweep_schema(), indent=2))


@app.command()
def demo(
    fresh: Annotated[bool, typer.Option(help="Start over instead of reusing existing files.")] = False,
    folder: Annotated[str, typer.Option(help="The folder for data, runs and the registry.")] = ".demo",
) -> None:
    """Train a model on human ratings and register it, in some minutes on two CPU cores."""
    from orchestrator.demo.run import run_demo

    with turn_ctrl_c_into_interruption():
        run_demo(folder, fresh=fresh)


def run_command_line() -> None:
    """Entry point of `polyref` and of `python -m orchestrator`."""
    _quiet_libraries()
    try:
        load_secrets()
        code = app(prog_name="polyref", standalone_mode=False)
    except _CommandLineError as error:
        _exit_with_message(_explain_command_line_error(error), code=2)
    except typer.Abort:
        _exit_with_message("interrupted", code=130)
    except (UsageError, DataError, ModelError, LossError, SpaceError) as error:
        _exit_with_message(str(error), code=2)
    except RunStopped as error:
        _exit_with_message(str(error), code=143)
    except RunFailed as error:
        _exit_with_message(str(error), code=1)
    except Interrupted:
        _exit_with_message("interrupted; the same command resumes", code=130)
    sys.exit(code)


def _explain_command_line_error(error: Any) -> str:
    """Explain a command, option or argument that does not exist or is missing, and name the help."""
    command = error.ctx.command_path if error.ctx else "polyref"
    if type(error).__name__ == "NoArgsIsHelpError":
        return f"{command} needs a command, which {command} --help lists"
    return f"{error.format_message().rstrip('.')}; {command} --help lists what there is"


def _exit_with_message(message: str, *, code: int) -> NoReturn:
    print(f"polyref: {redact(_shorten_message(message))}", file=sys.stderr)
    sys.exit(code)


def _shorten_message(message: str) -> str:
    """Shorten a message that repeats a long input, or has a line for each of very many problems."""
    if len(message) <= _LONGEST_MESSAGE:
        return message
    lines = message.splitlines()
    while len(lines) > 1 and sum(len(line) + 1 for line in lines) > _LONGEST_MESSAGE - 50:
        lines.pop()
    left_out = len(message.splitlines()) - len(lines)
    if left_out and len(lines[0]) <= _LONGEST_MESSAGE:
        return "\n".join([*lines, f"and {left_out} more; correct these first"])
    # A single one: its beginning has the place, its end the remedy.
    return f"{message[: _LONGEST_MESSAGE // 2]} [...] {message[-_LONGEST_MESSAGE // 2 :]}"


def _quiet_libraries() -> None:
    """Set variables that libraries read at import: no bars in logs, no guess about accelerators."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
