"""`polyref models list | show | compare` as people see them: 80 columns, nothing wrapped, no defaults."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli.model_views import (
    Measurement,
    VersionView,
    format_age,
    print_comparison,
    print_version,
    print_version_list,
)
from orchestrator.config.run import load_run
from orchestrator.registry.changed_settings import list_changed_settings
from orchestrator.registry.display import format_measurement, shorten_source_name
from orchestrator.registry.lineage import DataSource, Lineage
from orchestrator.tracking.mlflow import flatten_settings
from tests.support.finished_runs import begin_run, train_and_finish
from tests.support.policies import Exported, lineage

NOW = 1_800_000_000.0
RUN = {
    "name": "films",
    "policy": {"model": "/models/base", "adapter": {"r": 8}},
    "references": {"primary": "start", "models": {"start": {"model": "policy"}}},
    "data": {"train": "/data/pairs.jsonl"},
    "loss": {"preset": "dpo"},
    "training": {"learning_rate": 1e-3},
}

Show = Callable[[int], list[str]]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """What was printed so far, as lines, none of which is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", "80")

    def read(width: int = 80) -> list[str]:
        shown = capsys.readouterr().out.splitlines()
        assert max(map(len, shown)) <= width
        return shown

    return read


def view(number: int = 1, lineage: Lineage | None = None, **changes: object) -> VersionView:
    settings: dict[str, object] = {
        "name": "films",
        "version": number,
        "aliases": [],
        "created": NOW - 3 * 3600,
        "tags": {"loss.preset": "dpo"},
        "run": f"run-{number}",
        "run_id": "c" * 32,
        "judged": Measurement("eval/accuracy", 0.7512, 0.043),
        "metrics": {"eval/accuracy": 0.7512, "eval/accuracy_interval": 0.043},
        "lineage": lineage,
    }
    return VersionView(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "age"),
    [
        (-5, "just now"),
        (59, "just now"),
        (60, "1 min ago"),
        (3 * 3600 + 100, "3 h ago"),
        (86400 * 29, "29 d ago"),
        (86400 * 70, "2 mo ago"),
        (86400 * 800, "2 y ago"),
    ],
)
def test_ages(seconds: float, age: str) -> None:
    assert format_age(NOW - seconds, NOW) == age


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (0.7512, 0.0434, "0.751 ± 0.043"),
        (12.3456, 1.5, "12.3 ± 1.5"),
        (123.4, 15.0, "123 ± 15"),
        (0.7512, None, "0.7512"),
        (0.7512, 0.0, "0.7512"),
        (None, None, "-"),
    ],
)
def test_values_have_the_digits_that_their_interval_leaves(
    value: float | None, interval: float | None, text: str
) -> None:
    assert format_measurement(value, interval) == text


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/ada/models/base", "base"),
        ("me/base@0123456789abcdef0123456789abcdef01234567", "me/base@0123456789ab"),
        ("models:/films/3", "films/3"),
        ("https://data.example/votes/pairs.jsonl?x=1", "pairs.jsonl"),
        ("s3://bucket/far/rows.parquet", "rows.parquet"),
        ("policy", "policy"),
    ],
)
def test_short_names(source: str, name: str) -> None:
    assert shorten_source_name(source) == name


def test_a_list_has_one_line_per_version(lines: Show) -> None:
    long_name = "a-run-with-a-name-that-is-longer-than-what-is-left-of-the-line"
    print_version_list([view(2, run=long_name, aliases=["champion"]), view(1, judged=None)], NOW)
    header, second, first = lines(80)
    assert header.split() == ["version", "aliases", "loss", "judged", "by", "run", "age"]
    assert re.fullmatch(
        r"films/2 +champion +dpo +accuracy 0\.751 ± 0\.043 +a-run\S+…\S+-line +3 h ago", second
    )
    assert re.fullmatch(r"films/1 +dpo +run-1 +3 h ago", first)


def test_what_others_wrote_moves_no_cursor(lines: Show) -> None:
    print_version_list([view(run="a\n\x1b[2Jb\tc")], NOW)
    _, version = lines(80)
    assert "a  [2Jb c" in version


