"""The commands as users meet them: wrong input costs one clear message and exit 2, and leaves nothing."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from orchestrator.cli.main import run_command_line
from orchestrator.config.run import RunConfig

pytestmark = pytest.mark.usefixtures("cluster")

GOOD = [{"prompt": f"Film {n} is ", "chosen": "good.", "rejected": "dull!"} for n in range(8)]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Polyref = Callable[..., Outcome]


@pytest.fixture
def polyref(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Polyref:
    """`polyref("train", file, ...)` in this process."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["polyref", *map(str, arguments)])
        capfd.readouterr()
        code: Any = 0
        try:
            run_command_line()
        except SystemExit as left:
            code = left.code or 0
        printed = capfd.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call


@dataclass(frozen=True)
class Case:
    """A folder with a good run file over tiny models; `write` changes sections of it."""

    folder: Path
    run: dict[str, Any]

    @property
    def file(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    def rows(self, rows: Iterable[object]) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.folder / "pairs.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def write(self, **sections: Any) -> Path:
        run = dict(self.run)
        for section, value in sections.items():
            both = isinstance(value, dict) and isinstance(run.get(section), dict)
            run[section] = run[section] | value if both else value
        self.file.write_text(yaml.safe_dump(run))
        return self.file

    def left(self) -> list[str]:
        """What a refused run has left of itself; an empty registry and the lock of its name do no harm."""
        found = [*self.storage.rglob("*")] if self.storage.exists() else []
        return sorted({path.name for path in found} - {"mlflow.db", ".case.lock"})


@pytest.fixture
def case(tmp_path: Path, tiny_llama_folder: Path) -> Case:
    model = str(tiny_llama_folder)
    made = Case(
        tmp_path,
        {
            "name": "case",
            "policy": {"model": model, "adapter": {"r": 2, "alpha": 4}},
            "references": {"primary": "base", "models": {"base": {"model": model}}},
            "data": {
                "train": str(tmp_path / "pairs.jsonl"),
                "eval_fraction": 0.25,
                "max_length": 128,
                "max_prompt_length": 64,
            },
            "loss": {"preset": "dpo"},
            "training": {"max_steps": 1, "pairs_per_step": 4},
            "storage_path": str(tmp_path / "runs"),
        },
    )
    made.rows(GOOD)
    made.write()
    return made


def assert_refused(outcome: Outcome, case: Case, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("polyref: "), outcome.err
    assert outcome.err.count("polyref: ") == 1
    assert "Traceback" not in outcome.err + outcome.out
    for word in words:
        assert word in outcome.err
    assert case.left() == []


def row(**changes: Any) -> dict[str, Any]:
    changed = GOOD[2] | changes
    return {name: value for name, value in changed.items() if value is not ...}


CHAT = {
    "prompt": [{"role": "user", "content": "How is it?"}],
    "chosen": [{"role": "assistant", "content": "Good."}],
    "rejected": [{"role": "assistant", "content": "Dull!"}],
}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"prompt": "Film", "chosen": "go', ["JSON"]),
        ("[1, 2]", ["object"]),
        (row(rejected=...), ["rejected", "missing", "data.columns"]),
        (row(prompt=""), ["prompt"]),
        (row(chosen="  "), ["chosen", "empty"]),
        (row(chosen=7), ["chosen", "7"]),
        (row(rejected=["dull!"]), ["rejected"]),
        (row(rejected="good."), ["same"]),
        (row(soft_label=1.5), ["soft_label", "1.5", "0", "1"]),
        (row(soft_label=-0.1), ["soft_label", "-0.1"]),
        (row(soft_label=math.nan), ["soft_label", "nan"]),
        (row(soft_label="high"), ["soft_label", "high"]),
        (row(votes_chosen=0, votes_rejected=0), ["votes"]),
        ({**CHAT, "prompt": [{"role": "user", "text": "?"}]}, ["content"]),
        ({**CHAT, "chosen": "Good."}, ["chosen and rejected", "message lists"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:60],
)
def test_a_bad_row_is_named_by_file_and_line(
    bad: object, words: list[str], case: Case, polyref: Polyref
) -> None:
    case.rows([*GOOD[:2], bad, *GOOD[3:]])
    assert_refused(polyref("train", case.file), case, "pairs.jsonl:3: ", "on_bad_row: skip", *words)


def test_a_misspelt_column_is_refused_even_where_bad_rows_are_skipped(case: Case, polyref: Polyref) -> None:
    case.rows([*GOOD, row(soft_lable=0.9)])
    outcome = polyref("train", case.file, "data.on_bad_row=skip")
    assert_refused(
        outcome, case, "pairs.jsonl:9", "'soft_lable' is nearly 'soft_label'", "data.columns", "ignore"
    )


def test_a_row_too_long_stops_where_that_was_asked(case: Case, polyref: Polyref) -> None:
    case.rows([*GOOD, row(prompt="word " * 20)])
    outcome = polyref("train", case.file, "data.on_long_row=stop")
    assert_refused(
        outcome, case, "pairs.jsonl:9: ", "the policy", "100", "64", "data.max_prompt_length", "truncate"
    )


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda file: file.write_text(""), ["no rows", "data.train"]),
        (lambda file: file.unlink(), ["no such file", "data.train"]),
        (lambda file: file.write_bytes(b'{"prompt": "caf\xe9"}\n'), ["pairs.jsonl", "UTF-8"]),
    ],
    ids=["empty", "missing", "latin-1"],
)
def test_a_data_file_that_cannot_be_used(
    write: Callable[[Path], Any], words: list[str], case: Case, polyref: Polyref
) -> None:
    write(case.folder / "pairs.jsonl")
    assert_refused(polyref("train", case.file), case, "pairs.jsonl", *words)


