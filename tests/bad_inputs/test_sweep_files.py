"""Sweep files that cannot be meant: each is refused by one line that names the field or the place."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.bad_inputs import Commands, Workplace


@pytest.fixture
def sweep(workplace: Workplace) -> Path:
    """A good sweep file beside the good run file."""
    file = workplace.folder / "sweep.yaml"
    content = {
        "name": "search",
        "run": "run.yaml",
        "space": {"loss.beta": {"uniform": [0.1, 0.5]}},
        "search": {"trials": 2},
    }
    file.write_text(yaml.safe_dump(content))
    return file


# Overrides of the good sweep, a line each, and words of the refusal.
FIELDS: list[tuple[str, str, list[str]]] = [
    ("a name of 300 characters", f"name={'a' * 300}", ["name", "100 characters"]),
    ("a name with a slash", "name=a/b", ["name", "a/b"]),
    ("the name of the scores", "name=scores", ["name", "scores", "another name"]),
    ("the name of the database", "name=mlflow.db", ["name", "mlflow.db", "another name"]),
    ("no trials", "search.trials=0", ["search.trials", "1"]),
    ("true trials", "search.trials=true", ["search.trials", "number"]),
    ("trials without end", f"search.trials={'9' * 30}", ["search.trials", "too large"]),
    ("trials that nobody counted", "search.trials=null", ["trials", "random", "16"]),
    ("an algorithm that is none", "search.algorithm=bayes", ["search.algorithm", "'tpe'"]),
    ("no repeats", "search.repeats=0", ["search.repeats", "1"]),
    ("a seed beyond numpy", f"search.seed={2**45}", ["search.seed", "4294967296"]),
    ("search as a word", "search=random", ["search"]),
    ("an unknown setting", "search.trails=3", ["search.trails", "'trials'"]),
    ("a scheduler that is a word", "scheduler=asha", ["scheduler"]),
    ("a scheduler that is none", "scheduler={type: hyperband}", ["scheduler", "asha"]),
    ("a factor of nan", "scheduler={type: asha, reduction_factor: .nan}", ["reduction_factor", "finite"]),
    ("a factor of 1", "scheduler={type: asha, reduction_factor: 1}", ["reduction_factor", "1"]),
    ("a quantile above half", "scheduler={type: pbt, quantile_fraction: 0.9}", ["quantile_fraction", "0.5"]),
    ("a true probability", "scheduler={type: pbt, resample_probability: true}", ["resample", "number"]),
    ("a plateau of inf", "plateau={std: .inf}", ["plateau.std", "finite"]),
    ("a plateau of one result", "plateau={results: 1}", ["plateau.results", "2"]),
    ("an objective that is none", "objective=eval/acuracy", ["objective", "'eval/accuracy'"]),
    ("no objectives", "objective=[]", ["objective", "1"]),
    ("an objective that is a number", "objective=3", ["objective"]),
    ("two objectives of random", "objective=[eval/accuracy, eval/loss]", ["objectives", "tpe"]),
    ("a mode that is none", "objective={metric: eval/loss, mode: best}", ["mode", "'max'"]),
    ("an objective without samples", "objective=eval/kl/base", ["eval/kl/base", "evaluation.sampling"]),
    ("an objective without reward", "objective=eval/reward", ["eval/reward", "reward"]),
    ("a time of inf", "time_budget=.inf", ["time_budget", "finite"]),
    ("no time", "time_budget=0", ["time_budget", "0"]),
    ("a negative number of failures", "max_failures=-1", ["max_failures", "0"]),
    ("none at a time", "max_concurrent=0", ["max_concurrent", "1"]),
    ("a promotion that is none", "promote=worst", ["promote", "'best'"]),
    ("a space that is none", "spaces=[loses]", ["loses", "'losses'"]),
    ("spaces that are a word", "spaces=losses", ["spaces", "tuple"]),
    ("a field that is none", "space={loss.bta: 1}", ["space.loss.bta", "'beta'"]),
    ("a field of 3,000 dots", f"space={{? {'a.' * 3000}a : 1}}", ["space.a", "unknown field"]),
    (
        "a field that is not searched",
        "space={data.train: {choice: [a, b]}}",
        ["space.data.train", "searched"],
    ),
    ("a seed that is searched", "space={training.seed: {choice: [1, 2]}}", ["search.repeats"]),
    ("a range of words", "space={loss.beta: {uniform: [a, b]}}", ["space.loss.beta", "number"]),
    ("a range of one", "space={loss.beta: {uniform: [1]}}", ["space.loss.beta", "[low, high]"]),
    ("a range of nothing", "space={loss.beta: {uniform: null}}", ["space.loss.beta", "[low, high]"]),
    ("a range upside down", "space={loss.beta: {uniform: [1, 0.1]}}", ["space.loss.beta"]),
    ("a range to inf", "space={loss.beta: {uniform: [1, .inf]}}", ["space", "finite"]),
    ("a range of true", "space={loss.beta: {uniform: [false, true]}}", ["space.loss.beta", "number"]),
    ("a logarithm of 0", "space={loss.beta: {loguniform: [0, 1]}}", ["space.loss.beta", "above 0"]),
    ("whole numbers that are not", "space={training.epochs: {randint: [0.5, 2]}}", ["epochs", "integer"]),
    ("a choice of nothing", "space={loss.beta: {choice: []}}", ["space.loss.beta", "at least one"]),
    ("a choice that is a word", "space={loss.beta: {choice: a}}", ["space.loss.beta"]),
    ("a choice of the same", "space={loss.beta: {choice: [1, 1]}}", ["space.loss.beta", "twice"]),
    ("two domains", "space={loss.beta: {choice: [1], uniform: [1, 2]}}", ["space.loss.beta", "only key"]),
    ("a beta below 0", "space={loss.beta: {uniform: [-2, -1]}}", ["loss.beta", "must be > 0"]),
    ("a step of true", "space={training.max_steps: {choice: [true]}}", ["training.max_steps", "number"]),
    ("a preset that is none", "space={loss.preset: {choice: [dpo, dpoo]}}", ["dpoo", "'dpo'"]),
    ("a preset of TRL", "space={loss.preset: {choice: [sigmoid]}}", ["space.loss.preset", "write dpo"]),
    ("a range wider than numbers", "space={loss.margin: {uniform: [-1.0e+308, 1.0e+308]}}", ["wider"]),
    ("a time of ages", "time_budget=1.0e+300", ["time_budget", "525600"]),
    ("nothing to search", "space={}", ["space"]),
    ("pbt with controls", "scheduler={type: pbt}\nsearch.controls=true", ["pbt", "controls"]),
    ("pbt of several workers", "scheduler={type: pbt}\nrun.parallel.workers=2", ["pbt", "parallel.workers"]),
    ("pbt that keeps the best", "scheduler={type: pbt}\nrun.evaluation.keep=best", ["pbt", "keep: last"]),
    ("a run of nothing", "run=null", ["run", "required"]),
    ("a run that is absent", "run=nowhere.yaml", ["nowhere.yaml", "no such file"]),
    ("a run that is itself", "run=sweep.yaml", ["sweep.yaml", "unknown field"]),
    ("a run that is a number", "run=3", ["run", "dictionary"]),
    ("a run in the home of nobody", "run=~nobody-at-all/run.yaml", ["run", "~nobody-at-all"]),
    ("a run that is a folder", "run=.", ["is a folder"]),
    ("a run that is a device", "run=/dev/zero", ["/dev/zero", "device"]),
    ("a run of 300 characters", f"run={'a' * 300}", ["name too long"]),
    ("a run with a bad field", "run.training.max_steps=0", ["training.max_steps", "1"]),
    ("a run with a true number", "run.training.max_steps=true", ["training.max_steps", "number"]),
    ("a run with an infinite number", "run.training.weight_decay=.inf", ["training.weight_decay", "finite"]),
    ("a run without held-out pairs", "run.data.eval_fraction=null", ["data.eval_fraction"]),
    ("a run of supervised fine-tuning", "run.loss.preset=sft\nrun.references={}", ["sft", "pairs"]),
    ("a run on an object store", "run.storage_path=s3://bucket/x", ["s3://bucket/x", "folder"]),
    ("a run with an alias that is reserved", "run.tracking.alias=latest", ["tracking.alias", "latest"]),
    ("a run with a database that is a folder", "run.tracking.uri=sqlite:///.", ["tracking.uri", "sqlite"]),
    ("overrides of 3,000 dots", f"{'a.' * 3000}a=1", ["override", "nested"]),
]


@pytest.mark.parametrize(("overrides", "says"), [pytest.param(*case[1:], id=case[0]) for case in FIELDS])
def test_fields_are_refused(sweep: Path, commands: Commands, overrides: str, says: list[str]) -> None:
    if overrides.startswith("space="):  # an override is merged: it cannot take a field away
        space = yaml.safe_load(overrides.removeprefix("space="))
        sweep.write_text(yaml.safe_dump(yaml.safe_load(sweep.read_text()) | {"space": space}))
        overrides = "search.trials=2"
    commands.refuse("tune", "--dry-run", sweep, *overrides.split("\n"), says=says)


def replace_by(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        file.unlink()
        make(file)

    return spoil


FILES: list[tuple[str, Callable[[Path], Any], list[str]]] = [
    ("absent", Path.unlink, ["sweep.yaml", "no such file"]),
    ("empty", lambda file: file.write_text(""), ["sweep.yaml", "run is required"]),
    ("a list", lambda file: file.write_text("[a]"), ["sweep.yaml", "mapping"]),
    ("broken", lambda file: file.write_text("name: a\nsearch: {\n"), ["sweep.yaml:3", "not valid YAML"]),
    ("random bytes", lambda file: file.write_bytes(bytes(range(256))), ["sweep.yaml"]),
    ("a section twice", lambda file: file.write_text("name: a\nname: b\n"), ["sweep.yaml:2", "duplicate"]),
    ("nested 3,000 deep", lambda file: file.write_text("[" * 3000 + "]" * 3000), ["sweep.yaml", "nested"]),
    (
        "a run file",
        lambda file: file.write_text((file.parent / "run.yaml").read_text()),
        ["sweep.yaml", "run"],
    ),
    ("a folder", replace_by(Path.mkdir), ["sweep.yaml", "is a folder"]),
    ("a pipe", replace_by(os.mkfifo), ["sweep.yaml", "pipe"]),
    ("a link to itself", replace_by(lambda file: file.symlink_to(file)), ["sweep.yaml", "symbolic links"]),
    ("a link to a device", replace_by(lambda file: file.symlink_to("/dev/zero")), ["sweep.yaml", "device"]),
    (
        "a run that is a pipe",
        lambda file: replace_by(os.mkfifo)(file.parent / "run.yaml"),
        ["run.yaml", "pipe"],
    ),
]


@pytest.mark.parametrize(("spoil", "says"), [pytest.param(*case[1:], id=case[0]) for case in FILES])
def test_files_are_refused(
    sweep: Path, commands: Commands, spoil: Callable[[Path], Any], says: list[str]
) -> None:
    spoil(sweep)
    commands.refuse("tune", "--dry-run", sweep, says=says)


def test_a_grid_of_millions_is_refused(sweep: Path, commands: Commands) -> None:
    fields = ("loss.beta", "training.epochs", "training.max_steps", "training.keep_last")
    space = {field: {"choice": list(range(1, 40))} for field in fields}
    content = yaml.safe_load(sweep.read_text()) | {"space": space, "search": {"algorithm": "grid"}}
    sweep.write_text(yaml.safe_dump(content))
    commands.refuse("tune", "--dry-run", sweep, says=["100,000 points", "search.trials"])


@pytest.mark.parametrize("command", ["tune", "train", "check", "score"])
def test_a_sweep_is_no_run(sweep: Path, workplace: Workplace, commands: Commands, command: str) -> None:
    file = workplace.file if command == "tune" else sweep
    commands.refuse(command, file, says=[file.name])