def test_a_wide_terminal_is_used(lines: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    long_name = "a-run-with-a-name-that-is-longer-than-what-is-left-of-the-line"
    print_version_list([view(2, run=long_name)], NOW)
    assert long_name in lines(160)[1]


def test_a_version_is_shown_in_sections(lines: Show) -> None:
    config = load_run(RUN).model_dump(mode="json")
    sources = [DataSource("pairs.jsonl", is_on_hub=False, used_for="training")]
    origin = lineage(
        base="me/base@" + "0" * 40,
        preset="dpo",
        config=config,
        loss=config["loss"],
        data_sources=sources,
        libraries={"torch": "2.9.1"},
    )
    tags = {
        "loss.preset": "dpo",
        "base_model": origin.base_model,
        "references.primary": "base",
        "reference.base": "f" * 40,
        "reference.movie": "e" * 40,
        "pin.movie": "models:/movie-sft/4",
        "data.digest": "d" * 40,
        "data.eval_digest": "a" * 40,
        "polyref.digest": "b" * 64,
        "polyref.adapter_digest": "9" * 64,
    }
    print_version(view(3, origin, tags=tags, aliases=["best", "champion"]), NOW)
    text = [re.sub(r" {2,}", "|", line.strip()) for line in lines(80)]
    assert text == [
        "films/3|(best, champion)",
        "model|LoRA adapter, and merged with its base",
        "loss|dpo",
        "registered|3 h ago (2027-01-15T05:00Z)",
        "run|run-3 (cccccccccccc)",
        "digest|bbbbbbbbbbbb",
        "",
        "Results",
        "before|after",
        "accuracy (judged by)|0.5|0.751 ± 0.043",
        "",
        "Trained",
        "from|me/base@000000000000",
        "against|base (primary)|ffffffffffff",
        "against|movie movie-sft/4|eeeeeeeeeeee",
        "on|pairs.jsonl, 900 pairs|dddddddddddd",
        "judged on|a part of the training data, set in_domain|aaaaaaaaaaaa",
        "",
        "Settings that differ from the defaults",
        "policy.adapter.r|8",
        "training.learning_rate|0.001",
        "",
        "Software",
        "polyref|0.1.0",
        "torch|2.9.1",
    ]


def test_a_version_of_another_program_says_what_is_known(lines: Show) -> None:
    print_version(view(tags={}, judged=None, metrics={}, run=None, run_id=None), NOW)
    assert [line.split() for line in lines(80)] == [
        ["films/1"],
        ["model", "model", "of", "another", "program"],
        ["registered", "3", "h", "ago", "(2027-01-15T05:00Z)"],
        [],
        ["Trained"],
        ["not", "known"],
    ]


def test_settings_of_a_preset_are_defaults_of_its_own() -> None:
    for preset in ("dpo", "simpo"):
        references = {} if preset == "simpo" else RUN["references"]
        run = load_run(RUN | {"loss": {"preset": preset, "beta": 0.7}, "references": references})
        changed = list_changed_settings(run.model_dump(mode="json"), preset)
        assert changed == {"policy.adapter.r": 8, "loss.beta": 0.7, "training.learning_rate": 1e-3}


def test_a_comparison_shows_what_differs_and_which_is_better(lines: Show) -> None:
    one = load_run(RUN)
    two = load_run(
        RUN
        | {
            "name": "other",
            "loss": {"preset": "mrpo"},
            "references": {
                "primary": "start",
                "models": {"start": {"model": "policy"}, "movie": {"model": "/models/movie"}},
            },
        }
    )
    metrics = [
        {"eval/accuracy": 0.71, "eval/accuracy_interval": 0.04, "eval/label_nll": 0.5, "eval/loss": 0.4},
        {"eval/accuracy": 0.75, "eval/accuracy_interval": 0.04, "eval/label_nll": 0.6, "eval/loss": 0.3},
    ]
    views = [
        view(n, params=flatten_settings(run.model_dump(mode="json")), tags={"loss.preset": p}, metrics=m)
        for n, run, p, m in zip((1, 2), (one, two), ("dpo", "mrpo"), metrics, strict=True)
    ]
    print_comparison(views, {"eval/loss": "loss or references"})
    assert [re.sub(r" {2,}", "|", line) for line in lines(80)] == [
        "settings that differ|films/1|films/2",
        "loss.preset|dpo|mrpo",
        "loss.references.combine|single|harmonic",
        "loss.references.trust_region|-|0.1",
        "loss.references.weights|uniform|adaptive",
        "references.models.movie.model|-|movie",
        "",
        "metrics|films/1|films/2|better",
        "accuracy|0.710 ± 0.040|0.750 ± 0.040|films/2 (± overlap)",
        "label_nll|0.5|0.6|films/1",
        "loss|0.4|0.3",
        "not comparable, as they differ in loss or references: loss",
    ]


def test_many_versions_are_compared_in_80_columns(lines: Show) -> None:
    views = [
        view(n, params={"policy.model": f"/models/{'long-' * 5}{n}"}, metrics={"eval/accuracy": n / 10})
        for n in range(1, 7)
    ]
    print_comparison(views, {})
    header, models, *_ = lines(80)
    assert header.split()[-1] == "films/6"
    assert [(cell[:3], cell[-2:]) for cell in models.split()[1:]] == [("lon", f"-{n}") for n in range(1, 7)]


def test_a_terminal_gets_tables_and_a_pipe_lines(uri: str, policy: Exported, tmp_path: Path) -> None:
    prepared, record = begin_run(
        policy, tmp_path / "here", tracking={"uri": uri, "registered_model": "films"}
    )
    train_and_finish(prepared, record, policy, 0.75)
    command = [sys.executable, "-m", "orchestrator", "models", "show", "films/1", "--tracking-uri", uri]
    root = Path(__file__).parents[2]
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    subprocess.run(command, stdout=slave, stderr=subprocess.DEVNULL, cwd=root, env=environment, check=True)
    os.close(slave)
    shown = os.read(master, 65536).decode().splitlines()
    os.close(master)
    assert max(map(len, shown)) <= 80
    assert "Settings that differ from the defaults" in shown
    assert "\t" not in "".join(shown)
    piped = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout
    assert all("\t" in line for line in piped.splitlines())