def test_conversations_need_a_chat_template(case: Case, tiny_gpt2_folder: Path, polyref: Polyref) -> None:
    case.rows([{**CHAT, "prompt": [{"role": "user", "content": f"How is {n}?"}]} for n in range(8)])
    models = {"base": case.run["references"]["models"]["base"], "plain": {"model": str(tiny_gpt2_folder)}}
    references = {"primary": "base", "models": models}
    case.write(references=references, loss={"preset": "mrpo"})
    outcome = polyref("train", case.file)
    assert_refused(outcome, case, "pairs.jsonl:", "reference plain", "chat template", "set chat_template")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"loss": {"preset": "dpoo"}}, ["run.yaml: loss", "did you mean", "'dpo'"]),
        ({"loss": "dpo"}, ["run.yaml: loss", "preset"]),
        ({"loss": None}, ["run.yaml: loss"]),
        ({"loss": {"preset": "dpo", "referneces": {}}}, ["run.yaml: loss", "referneces", "references"]),
        ({"trainig": {}}, ["run.yaml: trainig", "did you mean 'training'"]),
        ({"training": {"max_step": 3}}, ["run.yaml: training.max_step", "did you mean 'max_steps'"]),
        ({"training": "long"}, ["run.yaml: training", "long"]),
        ({"policy": {"adapter": {"rank": 4}}}, ["run.yaml: policy.adapter.rank", "unknown field"]),
        ({"references": ["base"]}, ["run.yaml: references"]),
        ({"references": {"models": {"base": "llama"}}}, ["run.yaml: references.models.base", "llama"]),
        ({"loss": {"preset": "mrpo"}}, ["run.yaml", "needs 2 reference(s), references.models has 1"]),
        ({"references": {"primary": "bse"}}, ["run.yaml: references", "did you mean 'base'"]),
        ({"data": {"eval": "held.jsonl"}}, ["run.yaml: data", "eval_fraction", "keep one"]),
        ({"data": {"max_prompt_length": 128}}, ["run.yaml: data", "max_length", "room for a response"]),
        ({"policy": {"model": "/nowhere/llama"}}, ["policy: ", "/nowhere/llama", "no such file or folder"]),
        (
            {"references": {"models": {"base": {"model": "./llama"}}}},
            ["references.models.base: ", "./llama", "no such file or folder"],
        ),
        ({"policy": {"chat_template": "chat.jinja"}}, ["policy: ", "chat.jinja", "no such file"]),
        (
            {"references": {"models": {"base": {"model": "models:/nope@champion"}}}},
            ["references.models.base", "nope", "registry is empty"],
        ),
        ({"policy": {"model": "models:/nope"}}, ["policy", "nope"]),
        (
            {"tracking": {"uri": "http://127.0.0.1:1"}},
            ["http://127.0.0.1:1", "does not answer", "tracking.uri"],
        ),
        ({"tracking": {"uri": "file:./mlruns"}}, ["tracking.uri", "sqlite:///"]),
        ({"storage_path": "s3://bucket/runs"}, ["storage_path", "s3://bucket/runs", "tracking.uri"]),
        (
            {"parallel": {"workers": 9, "resources": {"cpu": 1}}},
            ["needs 9.1 CPUs: 1 reference x 0.1 + 9 workers; the cluster has 4", "parallel.workers"],
        ),
        (
            {"references": {"models": {"base": {"model": "@", "resources": {"gpu": 1}}}}},
            ["needs 1 GPU", "the cluster has 0"],
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else json.dumps(value)[:70],
)
def test_a_run_that_cannot_work_is_refused(
    sections: dict[str, Any], words: list[str], case: Case, polyref: Polyref, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(case.folder)
    before = set(case.folder.iterdir())
    asked = json.loads(json.dumps(sections).replace('"@"', json.dumps(case.run["policy"]["model"])))
    assert_refused(polyref("train", case.write(**asked)), case, *words)
    assert {path.name for path in set(case.folder.iterdir()) - before} <= {"runs"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["run.yaml: no such file", "polyref init"]),
        ("name: a\nloss: {preset: dpo\n", ["run.yaml:3", "not valid YAML"]),
        ("- name: a\n", ["run.yaml", "mapping of sections"]),
        ("just words", ["run.yaml: just words", "unknown field", "known are name, policy"]),
        ("", ["run.yaml", "required"]),
        ("name: ${nothing}\n", ["run.yaml", "nothing"]),
        ("1: 2\n", ["run.yaml: 1"]),
        ("policy: {1: 2}\n", ["run.yaml: policy.1"]),
    ],
    ids=lambda value: None if isinstance(value, list) else repr(value),
)
def test_a_run_file_that_is_none(text: str | None, words: list[str], case: Case, polyref: Polyref) -> None:
    case.file.unlink() if text is None else case.file.write_text(text)
    for command in ("train", "check", "score"):
        assert_refused(polyref(command, case.file), case, *words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.beta", ["'loss.beta'", "field.name=value"]),
        ("loss.beta=many", ["loss.beta", "many"]),
        ("los.beta=1", ["los", "did you mean 'loss'"]),
        ("data.columns={", ["data.columns={"]),
        ("name.first=x", ["run.yaml: name"]),
    ],
)
def test_a_wrong_override(override: str, words: list[str], case: Case, polyref: Polyref) -> None:
    assert_refused(polyref("train", case.file, override), case, *words)


