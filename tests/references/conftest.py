"""A small Ray, token tables by hand, and replicas that need no model."""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.cloudpickle

from models.config import ModelConfig
from orchestrator.cluster.connection import start_local_ray
from orchestrator.references.client import ReferenceArrays
from orchestrator.references.messages import ReferenceSpec, ScoreRequest, Scores
from orchestrator.references.replica import Replica
from orchestrator.references.service import ReferenceService, start_references

# Ray's workers cannot import test files.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class TokenPair:
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray | None


class Table(list[TokenPair]):
    """What the client needs of a token table."""


@pytest.fixture(scope="module")
def ray_running() -> Iterator[None]:
    """A small Ray, gone with the module so that other tests may start theirs."""
    with start_local_ray(
        num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False
    ):
        yield


@pytest.fixture
def make_table() -> Callable[..., Table]:
    """`make_table(rows, seed)`: random ids below 256, lengths all over the place."""

    def make(rows: int, seed: int = 0, *, completions_only: bool = False) -> Table:
        random = np.random.default_rng(seed)

        def ids(longest: int) -> np.ndarray:
            return random.integers(0, 256, random.integers(1, longest), dtype=np.int32)

        return Table(TokenPair(ids(20), ids(12), None if completions_only else ids(12)) for _ in range(rows))

    return make


class Calls:
    """What the replicas that write to a folder were asked."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "calls"

    @property
    def pids(self) -> list[int]:
        return [int(line.split()[0]) for line in self._lines()]

    @property
    def sizes(self) -> list[int]:
        return [int(line.split()[1]) for line in self._lines()]

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while len(self._lines()) < count:
            assert time.monotonic() < deadline, f"{count} calls did not come: {self._lines()}"
            time.sleep(0.02)

    def _lines(self) -> list[str]:
        return self._file.read_text().splitlines() if self._file.exists() else []


def _right(table: Table, indices: Any, arrays: ReferenceArrays) -> bool:
    """Whether the arrays hold what `SumReplica` gives for these rows."""
    for row, pair in enumerate(table[int(i)] for i in indices):
        chosen = (arrays.chosen[row], arrays.chosen_lengths[row], arrays.chosen_entropy[row])
        rejected = (arrays.rejected[row], arrays.rejected_lengths[row], arrays.rejected_entropy[row])
        wanted = (0.0, 0, 0.0) if pair.rejected is None else expected(pair.prompt, pair.rejected)
        if chosen != expected(pair.prompt, pair.chosen) or rejected != wanted:
            return False
    return True


def expected(prompt: np.ndarray, response: np.ndarray) -> tuple[float, int, float]:
    """What `SumReplica` gives."""
    digest = hashlib.sha256(prompt.tobytes() + b"|" + response.tobytes()).digest()
    return -float(int.from_bytes(digest[:3])), len(response), digest[3] / 256


class SumReplica(Replica):
    """Scores from a digest of the ids; the folder in `spec.config.model` steers and records what happens.

    `gate` in it holds every call back until it is gone; `freeze` stops the process
    as SIGSTOP does, at the next call; `wrong once` names what is wrong with the next answer; `die` kills
    the process at the next call (removing one letter of it each time); every call appends its process id to
    `calls`.
    """

    def setup(self) -> None:
        self._folder = Path(self._spec.config.model)
        if (self._folder / "refuse").exists():
            raise RuntimeError("no such weights")

    def score(self, request: ScoreRequest) -> tuple[Scores, int]:
        with open(self._folder / "calls", "a") as calls:
            calls.write(f"{os.getpid()} {len(request)}\n")
        die = self._folder / "die"
        if die.exists() and (left := die.read_text()):
            die.write_text(left[1:])
            os._exit(9)
        if self._take("freeze") is not None:
            os.kill(os.getpid(), signal.SIGSTOP)
        while (self._folder / "gate").exists():
            time.sleep(0.01)
        scores, index = Scores.unknown(len(request)), 0
        for group in request.unpack():
            for response in group.responses:
                scores[index] = expected(group.prompt, response)
                index += 1
        if (self._folder / "nan").exists():
            scores.logps[0] = np.nan
        if (wrong := self._take("wrong once")) is not None:
            _spoil(scores, wrong)
        return scores, 1

    def _take(self, name: str) -> str | None:
        """Return the text of a file that only one of the replicas that look gets; None to the others."""
        mine = self._folder / f"{name} of {os.getpid()}"
        try:
            (self._folder / name).rename(mine)
        except FileNotFoundError:
            return None
        return mine.read_text()


def _spoil(scores: Scores, damage: str) -> None:
    """Change a score to one that cannot be."""
    if damage == "not a number":
        scores.logps[1] = np.nan
    elif damage == "positive":
        scores.logps[1] = 0.5
    elif damage == "entropy":
        scores.entropies[1] = 1.5
    else:
        scores.lengths[1] += 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that steers `SumReplica`."""
    path = tmp_path / "steer"
    path.mkdir()
    return path


@pytest.fixture
def right() -> Callable[..., bool]:
    """`right(table, indices, arrays)`: whether these are `SumReplica`'s scores."""
    return _right


@pytest.fixture
def calls(folder: Path) -> Calls:
    """What the replicas were asked so far."""
    return Calls(folder)


@pytest.fixture
def serve(ray_running: None, tmp_path: Path) -> Callable[..., ReferenceService]:
    """`serve(*specs)`: a service of `SumReplica`s over one store."""

    def start(*specs: ReferenceSpec, **options: Any) -> ReferenceService:
        return start_references(specs, tmp_path / "storage", replica_class=SumReplica, **options)

    return start


@pytest.fixture
def spec(folder: Path) -> Callable[..., ReferenceSpec]:
    """`spec(**changes)`: a reference for `SumReplica`."""

    def make(**changes: Any) -> ReferenceSpec:
        settings: dict[str, Any] = {
            "name": "base",
            "config": ModelConfig(model=str(folder)),
            "fingerprint": "f" * 32,
            "num_cpus": 0.1,
            "max_retries": 2,
        }
        return ReferenceSpec(**(settings | changes))

    return make
