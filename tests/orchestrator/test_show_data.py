"""`data show` and `init`: what is read is shown, and a run file is written that reads it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from losses.presets import PRESETS
from orchestrator.config.run import load_run, parse_run
from orchestrator.driver.show_data import show_run_data, show_source
from orchestrator.driver.write_run_file import write_run_file
from orchestrator.errors import UsageError
from preferences.config import SourceConfig
from preferences.pairs import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "Is it good?", "chosen": "Yes, it is.", "rejected": "No.", "soft_label": p}
    for p in (0.5, 0.55, 0.95, 1.0, 1.0, 0.2)
]
STRENGTHS = [
    {"prompt": f"Q{i}", "response_1": "one", "response_2": "two", "preference_strength": i - 3}
    for i in range(7)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_console() -> Console:
    return Console(file=io.StringIO(), width=200, soft_wrap=True, highlight=False, markup=False)


def show(path: Path, pairs: int = 1) -> list[str]:
    console = make_console()
    show_source(SourceConfig(source=str(path)), pairs=pairs, console=console)
    return read_lines(console)


def read_lines(console: Console) -> list[str]:
    file = console.file
    assert isinstance(file, io.StringIO)
    return [" ".join(line.split()) for line in file.getvalue().splitlines()]


def test_a_source_is_shown_without_a_model(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "Q", "chosen": "a", "rejected": "a"}, {"prompt": "Q", "chosen": "a"}]
    path = write(tmp_path / "a.jsonl", rows)
    lines = show(path)
    assert lines[0] == f"{path}: 6 pairs of 8 rows, 1 swapped"
    assert f"1 left out: chosen equals rejected (first: {path}:7: chosen and rejected are the same, so there "
    assert any(line.startswith("1 left out: missing field (first: ") for line in lines)
    counts = {line.rsplit(" ", 2)[0]: line for line in lines if "█" in line}
    assert list(counts) == ["0.5, a tie", "0.5 to 0.6", "0.8 to 0.9", "0.9 to 1.0", "1, certain"]
    assert "1, certain 2" in counts["1, certain"]
    assert "prompt 11 11 11 11" in lines
    assert "chosen | Yes, it is." in lines
    assert len([line for line in lines if line.startswith("prompt |")]) == 1


def test_what_was_understood_is_shown_to_be_copied(tmp_path: Path) -> None:
    lines = show(write(tmp_path / "a.jsonl", STRENGTHS), pairs=0)
    section = yaml.safe_load("\n".join([lines[1], *(f"  {line}" for line in lines[2:4])]))
    assert section == {
        "data": {
            "pair": ["response_1", "response_2"],
            "label": {
                "type": "strength",
                "column": "preference_strength",
                "range": [-3, 3],
                "prefers": "second",
            },
        }
    }


def test_a_source_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no row can be used"):
        show(write(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "a"}]))


def test_a_run_is_shown_as_its_policy_reads_it(tmp_path: Path, tiny_llama_folder: Path) -> None:
    rows = [*ROWS, {"prompt": "Q" * 100, "chosen": "a", "rejected": "b"}, {"prompt": "Q", "chosen": "a"}]
    run = {
        "name": "shown",
        "policy": {"model": str(tiny_llama_folder), "adapter": {"r": 4}},
        "references": {"primary": "start", "models": {"start": {"model": "policy"}}},
        "data": {"train": str(write(tmp_path / "a.jsonl", rows)), "max_length": 90, "max_prompt_length": 40},
        "loss": {"preset": "gdpo"},
        "storage_path": str(tmp_path / "runs"),
    }
    console = make_console()
    show_run_data(parse_run(run, source="run"), pairs=1, console=console)
    lines = read_lines(console)
    assert lines[0] == "train: 6 pairs, 1 swapped"
    assert "a: 6 pairs of 8 rows" in lines
    assert any(line.startswith("1 left out: too long for the policy") for line in lines)
    assert any(
        line.startswith("1 left out: missing field (first: ") and "a.jsonl:8" in line for line in lines
    )
    assert "chosen | «Yes, it is.<|im_end|>»" in lines
    assert "prompt 11 11 11 11" in lines  # bytes are this model's tokens
    assert lines[-1].startswith("the run stops at a row that cannot be used: see data.on_bad_row")


# ---- init ----


def init(path: Path, to: Path, preset: str | None = None) -> tuple[Any, list[str]]:
    lines = write_run_file(SourceConfig(source=str(path)), to, model="some/model", preset=preset)
    return load_run(to), lines


def test_a_run_file_is_written_for_what_the_data_has(tmp_path: Path) -> None:
    run, lines = init(write(tmp_path / "votes.jsonl", STRENGTHS), tmp_path / "run.yaml")
    assert (run.preset, run.name) == ("gdpo", "votes-gdpo")
    assert run.data.train_sources[0].label.column == "preference_strength"
    assert "for 5 of the first 7 pairs people disagreed" in lines[0]
    hard = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
    run, lines = init(write(tmp_path / "hard.jsonl", hard), tmp_path / "hard.yaml")
    assert run.preset == "dpo"
    assert "no label below 1" in lines[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gets_a_run_file_that_is_accepted(preset: str, tmp_path: Path) -> None:
    run, _ = init(write(tmp_path / "a.jsonl", ROWS), tmp_path / "run.yaml", preset)
    assert run.preset == preset
    assert run.loss == PRESETS[preset]


def test_nothing_is_overwritten_or_left_behind(tmp_path: Path) -> None:
    path, to = write(tmp_path / "a.jsonl", ROWS), tmp_path / "run.yaml"
    to.write_text("mine")
    with pytest.raises(UsageError, match=r"run\.yaml exists, and is not replaced"):
        init(path, to)
    assert to.read_text() == "mine"
    bad = [{"prompt": "Q", "response_a": "one", "response_b": "two"}]
    with pytest.raises(DataError, match="do not say which one people preferred"):
        init(write(tmp_path / "b.jsonl", bad), tmp_path / "new.yaml")
    assert not (tmp_path / "new.yaml").exists()
