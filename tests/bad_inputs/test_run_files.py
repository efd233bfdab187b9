"""Run files that cannot be meant: each is refused by one line that names the field or the place."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.bad_inputs import Commands, Workplace

FieldCase = tuple[str, str, list[str]]

# Overrides of the good run, a line each (their values are YAML, as in the file), and words of the refusal.
FIELDS: list[FieldCase] = [
    ("fewer steps than none", "training.max_steps=-1", ["training.max_steps", "0"]),
    ("no steps", "training.max_steps=0", ["training.max_steps", "1"]),
    ("half a step", "training.max_steps=1.5", ["training.max_steps", "1.5"]),
    ("true steps", "training.max_steps=true", ["training.max_steps", "number", "true"]),
    ("a false rate", "training.weight_decay=false", ["training.weight_decay", "number", "false"]),
    ("a true resource", "parallel.resources.cpu=true", ["parallel.resources.cpu", "number"]),
    ("true of a named resource", "parallel.resources.custom.tpu=true", ["custom.tpu", "number"]),
    ("true pairs of a source", "data.train={source: x, count: true}", ["data.train", "count", "number"]),
    ("a true beta", "loss.beta=true", ["loss.beta", "number"]),
    ("steps without end", f"training.max_steps={'9' * 30}", ["training.max_steps", "too large"]),
    ("a number of 5,000 digits", f"training.seed={'9' * 5000}", ["training.seed", "digits"]),
    ("a seed below 0", "training.seed=-1", ["training.seed", "0"]),
    ("a seed beyond numpy", f"training.seed={2**45}", ["training.seed", "4294967296"]),
    ("a date", "training.epochs=2024-01-01", ["training.epochs", "integer"]),
    ("an infinite decay", "training.weight_decay=.inf", ["training.weight_decay", "finite"]),
    ("an infinite rate", "training.learning_rate=.inf", ["training.learning_rate", "finite"]),
    ("a rate of 0", "training.learning_rate=0", ["training.learning_rate", "greater than 0"]),
    ("all steps warm up", "training.warmup=1", ["training.warmup", "less than 1"]),
    ("no wait that ends", "placement.wait_minutes=.inf", ["placement.wait_minutes", "finite"]),
    ("a wait of nan", "placement.wait_minutes=.nan", ["placement.wait_minutes", "finite"]),
    ("cpus of nan", "parallel.resources.cpu=.nan", ["parallel.resources.cpu", "finite"]),
    ("gpus without end", "parallel.resources.gpu=.inf", ["parallel.resources.gpu", "finite"]),
    ("a resource of nan", "parallel.resources.custom.tpu=.nan", ["custom.tpu", "finite"]),
    ("less of a resource than none", "parallel.resources.custom.tpu=-1", ["custom.tpu", "0"]),
    ("fewer cpus than none", "parallel.resources.cpu=-1", ["parallel.resources.cpu", "0"]),
    (
        "a resource of Ray's own",
        "parallel.resources.custom.CPU=1",
        ["parallel.resources", "'CPU'", "set cpu"],
    ),
    ("one and a half GPUs", "parallel.resources.gpu=1.5", ["parallel.resources", "1.5", "whole"]),
    ("less than Ray's least", "parallel.resources.cpu=1.0e-9", ["parallel.resources", "0.0001"]),
    ("a wait of ages", "placement.wait_minutes=1.0e+300", ["placement.wait_minutes", "525600"]),
    ("no workers", "parallel.workers=0", ["parallel.workers", "1"]),
    ("no replicas", "references.models.base.replicas=0", ["base.replicas", "1"]),
    ("an infinite alpha", "policy.adapter.alpha=.inf", ["policy.adapter.alpha", "finite"]),
    ("an adapter of no rank", "policy.adapter.r=0", ["policy.adapter.r", "1"]),
    ("an adapter that drops all", "policy.adapter.dropout=1", ["policy.adapter.dropout", "less than 1"]),
    ("no target modules", "policy.adapter.target_modules=[]", ["target_modules", "all-linear"]),
    ("an infinite load", "references.load_minutes=.inf", ["references.load_minutes", "finite"]),
    ("an answer in no time", "references.answer_minutes=0", ["references.answer_minutes", "0"]),
    ("a beta of nan", "loss.beta=.nan", ["loss.beta", "finite"]),
    ("a beta that is a word", "loss.beta=much", ["loss.beta", "much"]),
    ("a link that is a word", "loss.link=sigmoid", ["loss.link", "{type: sigmoid}"]),
    ("a link that does not exist", "loss.link={type: sigmid}", ["link", "sigmoid"]),
    ("a preset that is a list", "loss.preset=[dpo]", ["loss", "preset"]),
    ("a dispersion of nan", "loss.dispersion={type: constant, value: .nan}", ["loss.dispersion", "finite"]),
    ("weights that are words", "loss.references.weights=[a]", ["weights", "numbers"]),
    ("all pairs held out", "data.eval_fraction=1", ["eval_fraction", "0.05"]),
    ("a share of nan held out", "data.eval_fraction=.nan", ["eval_fraction", "finite"]),
    ("no room for a response", "data.max_length=64", ["max_length", "room for a response"]),
    ("a column of a column", "data.columns={chosn: a}", ["columns", "'chosn'", "'chosen'"]),
    ("columns that are a list", "data.columns=[chosen]", ["data.columns", "dictionary"]),
    ("no sources", "data.train=[]", ["data.train", "1"]),
    ("a source without a name", "data.train=[{count: 3}]", ["data.train", "source", "required"]),
    ("a source that is nothing", "data.train=[null]", ["data.train", "SourceConfig"]),
    ("a date that is none", "data.template_date=yesterday", ["data.template_date", "date"]),
    ("a judged set that is none", "evaluation.set=safety", ["evaluation.set", "safety", "data.eval"]),
    ("a metric that is none", "evaluation.metric=eval/acuracy", ["evaluation", "'eval/accuracy'"]),
    ("evaluations of no step", "evaluation.every_steps=0", ["evaluation.every_steps", "1"]),
    ("a reward without a budget", "evaluation.metric=eval/reward", ["evaluation", "reward", "function"]),
    ("two rewards", "evaluation.sampling.reward={function: 'a:b', model: c}", ["reward", "not both"]),
    ("the best of nothing", "evaluation.keep=all", ["evaluation.keep", "'best'"]),
    ("uses that are a number", "references.use=5", ["references.use", "tuple"]),
    ("uses of a list", "references.use=[[base]]", ["references.use", "string"]),
    ("uses that are none", "references.use=[bse]", ["references", "'base'"]),
    (
        "a reference that is nothing",
        "references.models.other=null",
        ["references.models.other", "dictionary"],
    ),
    ("a model that is blank", "policy.model='  '", ["policy.model", "empty"]),
    ("a model that is a list", "policy.model=[a]", ["policy.model", "string"]),
    ("a name of 300 characters", f"name={'a' * 300}", ["name", "100 characters"]),
    ("a name with a slash", "name=a/b", ["name", "a/b"]),
    ("a name of dots", "name=..", ["name", ".."]),
    ("a name of nothing", "name=''", ["name"]),
    ("a name that ends a line", 'name="case\\n"', ["name"]),
    ("the name of the scores", "name=scores", ["name", "scores", "another name"]),
    ("the name of the artifacts", "name=mlartifacts", ["name", "mlartifacts", "another name"]),
    ("the name of the database", "name=mlflow.db", ["name", "mlflow.db", "another name"]),
    ("the name of the database's log", "name=mlflow.db-wal", ["name", "mlflow.db", "another name"]),
    ("a bucket with one slash", "storage_path=s3:/bucket/runs", ["storage_path", "s3://bucket/runs"]),
    ("a scheme that is no store's", "storage_path=ftp://host/runs", ["storage_path", "ftp", "s3://"]),
    ("storage of nothing", "storage_path=''", ["storage_path", "1 character"]),
    ("the home of nobody", "storage_path=~nobody-at-all/runs", ["storage_path", "~nobody-at-all"]),
    ("a model in the home of nobody", "policy.model=~nobody-at-all/m", ["policy.model", "~nobody-at-all"]),
    ("data in the home of nobody", "data.train=~nobody-at-all/d", ["data.train", "~nobody-at-all"]),
    ("a NUL byte in a path", 'storage_path="runs\\0"', ["storage_path", "NUL"]),
    ("a NUL byte in a source", 'data.train="pairs\\0.jsonl"', ["data.train", "NUL"]),
    ("a value that is missing", "policy.model=???", ["policy.model", "???"]),
    ("a value of itself", "name=${name}", ["Recursive"]),
    ("a value of nothing", "name=${nothing.at.all}", ["nothing"]),
    ("half a value", "name=${nam", ["name"]),
    ("a section for a value", "name.first=x", ["name"]),
    ("a list for a section", "policy=[]", ["Cannot merge"]),
    ("nothing for a section", "policy=", ["policy", "dictionary"]),
    ("an override of 3,000 dots", f"{'a.' * 3000}a=1", ["override", "nested"]),
    ("an override nested 3,000 deep", f"name={'[' * 3000}{']' * 3000}", ["override", "nested"]),
    ("an override of an object", "name=!!python/object:os.system x", ["override", "constructor"]),
    ("an override with a mapping for a key", "name={[1]: 2}", ["override", "key"]),
    ("an override of no name", "=1", ["override", "field.name=value"]),
    ("an override of half a character", "name=\udcff", ["override"]),
    ("keep: best without held-out pairs", "data.eval_fraction=null\nevaluation.keep=best", ["keep", "eval"]),
    ("an alias that is reserved", "tracking.alias=latest", ["tracking.alias", "latest"]),
    ("an alias like a version", "tracking.alias=v1", ["tracking.alias", "v1"]),
    ("an alias with a space", "tracking.alias='my model'", ["tracking.alias", "my model"]),
    ("an alias of nothing", "tracking.alias=''", ["tracking.alias"]),
    ("an alias of 300 characters", f"tracking.alias={'a' * 300}", ["tracking.alias"]),
    (
        "a model name with a colon",
        "tracking.registered_model='a/b:c'",
        ["tracking.registered_model", "a/b:c"],
    ),
    ("a model name of nothing", "tracking.registered_model=''", ["tracking.registered_model"]),
    ("a model name of an alias", "tracking.registered_model=a@b", ["tracking.registered_model", "a@b"]),
    ("an experiment of nothing", "tracking.experiment=''", ["tracking.experiment"]),
    ("an experiment too long", f"tracking.experiment={'a' * 600}", ["tracking.experiment"]),
    ("a server of no scheme", "tracking.uri=mlflow.example", ["tracking.uri", "http://"]),
    ("a server of an unknown scheme", "tracking.uri=gopher://host", ["tracking.uri", "gopher"]),
    ("a server of no host", "tracking.uri=http://", ["tracking.uri", "http://"]),
    ("a port that is none", "tracking.uri=http://host:port", ["tracking.uri", "port"]),
    ("a server of nothing", "tracking.uri=''", ["tracking.uri"]),
]


@pytest.mark.parametrize(("overrides", "says"), [pytest.param(*case[1:], id=case[0]) for case in FIELDS])
def test_fields_are_refused(
    workplace: Workplace, commands: Commands, overrides: str, says: list[str]
) -> None:
    commands.refuse("check", workplace.file, *overrides.split("\n"), says=says)


def test_a_refusal_of_a_file_names_the_file(workplace: Workplace, commands: Commands) -> None:
    for field, value in [("weight_decay", float("inf")), ("seed", 2**70), ("max_steps", True)]:
        file = workplace.write_run(training={"max_steps": 1, field: value})
        commands.refuse("check", file, says=[f"run.yaml: training.{field}"])


def write_text(text: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(text) and None


def write_bytes(data: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(data) and None


def replace_by(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        file.unlink()
        make(file)

    return spoil


def anchor_bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


def insert_line(line: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(f"{file.read_text()}{line}\n") and None


FILES: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("nested 3,000 deep", write_text("a: " + "[" * 3000 + "]" * 3000), ["run.yaml", "nested"]),
    ("nested 100 deep", write_text("a: " + "[" * 100 + "]" * 100), ["run.yaml", "nested"]),
    ("mappings nested 100 deep", write_text("{a: " * 100 + "1" + "}" * 100), ["run.yaml", "nested"]),
    ("aliases that grow", write_text(anchor_bomb(9)), ["run.yaml", "expan"]),
    ("an alias of itself", write_text("a: &a [*a]"), ["run.yaml:1", "recursive"]),
    ("an alias of nothing", write_text("a: *b"), ["run.yaml:1", "alias"]),
    ("a section twice", insert_line("name: other"), ["run.yaml:", "duplicate", "name"]),
    ("a field twice", insert_line("placement: {wait_minutes: 1, wait_minutes: 2}"), ["duplicate"]),
    ("half a character", insert_line('tracking: {experiment: "\\ud800"}'), ["run.yaml"]),
    ("half a character's bytes", write_bytes(b"name: \xed\xa0\x80\n"), ["run.yaml", "utf-8"]),
    ("latin-1", write_bytes("name: café\n".encode("latin-1")), ["run.yaml", "utf-8"]),
    ("utf-16", write_bytes("name: case\n".encode("utf-16")), ["run.yaml"]),
    ("random bytes", write_bytes(bytes(range(256))), ["run.yaml"]),
    ("zeros", write_bytes(bytes(4096)), ["run.yaml"]),
    ("a number of 5,000 digits", insert_line(f"parallel: {{workers: {'9' * 5000}}}"), ["run.yaml", "digits"]),
    ("a tab", insert_line("\tparallel: 1"), ["run.yaml:"]),
    ("two documents", insert_line("---\nname: other"), ["run.yaml", "another document"]),
    ("an object", insert_line("parallel: !!python/object:os.system {}"), ["run.yaml:", "constructor"]),
    ("a mapping for a key", insert_line("? {a: b}\n: c"), ["run.yaml:", "key"]),
    ("a number", write_text("17"), ["run.yaml"]),
    ("a list", write_text("[name]"), ["run.yaml", "mapping"]),
    ("only comments", write_text("# nothing\n"), ["run.yaml", "required"]),
    ("a million lines", write_text("# nothing\n" * 10**6), ["run.yaml", "bytes"]),
    ("a folder", replace_by(Path.mkdir), ["run.yaml", "is a folder"]),
    ("a pipe", replace_by(os.mkfifo), ["run.yaml", "pipe"]),
    ("a link to itself", replace_by(lambda file: file.symlink_to(file)), ["run.yaml", "symbolic links"]),
    ("a link to nothing", replace_by(lambda file: file.symlink_to("nothing")), ["run.yaml", "no such file"]),
    ("a link to a device", replace_by(lambda file: file.symlink_to("/dev/zero")), ["run.yaml", "device"]),
    ("a field of 100,000 characters", insert_line(f"? {'a' * 100_000}\n: 1"), ["run.yaml", "unknown field"]),
    ("a value of 100,000 characters", insert_line(f"parallel: {'a' * 100_000}"), ["run.yaml: parallel"]),
    ("1,000 unknown fields", insert_line("\n".join(f"f{n}: 1" for n in range(1000))), ["run.yaml: f0"]),
]


@pytest.mark.parametrize(("spoil", "says"), [pytest.param(*case[1:], id=case[0]) for case in FILES])
def test_files_are_refused(
    workplace: Workplace, commands: Commands, spoil: Callable[[Path], None], says: list[str]
) -> None:
    spoil(workplace.file)
    commands.refuse("check", workplace.file, says=says)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a" * 300, ["name too long"]),
        ("run\0.yaml", ["no such file"]),
        ("~nobody-at-all/run.yaml", ["no such file"]),
        ("run.yaml/run.yaml", ["directory"]),
        ("", ["no such file"]),
        ("/dev/zero", ["device"]),
        ("\udcff.yaml", ["no such file"]),
    ],
    ids=[
        "300 characters",
        "NUL",
        "nobody's home",
        "a folder that is a file",
        "nothing",
        "device",
        "no UTF-8",
    ],
)
def test_names_of_files_are_refused(
    workplace: Workplace, commands: Commands, name: str, says: list[str]
) -> None:
    commands.refuse("check", name, says=says)


@pytest.mark.parametrize("command", ["train", "check", "score"])
def test_every_command_refuses_a_pipe(workplace: Workplace, commands: Commands, command: str) -> None:
    workplace.file.unlink()
    os.mkfifo(workplace.file)
    commands.refuse(command, workplace.file, says=["run.yaml", "pipe"])


@pytest.mark.parametrize("section", ["policy", "references", "data", "loss", "training", "tracking"])
@pytest.mark.parametrize("value", ["word", 3, [1], [{"a": 1}], {"unknown": 1}, True], ids=str)
def test_sections_of_another_type_are_refused(
    workplace: Workplace, commands: Commands, section: str, value: object
) -> None:
    content = workplace.run | {section: value}
    workplace.file.write_text(yaml.safe_dump(content))
    commands.refuse("check", workplace.file, says=[f"run.yaml: {section}"])
