"""Inputs of `label`, `dispersion`, `init` and reward models that cannot be used: refused by one line each."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import LlamaForSequenceClassification

from tests.support import tiny
from tests.support.bad_inputs import ROWS, Commands, Workplace

Make = Callable[[Path], object]
JUDGE = ["--judge", "{model}"]
TO = ["--to", "out.parquet"]


@pytest.fixture(scope="module")
def tiny_classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text classifier with the two outputs LABEL_0 and LABEL_1."""
    model = LlamaForSequenceClassification(tiny.llama_config(num_labels=2))
    return tiny.save(tmp_path_factory.mktemp("tiny") / "classifier", model, tiny.byte_tokenizer())


def nothing(folder: Path) -> None:
    pass


def write(name: str, content: bytes | str) -> Make:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def write_table(name: str) -> Make:
    return lambda folder: pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), folder / name)


def mix_text_and_messages(folder: Path) -> None:
    chat = {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
    }
    (folder / "pairs.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{json.dumps(chat)}\n")


LABEL: list[tuple[str, list[str], Make, list[str]]] = [
    # name, arguments, what is made in the working folder, words of the message
    ("no source", ["none.jsonl", *TO, *JUDGE], nothing, ["none.jsonl", "no such file"]),
    ("an empty name", ["", *TO, *JUDGE], nothing, ["empty"]),
    ("a cut source", ["a.jsonl.gz", *TO, *JUDGE], write("a.jsonl.gz", b"\x1f\x8b\x08\0"), ["a.jsonl.gz"]),
    ("a pipe", ["a.jsonl", *TO, *JUDGE], lambda f: os.mkfifo(f / "a.jsonl"), ["a.jsonl", "pipe"]),
    ("a bad row", ["a.jsonl", *TO, *JUDGE], write("a.jsonl", '{"prompt": '), ["a.jsonl:1", "JSON"]),
    (
        "half a character",
        ["a.jsonl", *TO, *JUDGE],
        write("a.jsonl", r'{"prompt": "\ud800"}'),
        ["a.jsonl:1", "half"],
    ),
    ("bad rows only", ["a.jsonl", *TO, *JUDGE, "--skip-bad-rows"], write("a.jsonl", "7"), ["no row is left"]),
    ("text and messages", ["pairs.jsonl", *TO, *JUDGE], mix_text_and_messages, ["plain text", "messages"]),
    (
        "a completion without a rival",
        ["a.jsonl", *TO, *JUDGE],
        write("a.jsonl", '{"prompt": "a", "completion": "b"}'),
        ["a preference needs"],
    ),
    ("no judge", ["pairs.jsonl", *TO], nothing, ["--judge"]),
    ("a judge that is not there", ["pairs.jsonl", *TO, "--judge", "./none"], nothing, ["--judge", "./none"]),
    (
        "a judge that is a file",
        ["pairs.jsonl", *TO, "--judge", "pairs.jsonl"],
        nothing,
        ["--judge", "pairs.jsonl"],
    ),
    ("an empty judge", ["pairs.jsonl", *TO, "--judge", ""], nothing, ["--judge"]),
    ("a weight of 0", ["pairs.jsonl", *TO, "--judge", "{model}=0"], nothing, ["weight"]),
    ("a weight of NaN", ["pairs.jsonl", *TO, "--judge", "{model}=nan"], nothing, ["weight"]),
    (
        "a registered judge that is not there",
        ["pairs.jsonl", *TO, "--judge", "models:/none/1"],
        nothing,
        ["none"],
    ),
    (
        "a reward model that writes",
        ["pairs.jsonl", *TO, "--reward", "{model}"],
        nothing,
        ["--reward", "no classifier"],
    ),
    (
        "a reward model of two outputs",
        ["pairs.jsonl", *TO, "--reward", "{classifier}"],
        nothing,
        ["--reward", "2 outputs"],
    ),
    (
        "a judge that classifies",
        ["pairs.jsonl", *TO, "--judge", "{classifier}"],
        nothing,
        ["--judge", "missing"],
    ),
    ("another output", ["pairs.jsonl", "--to", "out.csv", *JUDGE], nothing, ["out.csv", ".parquet"]),
    (
        "an output that is a text",
        ["pairs.jsonl", *TO, *JUDGE],
        write("out.parquet", "mine"),
        ["out.parquet", "did not write"],
    ),
    (
        "an output of another program",
        ["pairs.jsonl", *TO, *JUDGE],
        write_table("out.parquet"),
        ["out.parquet", "did not write"],
    ),
    (
        "an output that is a folder",
        ["pairs.jsonl", *TO, *JUDGE],
        lambda f: (f / "out.parquet").mkdir(),
        ["out.parquet"],
    ),
    (
        "an output that is a pipe",
        ["pairs.jsonl", *TO, *JUDGE],
        lambda f: os.mkfifo(f / "out.parquet"),
        ["out.parquet"],
    ),
    ("an output below a file", ["pairs.jsonl", "--to", "run.yaml/out.parquet", *JUDGE], nothing, ["--to"]),
    ("one answer", ["pairs.jsonl", *TO, *JUDGE, "--answers", "A"], nothing, ["--answers"]),
    ("equal answers", ["pairs.jsonl", *TO, *JUDGE, "--answers", "A,A"], nothing, ["--answers"]),
    ("answers of several tokens", ["pairs.jsonl", *TO, *JUDGE, "--answers", "Yes,No"], nothing, ["single"]),
    (
        "answers with half a character",
        ["pairs.jsonl", *TO, *JUDGE, "--answers", "A,\udc80"],
        nothing,
        ["half"],
    ),
    (
        "a temperature of NaN",
        ["pairs.jsonl", *TO, *JUDGE, "--temperature", "nan"],
        nothing,
        ["--temperature"],
    ),
    (
        "no template of that name",
        ["pairs.jsonl", *TO, *JUDGE, "--template", "helpful"],
        nothing,
        ["--template"],
    ),
    (
        "a binary template",
        ["pairs.jsonl", *TO, *JUDGE, "--template", "t"],
        write("t", b"\xff"),
        ["--template t"],
    ),
    (
        "an empty template",
        ["pairs.jsonl", *TO, *JUDGE, "--template", "t"],
        write("t", ""),
        ["{prompt}", "missing"],
    ),
    (
        "a template with another word",
        ["pairs.jsonl", *TO, *JUDGE, "--template", "t"],
        write("t", "{promt}"),
        ["{promt}", "did you mean"],
    ),
    (
        "a template that is a pipe",
        ["pairs.jsonl", *TO, *JUDGE, "--template", "t"],
        lambda f: os.mkfifo(f / "t"),
        ["--template t"],
    ),
    (
        "a URL that is none",
        ["pairs.jsonl", *TO, "--judge-url", "http://", "--judge-model", "m"],
        nothing,
        ["--judge-url"],
    ),
    (
        "a URL without a port's number",
        ["pairs.jsonl", *TO, "--judge-url", "http://a:b/v1", "--judge-model", "m"],
        nothing,
        ["--judge-url"],
    ),
    ("split of a file that has none", ["run.yaml", *TO, *JUDGE, "--split", "test"], nothing, ["--split"]),
]