def test_storage_that_cannot_be_written(case: Case, polyref: Polyref) -> None:
    case.storage.write_text("a file where the folder should be")
    outcome = polyref("train", case.file)
    assert outcome.code == 2
    assert f"storage_path {case.storage} cannot be written" in outcome.err
    assert "name a folder" in outcome.err
    assert case.storage.is_file()


def test_a_submitted_job_needs_storage_that_outlives_it(
    case: Case, polyref: Polyref, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(case.folder)
    outcome = polyref("train", case.write(storage_path="./runs"))
    assert_refused(outcome, case, "storage_path ./runs is relative", "absolute path", "nodes")


def test_a_refused_fresh_start_keeps_the_earlier_run(case: Case, polyref: Polyref) -> None:
    kept = case.storage / "case" / "run.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    for override in ("policy.model=/nowhere", "parallel.workers=99", "tracking.uri=http://127.0.0.1:1"):
        assert polyref("train", case.file, override, "--fresh").code == 2
        assert kept.read_text() == "{}"


def run_apart(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_process_of_its_own_says_it_in_one_line(case: Case) -> None:
    case.rows([*GOOD, row(soft_label=2)])
    done = run_apart("train", case.file, folder=case.folder)
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), case, "pairs.jsonl:9: ", "soft_label")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_wrong_run_file_is_refused_without_a_heavy_import(case: Case) -> None:
    case.write(loss={"preset": "dpo", "beta": -1})
    script = (
        "import sys; from orchestrator.cli.main import run_command_line\n"
        "try: run_command_line()\n"
        "finally: assert not {'torch', 'ray', 'transformers', 'mlflow'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "train", str(case.file)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert_refused(outcome, case, "run.yaml: loss.beta: ", "must be > 0", "got -1", "try 0.1")


def test_help_version_and_schema(polyref: Polyref) -> None:
    assert polyref("--version").out.startswith("polyref ")
    helped = polyref("--help")
    assert helped.code == 0
    assert all(command in helped.out for command in ("train", "score", "check", "schema", "models", "demo"))
    schema = json.loads(polyref("schema", "run").out)
    Draft202012Validator.check_schema(schema)
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    Draft202012Validator(schema).validate({"name": "a", "policy": {"model": "m"}} | _MINIMAL)
    assert not Draft202012Validator(schema).is_valid({"name": "a", "policy": {"model": "m"}})
    assert_no_schema = polyref("schema", "sweeep")
    assert assert_no_schema.code == 2
    assert "sweeep" in assert_no_schema.err


_MINIMAL = {
    "data": {"train": "train.jsonl"},
    "loss": {"preset": "dpo", "beta": 0.2},
    "references": {"primary": "base", "models": {"base": {"model": "m"}}},
}


def test_check_score_and_train_a_good_run(case: Case, polyref: Polyref) -> None:
    bad = [row(rejected=...), row(soft_label=7), row(prompt="word " * 20)]
    case.rows([*GOOD, *bad, row(prompt="Film x is ", soft_label=0.25)])
    case.write(data={"on_bad_row": "skip"})

    checked = polyref("check", case.file)
    assert (checked.code, checked.err) == (0, "")
    assert "case: nothing to refuse" in checked.out
    assert re.search(r"^ddp \* .*^ZeRO-3 .*^reference \w+: [\d.]+ GiB a replica", checked.out, re.M | re.S)
    assert "1 swapped" in checked.out
    assert "1 skipped (missing field)" in checked.out
    assert "1 skipped (bad soft label)" in checked.out
    assert "1 skipped (too long for the policy)" in checked.out
    assert case.left() == []

    scored = polyref("score", case.file)
    assert (scored.code, scored.err) == (0, "")
    assert list(case.storage.glob("scores/*/*.parquet"))
    assert not (case.storage / "case").exists()

    trained = polyref("train", case.file)
    assert trained.code == 0, trained.err
    record = json.loads((case.storage / "case" / "run.json").read_text())
    assert record["reference_counts"]["base"]["scored"] == 0
    assert record["reference_counts"]["base"]["replicas_started"] == 0
    assert record["finished"]
    assert sum(counts["pairs"] for counts in record["counts"].values()) == len(GOOD) + 1
    assert record["counts"]["train"]["skipped"]["missing field"] == 1


@pytest.mark.parametrize("override", ["tracking=http://me:hunter2@mlflow", "s3://KEY:hunter2@bucket/runs"])
def test_a_message_about_a_wrong_field_hides_its_password(
    case: Case, polyref: Polyref, override: str
) -> None:
    outcome = polyref("train", case.file, override)
    assert outcome.code == 2
    assert "***@" in outcome.err
    assert "hunter2" not in outcome.err


@pytest.mark.parametrize("command", ["check", "train"])
def test_soft_labels_that_no_pair_has_are_refused(command: str, case: Case, polyref: Polyref) -> None:
    words = ("case: ", "soft_label.type geometric", "preset gdpo", "vote counts", "allow_hard_labels: true")
    assert_refused(polyref(command, case.write(loss={"preset": "gdpo"})), case, *words)


def test_soft_labels_that_no_pair_has_may_be_allowed(case: Case, polyref: Polyref) -> None:
    allowed = case.write(loss={"preset": "gdpo"}, data={"allow_hard_labels": True})
    assert polyref("check", allowed).code == 0
    case.rows([*GOOD, *(row(prompt=f"Film {n} was ", soft_label=0.75) for n in range(8))])
    outcome = polyref("check", case.write(loss={"preset": "gdpo"}))
    assert outcome.code == 0, outcome


def test_a_search_that_draws_soft_labels_that_no_pair_has_is_refused(case: Case, polyref: Polyref) -> None:
    def sweep_of(*presets: str) -> Path:
        sweep = {
            "name": "case",
            "run": case.run | {"loss": {"preset": "gdpo"}},
            "space": {"loss.preset": {"grid": list(presets)}},
            "search": {"algorithm": "grid"},
        }
        file = case.folder / "sweep.yaml"
        file.write_text(yaml.safe_dump(sweep))
        return file

    assert_refused(polyref("tune", sweep_of("dpo", "gipo")), case, "gipo", "allow_hard_labels: true")
    outcome = polyref("tune", "--dry-run", sweep_of("dpo", "ipo"))
    assert outcome.code == 0, "no trial has the run file's own loss" + outcome.err
