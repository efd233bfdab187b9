"""Records of runs, searches and trials that cannot be resumed from: refused before Ray is started."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.run import load_run
from orchestrator.config.sweep import load_sweep
from orchestrator.driver.record import VERSION, RunRecord
from orchestrator.files import dump_record
from orchestrator.search.journal import VERSION as TRIAL_VERSION
from orchestrator.search.journal import TrialRecord
from tests.support.bad_inputs import Commands, Workplace

Spoil = Callable[[Path], Any]


def change(**fields: Any) -> Spoil:
    """Change fields of a record, which then looks like one from before digests; `...` removes one."""

    def spoil(file: Path) -> None:
        content = json.loads(file.read_text()) | {"sha256": ...} | fields
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return spoil


def change_config(**sections: Any) -> Spoil:
    def spoil(file: Path) -> None:
        content = json.loads(file.read_text())
        content["config"] |= sections
        del content["sha256"]
        file.write_text(json.dumps(content))

    return spoil


def write(text: str | bytes) -> Spoil:
    return lambda file: file.write_bytes(text if isinstance(text, bytes) else text.encode())


def replace_by(make: Spoil) -> Spoil:
    def spoil(file: Path) -> None:
        file.unlink()
        make(file)

    return spoil


def put_beside(name: str, make: Spoil) -> Spoil:
    return lambda file: make(file.parent / name)


ANY_RECORD: list[tuple[str, Spoil, list[str]]] = [
    ("nothing", write(""), ["damaged"]),
    ("half of it", lambda file: file.write_text(file.read_text()[:200]), ["damaged"]),
    ("random bytes", write(bytes(range(256))), ["damaged"]),
    ("zeros", write(bytes(4096)), ["damaged"]),
    ("a list", write("[]\n[]"), ["damaged"]),
    ("a list of lists", write("[[1, 2]]"), ["damaged"]),
    ("a word", write('"run"'), ["damaged"]),
    ("null", write("null"), ["damaged"]),
    ("another program's", write('{"a": 1}'), ["another program", "a"]),
    ("another field", change(colour="red"), ["another program", "colour"]),
    ("nested 100,000 deep", write("[" * 100_000), ["damaged"]),
    ("a number of 5,000 digits", write('{"version": ' + "9" * 5000 + "}"), ["damaged"]),
    ("another digit", lambda file: file.write_text(file.read_text().replace("1", "2", 1)), ["not what was"]),
    ("a field twice", lambda file: file.write_text('{"version": 1, ' + file.read_text()[1:]), ["twice"]),
    ("a later version", change(version=99), ["version 99", "polyref that wrote it"]),
    ("a version that is a word", change(version="new"), ["damaged", "new"]),
    ("a version that is a list", change(version=[]), ["damaged"]),
    ("a version of nothing", change(version=None), ["damaged"]),
    ("a folder", replace_by(Path.mkdir), []),
    ("a pipe", replace_by(os.mkfifo), ["run.json", "file"]),
    ("a link to itself", replace_by(lambda file: file.symlink_to(file)), ["run.json"]),
    ("a link to a device", replace_by(lambda file: file.symlink_to("/dev/zero")), ["run.json"]),
]
RUN_RECORDS: list[tuple[str, Spoil, list[str]]] = [
    ("no config", change(config=...), ["config"]),
    ("a config that is a list", change(config=[]), ["config", "dictionary"]),
    ("a config that is nothing", change(config=None), ["config", "dictionary"]),
    ("a policy that is a word", change_config(policy="llama"), ["config.policy"]),
    ("references that are a list", change_config(references=[1]), ["config.references"]),
    ("models that are a list", change_config(references={"models": [1]}), ["config.references.models"]),
    ("a model that is a word", change_config(references={"models": {"base": "m"}}), ["references.models"]),
    ("data that is a word", change_config(data="pairs"), ["config.data"]),
    ("a date that is none", change_config(data={"template_date": "today"}), ["config.data.template_date"]),
    ("a date that is a number", change_config(data={"template_date": 3}), ["config.data.template_date"]),
    ("pins that are a list", change(pins=[1]), ["pins", "dictionary"]),
    ("a pin that is a number", change(pins={"policy": 3}), ["pins.policy", "string"]),
    ("identity that is a word", change(identity="abc"), ["identity", "dictionary"]),
    ("no identity", change(identity=...), ["identity", "required"]),
    ("counts that are a number", change(counts=3), ["counts", "dictionary"]),
    ("a device that is a list", change(device_type=[]), ["device_type", "string"]),
    ("a result that is a word", change(result="done"), ["damaged"]),
    ("a result of another end", change(result={"status": "great"}), ["result.status"]),
    ("a result of another field", change(result={"status": "done", "colour": 1}), ["colour"]),
    ("a step that is a word", change(result={"status": "done", "step": "two"}), ["result.step", "integer"]),
    ("metrics that are words", change(result={"status": "done", "metrics": {"a": "b"}}), ["metrics.a"]),
    ("scores that are words", change(reference_counts={"base": {"scored": "x"}}), ["reference_counts"]),
    ("a trial that is a word", change(best_trial="x"), ["best_trial", "integer"]),
    ("an end that is a word", change(finished="perhaps"), ["finished", "boolean"]),
    ("an MLflow run that is a number", change(mlflow_run=3), ["mlflow_run", "string"]),
    ("metrics in a folder", put_beside("metrics.jsonl", Path.mkdir), ["metrics.jsonl", "move it away"]),
    ("metrics in a pipe", put_beside("metrics.jsonl", os.mkfifo), ["metrics.jsonl", "move it away"]),
    ("scales in a folder", put_beside("dispersion.json", Path.mkdir), ["dispersion.json", "move it away"]),
    ("weights in a folder", put_beside("best.safetensors", Path.mkdir), ["best.safetensors"]),
    ("checkpoints in a file", put_beside("checkpoints", Path.touch), ["checkpoints", "move it away"]),
    ("an export in a file", put_beside("export", Path.touch), ["export", "move it away"]),
    ("plots in a pipe", put_beside("plots", os.mkfifo), ["plots", "move it away"]),
]


@pytest.fixture
def record(workplace: Workplace) -> Path:
    """The record of a run that has been started."""
    file = workplace.storage / "case" / "run.json"
    file.parent.mkdir(parents=True)
    config = load_run(workplace.file).model_dump(mode="json")
    started = RunRecord(config=config, device_type="cpu", identity={}, pins={}, counts={})
    file.write_text(dump_record(started, version=VERSION))
    return file


@pytest.mark.parametrize(
    ("spoil", "says"), [pytest.param(*case[1:], id=case[0]) for case in ANY_RECORD + RUN_RECORDS]
)
def test_records_of_runs_are_refused(
    workplace: Workplace, commands: Commands, record: Path, spoil: Spoil, says: list[str]
) -> None:
    spoil(record)
    commands.refuse("check", workplace.file, says=[str(record.parent), *says])


@pytest.mark.parametrize("command", ["train", "train --fresh", "score"])
def test_every_command_refuses_a_damaged_record(
    workplace: Workplace, commands: Commands, record: Path, command: str
) -> None:
    record.write_text('{"version": 3')
    commands.refuse(*command.split(), workplace.file, says=["run.json", "damaged"])


def test_a_folder_that_is_a_file_is_refused(workplace: Workplace, commands: Commands) -> None:
    workplace.storage.mkdir()
    (workplace.storage / "case").touch()
    commands.refuse("train", workplace.file, says=["runs/case", "folder", "move it away"])


def test_a_lock_that_is_a_folder_is_refused(workplace: Workplace, commands: Commands) -> None:
    (workplace.storage / ".case.lock").mkdir(parents=True)
    commands.refuse("train", workplace.file, says=[".case.lock", "move away"])


@pytest.fixture
def search_record(workplace: Workplace) -> Path:
    """The record of a search that has been started; `sweep.yaml` is its sweep file."""
    sweep = {
        "name": "search",
        "run": "run.yaml",
        "space": {"loss.beta": {"uniform": [0.1, 0.5]}},
        "search": {"trials": 2},
    }
    path = workplace.folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    config = load_sweep(path).model_dump(mode="json") | {
        "run": load_run(workplace.file).model_dump(mode="json")
    }
    file = workplace.storage / "search" / "run.json"
    file.parent.mkdir(parents=True)
    started = RunRecord(config=config, device_type="cpu", identity={}, pins={}, counts={})
    file.write_text(dump_record(started, version=VERSION))
    return file


SEARCH_RECORDS: list[tuple[str, Spoil, list[str]]] = [
    ("a run that is a word", change_config(run="run.yaml"), ["config.run"]),
    ("a run that is nothing", change_config(run=None), ["config.run"]),
    ("a policy that is a word", change_config(run={"policy": "m"}), ["config.policy"]),
    ("search that is a word", change_config(search="random"), ["config.search"]),
    ("trials in a file", put_beside("trials", Path.touch), ["trials", "move it away"]),
    ("Tune's state in a file", put_beside(".tune", Path.touch), [".tune", "move it away"]),
    ("a table in a folder", put_beside("trials.csv", Path.mkdir), ["trials.csv", "move it away"]),
]


@pytest.mark.parametrize(
    ("spoil", "says"), [pytest.param(*case[1:], id=case[0]) for case in ANY_RECORD[:8] + SEARCH_RECORDS]
)
def test_records_of_searches_are_refused(
    commands: Commands, search_record: Path, spoil: Spoil, says: list[str]
) -> None:
    spoil(search_record)
    commands.refuse("tune", "sweep.yaml", says=[str(search_record.parent), *says])


def test_a_run_is_no_search(commands: Commands, record: Path, search_record: Path) -> None:
    search_record.write_text(record.read_text())
    commands.refuse("tune", "sweep.yaml", says=["training run's folder", "another name"])
    commands.refuse("tune", "sweep.yaml", "--fresh", says=["folder of a run", "another name"])


TRIAL_RECORDS: list[tuple[str, Spoil, list[str]]] = [
    ("no number", change(number=...), ["number", "required"]),
    ("a number that is a word", change(number="one"), ["number", "integer"]),
    ("another number", change(number=7), ["trial 0007", "move the folder away"]),
    ("a status that is none", change(status="asleep"), ["status", "'pending'"]),
    ("a point that is a list", change(point=[1]), ["point", "dictionary"]),
    ("a result of words", change(result={"eval/accuracy": "high"}), ["result.eval/accuracy", "number"]),
    ("a result of nothing", change(result={"eval/accuracy": None}), ["result.eval/accuracy", "number"]),
    ("a step that is a word", change(step="x"), ["step", "integer"]),
    ("a reason that is a list", change(reason=[1]), ["reason", "string"]),
]


@pytest.mark.parametrize(
    ("spoil", "says"), [pytest.param(*case[1:], id=case[0]) for case in ANY_RECORD + TRIAL_RECORDS]
)
def test_records_of_trials_are_refused(
    commands: Commands, search_record: Path, spoil: Spoil, says: list[str]
) -> None:
    file = search_record.parent / "trials" / "0001" / "trial.json"
    file.parent.mkdir(parents=True)
    file.write_text(dump_record(TrialRecord(number=1, point_id=1), version=TRIAL_VERSION))
    spoil(file)
    says = [word for word in says if word not in ("run.json", "file")]
    commands.refuse("tune", "sweep.yaml", says=["0001/trial.json", *says])
