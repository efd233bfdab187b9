"""A run over tiny models that a fault may hit, and the same run that nothing disturbed."""

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.run import RunConfig, parse_run
from tests.orchestrator.conftest import WORDS, whole_cluster
from tests.support.driver import Driver
from tests.support.faults import (
    SAVE_EVERY,
    STEPS,
    FaultLog,
    FaultReport,
    is_set,
    write_link_module,
)

__all__ = ["whole_cluster"]

RunFile = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama_b_folder: Path) -> Path:
    """The folder of all faulty runs: data, link module, a reference of their own, storage."""
    folder = tmp_path_factory.mktemp("faults")
    shutil.copytree(tiny_llama_b_folder, folder / "movie")
    write_link_module(folder)
    draw = random.Random(0)
    rows = []
    for number in range(96):
        chosen, rejected = (" ".join(draw.choices(WORDS, k=draw.randint(1, 8))) for _ in range(2))
        rows.append({"prompt": f"Film {number} is ", "chosen": chosen + ".", "rejected": rejected + "!"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def describe_run(place: Path, tiny_llama_folder: Path) -> RunFile:
    """`describe_run(name, training={...}, ...)`: the content of the run file of a faulty run."""

    def describe(name: str, **sections: Any) -> dict[str, Any]:
        models = {"base": {"model": str(tiny_llama_folder)}, "movie": {"model": str(place / "movie")}}
        run: dict[str, Any] = {
            "name": name,
            "policy": {"model": str(tiny_llama_folder), "adapter": {"r": 4, "alpha": 8}},
            "references": {"primary": "base", "mode": "precompute", "models": models},
            "data": {
                "train": str(place / "pairs.jsonl"),
                "eval_fraction": 0.25,
                "max_length": 256,
                "max_prompt_length": 64,
            },
            "loss": {"preset": "mrpo", "link": {"type": "function", "function": "rank_shower:logistic"}},
            "training": {
                "max_steps": STEPS,
                "pairs_per_step": 8,
                "tokens_per_microbatch": 512,
                "learning_rate": 1e-2,
                "save_every": SAVE_EVERY,
            },
            "evaluation": {"every_steps": 8},
            "tracking": {"registered_model": name, "uri": f"sqlite:///{place / 'runs' / 'mlflow.db'}"},
            "storage_path": str(place / "runs"),
        }
        for section, value in sections.items():
            run[section] = run.get(section, {}) | value if isinstance(value, dict) else value
        return run

    return describe


@pytest.fixture(scope="session")
def start_command(place: Path, describe_run: RunFile) -> Iterator[Callable[..., Driver]]:
    """`start_command(name, ...)`: the run as a command of its own, which surely ends with the tests."""
    drivers: list[Driver] = []

    def start(name: str, **sections: Any) -> Driver:
        file = place / f"{name}-{len(drivers)}.yaml"
        file.write_text(yaml.safe_dump(describe_run(name, **sections)))
        drivers.append(Driver("train", file))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()


@pytest.fixture(scope="session")
def whole(place: Path, start_command: Callable[..., Driver]) -> Path:
    """Folder of the run that nothing disturbed."""
    driver = start_command("whole")
    assert driver.end() == 0, driver.log.read_text()
    return place / "runs" / "whole"


@pytest.fixture(scope="session")
def whole_of_two(place: Path, whole: Path, start_command: Callable[..., Driver]) -> Path:
    """The same on two workers."""
    driver = start_command("whole-of-two", parallel={"workers": 2})
    assert driver.end() == 0, driver.log.read_text()
    return place / "runs" / "whole-of-two"


@pytest.fixture
def make_run(describe_run: RunFile, place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """`make_run(name, ...)`: a faulty run for this process; the working folder has its link module."""
    monkeypatch.chdir(place)
    return lambda name, **sections: parse_run(describe_run(name, **sections), source=name)


@pytest.fixture(scope="session")
def fault_log() -> FaultLog:
    """The rows of the table, kept in the file that FAULT_LOG names."""
    return FaultLog(is_set("FAULT_LOG"))


@pytest.fixture
def report(fault_log: FaultLog) -> Callable[..., None]:
    """`report(fault, ...)`: add a row to the table; its seconds are those of the test since the last row."""
    began = time.monotonic()

    def add(
        fault: str,
        *,
        survived: str = "yes",
        weights: str = "equal",
        repeated: int | str = 0,
        message: str = "",
    ) -> None:
        nonlocal began
        seconds, began = f"{time.monotonic() - began:.0f}", time.monotonic()
        fault_log.add(
            FaultReport(
                fault=fault,
                survived=survived,
                weights=weights,
                repeated=str(repeated),
                seconds=seconds,
                message=message,
            )
        )

    return add
