"""`polyref init NAME`: the examples are listed, written where one is, and never over a file."""

import sys
import tomllib
from pathlib import Path

import pytest

from orchestrator.cli.main import run_command_line
from orchestrator.config.run import load_run
from orchestrator.config.sweep import load_sweep
from orchestrator.driver.examples import Example, list_examples, write_example
from orchestrator.errors import UsageError

ROOT = Path(__file__).parents[2]
EXAMPLES = list_examples()


def polyref(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["polyref", *arguments])
    with pytest.raises(SystemExit) as left:
        run_command_line()
    return int(left.value.code or 0)


def test_every_shipped_file_is_an_example() -> None:
    configs = ROOT / "configs"
    files = [*configs.glob("*.yaml"), *configs.glob("sweeps/*.yaml")]
    assert {example.name for example in EXAMPLES} == {
        file.relative_to(configs).as_posix().removesuffix(".yaml") for file in files
    }


def test_the_wheel_has_every_example() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    included = build["force-include"]
    files = {f"configs/{file.name}" for file in (ROOT / "configs").glob("*.yaml")}
    assert set(included) == {*files, "configs/sweeps"}
    for source, target in included.items():
        assert target == f"orchestrator/examples/{source.removeprefix('configs/')}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_is_written_and_read(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [*write_example(example.name, None)]
    written = tmp_path / example.path.name
    if example.is_sweep:
        load_sweep(written)
        assert lines[-1].startswith(f"next: polyref tune {written.name}")
    else:
        assert written.read_text() == example.path.read_text()
        load_run(written)
    assert "configs/" not in written.read_text()
    assert len(example.summary) > 20
    assert example.summary[-1] in ".?"


def test_a_sweep_brings_the_run_file_that_it_names(tmp_path: Path) -> None:
    target = tmp_path / "search.yaml"
    assert [*write_example("sweeps/which-loss", target)][:2] == [
        f"{tmp_path / 'gdpo.yaml'}: written",
        f"{target}: written",
    ]
    assert load_sweep(target).base.data == load_run(ROOT / "configs" / "gdpo.yaml").data
    assert "run: gdpo.yaml " in target.read_text()


def test_files_are_not_replaced(tmp_path: Path) -> None:
    for name, existing in (("dpo", "dpo.yaml"), ("sweeps/pbt", "pbt.yaml"), ("sweeps/pbt", "dpo.yaml")):
        folder = tmp_path / f"{name.replace('/', '-')}-{existing}"
        folder.mkdir()
        (folder / existing).write_text("mine")
        with pytest.raises(UsageError, match=f"{existing} exists, and is not replaced"):
            [*write_example(name, folder / f"{name.rpartition('/')[2]}.yaml")]
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(existing, "mine")]


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "dpo.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    with pytest.raises(UsageError, match="exists"):
        [*write_example("dpo", tmp_path / "dpo.yaml")]
    assert not (tmp_path / "elsewhere.yaml").exists()


def test_a_sweep_is_not_written_over_its_own_run_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the run file that sweeps/pbt names"):
        [*write_example("sweeps/pbt", tmp_path / "dpo.yaml")]
    assert not [*tmp_path.iterdir()]


def test_the_command_lists_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert polyref(monkeypatch, "init", "--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in listed[:-1])
    assert {line.split()[0] for line in listed if not line.startswith(" ")} - {"polyref"} == {
        example.name for example in EXAMPLES
    }
    assert polyref(monkeypatch, "init", "simpo", "--to", "mine.yaml") == 0
    assert load_run("mine.yaml").preset == "simpo"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["--data", "--list", "init --help"]),
        (("dpo", "--list"), ["--data", "--list"]),
        (("dop",), ["example 'dop' does not exist", "did you mean 'dpo'?"]),
        (("../pyproject",), ["does not exist"]),
        (("dpo", "--model", "x"), ["--model is for --data"]),
        (("dpo", "--split", "test"), ["--split is for --data"]),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: tuple[str, ...],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert polyref(monkeypatch, "init", *arguments) == 2
    refusal = capsys.readouterr().err
    assert refusal.count("polyref: ") == 1
    for word in words:
        assert word in refusal
    assert not [*tmp_path.iterdir()]