@pytest.mark.parametrize(
    ("arguments", "make", "says"), [pytest.param(*case[1:], id=case[0]) for case in LABEL]
)
def test_label_refuses(
    workplace: Workplace,
    commands: Commands,
    tiny_llama_folder: Path,
    tiny_classifier_folder: Path,
    arguments: list[str],
    make: Make,
    says: list[str],
) -> None:
    make(workplace.folder)
    models = {"{model}": str(tiny_llama_folder), "{classifier}": str(tiny_classifier_folder)}
    for name, folder in models.items():
        arguments = [argument.replace(name, folder) for argument in arguments]
    commands.refuse("label", *arguments, says=says)


def test_label_names_a_damaged_judge(
    workplace: Workplace, commands: Commands, tiny_llama_folder: Path
) -> None:
    shutil.copytree(tiny_llama_folder, workplace.folder / "judge")
    (workplace.folder / "judge" / "model.safetensors").write_bytes(b"")
    for option in ("--judge", "--reward"):
        says = [option, "model.safetensors", "header"]
        commands.refuse("label", "pairs.jsonl", *TO, option, "judge", says=says)


OTHER_COMMANDS: list[tuple[str, list[str], Make, list[str]]] = [
    ("dispersion of no split", ["dispersion", "run.yaml", "--split", "test"], nothing, ["--split test"]),
    (
        "dispersion into a text",
        ["dispersion", "run.yaml", "--to", "a.txt"],
        write("a.txt", "mine"),
        ["a.txt", "not replaced"],
    ),
    (
        "dispersion into a foreign table",
        ["dispersion", "run.yaml", "--to", "a.parquet"],
        write_table("a.parquet"),
        ["a.parquet"],
    ),
    (
        "dispersion into a folder",
        ["dispersion", "run.yaml", "--to", "a"],
        lambda f: (f / "a").mkdir(),
        ["a: ", "not replaced"],
    ),
    (
        "dispersion into a pipe",
        ["dispersion", "run.yaml", "--to", "a"],
        lambda f: os.mkfifo(f / "a"),
        ["a: ", "not replaced"],
    ),
    (
        "dispersion below a file",
        ["dispersion", "run.yaml", "--to", "pairs.jsonl/a"],
        nothing,
        ["--to", "pairs.jsonl"],
    ),
    (
        "dispersion of a bad row",
        ["dispersion", "run.yaml"],
        write("pairs.jsonl", "[" * 5000),
        ["pairs.jsonl", "nested"],
    ),
    ("data show of overrides", ["data", "show", "pairs.jsonl", "a=1"], nothing, ["a=1"]),
    ("data show of a bad row", ["data", "show", "run.yaml"], write("pairs.jsonl", "7"), ["pairs.jsonl"]),
    (
        "data show of no split",
        ["data", "show", "f", "--split", "dev"],
        lambda f: ((f / "f").mkdir(), write("train.csv", "a")(f / "f")),
        ["dev"],
    ),
    ("init of nothing", ["init", "--data", "none.jsonl", "--to", "new.yaml"], nothing, ["none.jsonl"]),
    ("init of an empty name", ["init", "--data", "", "--to", "new.yaml"], nothing, ["empty"]),
    (
        "init of bad rows",
        ["init", "--data", "a.jsonl", "--to", "new.yaml"],
        write("a.jsonl", "7"),
        ["a.jsonl:1"],
    ),
    (
        "init of a cut table",
        ["init", "--data", "a.parquet", "--to", "new.yaml"],
        write("a.parquet", b"PAR1"),
        ["a.parquet"],
    ),
    ("init over a file", ["init", "--data", "pairs.jsonl"], nothing, ["run.yaml exists"]),
    (
        "init over a folder",
        ["init", "--data", "pairs.jsonl", "--to", "a"],
        lambda f: (f / "a").mkdir(),
        ["a exists"],
    ),
    (
        "init below a file",
        ["init", "--data", "pairs.jsonl", "--to", "pairs.jsonl/new.yaml"],
        nothing,
        ["pairs.jsonl/new.yaml"],
    ),
    (
        "init over a link to nothing",
        ["init", "--data", "pairs.jsonl", "--to", "a"],
        lambda f: (f / "a").symlink_to("/none/a"),
        ["a"],
    ),
    ("init with a long name", ["init", "--data", "pairs.jsonl", "--to", "x" * 300], nothing, ["too long"]),
    (
        "init with an unknown loss",
        ["init", "--data", "pairs.jsonl", "--to", "a", "--preset", "dppo"],
        nothing,
        ["dppo"],
    ),
    (
        "init with an empty model",
        ["init", "--data", "pairs.jsonl", "--to", "a.yaml", "--model", ""],
        nothing,
        ["model"],
    ),
    (
        "init with half a character",
        ["init", "--data", "pairs.jsonl", "--to", "a.yaml", "--model", "\udc80"],
        nothing,
        ["a.yaml"],
    ),
]


