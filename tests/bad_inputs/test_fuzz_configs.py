"""Random run files, sweep files and overrides are read, or refused as the command line refuses them.

To look for more than CI has time for, about ten minutes:

    FUZZ_EXAMPLES=10000 pytest tests/bad_inputs/test_fuzz_configs.py --timeout 1200

What is found goes into an `@example`.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from losses.presets import PRESETS
from losses.settings import LossError
from models.config import ModelError
from orchestrator.config.run import build_run_schema, load_run
from orchestrator.config.sweep import build_sweep_schema, build_trial_run, load_sweep
from orchestrator.errors import UsageError
from orchestrator.search.searcher import sample_points
from preferences.pairs import DataError
from tune_spaces.domains import KEYWORDS, SpaceError
from tune_spaces.spaces import Space

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
REFUSALS = (UsageError, DataError, ModelError, LossError, SpaceError)
"""What `polyref` turns into one message and exit code 2."""

fuzz = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))

RUN: dict[str, Any] = {
    "name": "case",
    "policy": {"model": "some/model", "adapter": {"r": 2, "alpha": 4}},
    "references": {"primary": "base", "models": {"base": {"model": "a"}, "other": {"model": "b"}}},
    "data": {"train": "pairs.jsonl", "eval_fraction": 0.25, "max_length": 128, "max_prompt_length": 64},
    "loss": {"preset": "mrpo", "references": {"weights": {"base": 0.5, "other": 0.5}}},
    "training": {"max_steps": 1, "pairs_per_step": 4},
    "evaluation": {"metric": "eval/accuracy", "sampling": {"prompts": 3, "reward": {"function": "a:b"}}},
    "tracking": {"uri": "http://127.0.0.1:1", "registered_model": "a", "alias": "b"},
    "parallel": {"workers": 1, "resources": {"cpu": 1, "custom": {"tpu": 1}}},
    "storage_path": "runs",
}
SWEEP: dict[str, Any] = {
    "name": "search",
    "run": RUN,
    "spaces": ["losses"],
    "space": {"loss.beta": {"uniform": [0.1, 0.5]}, "training.epochs": {"choice": [1, 2]}},
    "search": {"algorithm": "tpe", "trials": 2},
    "scheduler": {"type": "asha"},
    "objective": [{"metric": "eval/accuracy", "mode": "max"}],
}


def list_names(schema: Any) -> Iterator[str]:
    """All field names and words in a JSON Schema."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        yield from (value for value in schema.get("enum", ()) if isinstance(value, str))
        for inner in schema.values():
            yield from list_names(inner)
    for inner in schema if isinstance(schema, list) else ():
        yield from list_names(inner)


WORDS = sorted({*list_names(build_run_schema()), *list_names(build_sweep_schema()), *PRESETS, *KEYWORDS})
ODD = [
    *(
        "",
        " ",
        "~",
        "~nobody/x",
        "/",
        "..",
        "???",
        "${name}",
        "${x.y}",
        "${",
        "a:/b",
        "s3:/x",
        "s3://[",
        "\0",
    ),
    *(
        "models:/",
        "models:/a@b",
        "policy",
        "{",
        "a" * 300,
        "\ud800",
        "é",
        "1e400",
        "0x1",
        "1_0",
        "2024-01-01",
    ),
]
words = st.sampled_from(WORDS) | st.sampled_from(ODD) | st.text(max_size=8)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 2**32, 2**63, 2**64, 10**400, 0.5, 1e-320])
scalars = st.none() | st.booleans() | numbers | words
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def list_places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    if isinstance(content, dict | list):
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from list_places(value, (*place, name))


@st.composite
def spoilt(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    """Draw a good file with one to three places changed, removed or added to."""
    content = deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(list(list_places(content)) or [("name",)]))
        place: Any = content
        for name in parents:
            place = place[name]
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                place[last] = draw(values)
            case "remove":
                del place[last]
            case "add" if isinstance(place, dict):
                place[draw(words)] = draw(values)
    return content


def read_run(content: Any, *overrides: str) -> None:
    with contextlib.suppress(*REFUSALS):
        load_run(content, overrides)


@fuzz
@given(st.dictionaries(words, values, max_size=6))
def test_any_mapping(content: dict[Any, Any]) -> None:
    read_run(content)


@fuzz
@given(spoilt(RUN))
@example(RUN | {"loss": {"preset": "mrpo", "references": {"weights": {"4bit": None, 0: None}}}})
@example(RUN | {"references": {"primary": "base", "models": [["base"]]}})
@example(RUN | {"references": {"primary": "base", "models": 1}})
@example(RUN | {"references": RUN["references"] | {"use": 0.5}})
def test_a_spoilt_run(content: dict[Any, Any]) -> None:
    read_run(content)


@fuzz
@given(spoilt(SWEEP))
@example(SWEEP)
@example(SWEEP | {"run": RUN | {"evaluation": 1}})
def test_a_spoilt_sweep(content: dict[Any, Any]) -> None:
    with contextlib.suppress(*REFUSALS):
        sweep = load_sweep(content)
        space = Space(sweep.spaces, sweep.domains, sweep.base.references.ordered, sweep.run["loss"])
        for point in sample_points(space, 2, seed=sweep.search.seed):
            build_trial_run(sweep, point)


paths = st.lists(words, min_size=1, max_size=4).map(".".join) | st.sampled_from(
    [".".join(map(str, place)) for place in list_places(RUN)]
)
yaml_like = st.text(alphabet="[]{}:,&*!#|>-?%@`'\"\\ a1\n\t$.=<")
texts = values.map(lambda value: json.dumps(value, default=str)) | yaml_like


@fuzz
@given(st.lists(st.tuples(paths, st.sampled_from(["=", "", "=="]), texts).map("".join), max_size=3))
@example(["[="])
def test_any_overrides(overrides: list[str]) -> None:
    read_run(deepcopy(RUN), *overrides)


@fuzz
@given(st.binary(max_size=60) | yaml_like.map(str.encode))
def test_any_file(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(content)
        read_run(file.name)