@pytest.mark.parametrize(
    ("arguments", "make", "says"), [pytest.param(*case[1:], id=case[0]) for case in OTHER_COMMANDS]
)
def test_other_commands_refuse(
    workplace: Workplace, commands: Commands, arguments: list[str], make: Make, says: list[str]
) -> None:
    make(workplace.folder)
    commands.refuse(*arguments, says=says)


REWARDS: list[tuple[str, dict[str, object], list[str]]] = [
    ("missing", {"model": "./none"}, ["./none", "no such file"]),
    ("a file", {"model": "pairs.jsonl"}, ["pairs.jsonl"]),
    ("a language model", {"model": "{model}"}, ["no classifier"]),
    ("without a class", {"model": "{classifier}"}, ["label", "2 classes"]),
    (
        "with another class",
        {"model": "{classifier}", "label": "LABEL_9"},
        ["label", "LABEL_9", "did you mean"],
    ),
    ("with a class beyond", {"model": "{classifier}", "label": 7}, ["label", "7"]),
]


@pytest.mark.parametrize(("reward", "says"), [pytest.param(*case[1:], id=case[0]) for case in REWARDS])
def test_a_reward_model_is_refused_before_training(
    workplace: Workplace,
    commands: Commands,
    tiny_llama_folder: Path,
    tiny_classifier_folder: Path,
    reward: dict[str, object],
    says: list[str],
) -> None:
    models = {"{model}": str(tiny_llama_folder), "{classifier}": str(tiny_classifier_folder)}
    reward = reward | {"model": models.get(str(reward["model"]), reward["model"])}
    workplace.write_run(evaluation={"sampling": {"reward": reward}})
    commands.refuse("check", workplace.file, says=["evaluation.sampling.reward", *says])


CACHES: list[tuple[str, Make, list[str]]] = [
    ("a file", lambda cache: cache.write_text(""), ["POLYREF_CACHE"]),
    ("a link in a circle", lambda cache: cache.symlink_to(cache), ["POLYREF_CACHE"]),
    ("below a device", lambda cache: cache.symlink_to("/dev/null"), ["POLYREF_CACHE"]),
]


@pytest.mark.parametrize(("make", "says"), [pytest.param(*case[1:], id=case[0]) for case in CACHES])
def test_a_token_cache_that_cannot_be_written(
    workplace: Workplace, commands: Commands, monkeypatch: pytest.MonkeyPatch, make: Make, says: list[str]
) -> None:
    cache = workplace.folder / "cache"
    make(cache)
    monkeypatch.setenv("POLYREF_CACHE", str(cache))
    commands.refuse("check", workplace.file, says=says)
