"""Processes that are killed or hang while a run goes on: it ends with the weights of an undisturbed one."""

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.run import RunConfig
from orchestrator.config.sweep import parse_sweep
from orchestrator.driver import scoring
from orchestrator.driver.train import train_run
from orchestrator.references.messages import ScoreRequest, Scores
from orchestrator.references.replica import Replica
from orchestrator.references.service import start_references
from orchestrator.search.journal import Journal
from orchestrator.search.tune import run_sweep
from tests.support.faults import (
    SAVE_EVERY,
    STEPS,
    assert_nothing_left,
    assert_same_outcome,
    find_actor_processes,
    find_rank,
    find_saved_step,
    find_step,
    read_computed_metrics,
    sabotage,
)

pytestmark = pytest.mark.usefixtures("whole_cluster", "whole")

MakeRun = Callable[..., RunConfig]
Report = Callable[..., None]


def send_to(number: int, title: str, *, place: int = 0) -> Callable[[], bool]:
    """Return the fault that sends a signal to a process of this title as soon as there is one."""

    def send() -> bool:
        processes = find_actor_processes(title)
        if len(processes) <= place:
            return False
        processes[place].send_signal(number)
        return True

    return send


def read_forwards(folder: Path) -> int:
    counts = json.loads((folder / "run.json").read_text())["reference_counts"]
    return sum(reference["forwards"] for reference in counts.values())


def test_a_replica_of_two_dies_in_a_batch(
    make_run: MakeRun, whole: Path, place: Path, report: Report, describe_run: Any
) -> None:
    models = describe_run("x")["references"]["models"]
    config = make_run(
        "replica",
        references={"models": models | {"base": models["base"] | {"replicas": 2}}},
        storage_path=str(place / "replica"),
    )
    with sabotage(send_to(signal.SIGKILL, "Replica.score")):
        train_run(config)
    assert_same_outcome(config.folder, whole)
    assert_nothing_left(config.folder)
    repeated = read_forwards(config.folder) - read_forwards(whole)
    assert repeated <= 0
    report("SIGKILL of a replica in a batch", repeated=repeated)


def test_a_router_dies_while_replicas_score(
    make_run: MakeRun, whole: Path, place: Path, report: Report
) -> None:
    config = make_run("router", storage_path=str(place / "router"))

    def kill_router() -> bool:
        return bool(find_actor_processes("Replica.score")) and send_to(signal.SIGKILL, "Router")()

    with sabotage(kill_router):
        train_run(config)
    assert_same_outcome(config.folder, whole)
    assert_nothing_left(config.folder)
    report("SIGKILL of a reference's router", repeated="what it had not saved")


def make_nan_replica(marker: Path) -> type[Replica]:
    """Make a replica of which the first answer of all is not a number, as a broken device gives it."""

    class NanOnce(Replica):
        def score(self, request: ScoreRequest) -> tuple[Scores, int]:
            scores, forwards = super().score(request)
            try:
                marker.touch(exist_ok=False)
            except FileExistsError:
                return scores, forwards
            scores.logps[0] = float("nan")
            return scores, forwards

    return NanOnce


def test_a_replica_answers_nan_and_one_hangs(
    make_run: MakeRun, whole: Path, place: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mocked is the device that breaks; that the answer is refused and made again is the product's doing."""
    config = make_run("hung", references={"answer_minutes": 0.05}, storage_path=str(place / "hung"))
    replica = make_nan_replica(place / "nan once")
    monkeypatch.setattr(scoring, "start_references", partial(start_references, replica_class=replica))
    with sabotage(send_to(signal.SIGSTOP, "Replica.score")):
        train_run(config)
    assert_same_outcome(config.folder, whole)
    assert_nothing_left(config.folder)
    assert (place / "nan once").exists()
    repeated = read_forwards(config.folder) - read_forwards(whole)
    report("a replica that answers NaN once, and SIGSTOP of one in a batch", repeated=repeated)


def test_workers_die_one_after_another(
    make_run: MakeRun, whole_of_two: Path, place: Path, report: Report
) -> None:
    """No failure is allowed, and there are two: after a new checkpoint a death does not count."""
    config = make_run("workers", parallel={"workers": 2, "max_failures": 0})

    def kill(rank: int, *, after: int) -> Callable[[], bool]:
        def kill_worker() -> bool:
            if not after < find_saved_step(config.folder) < find_step(config.folder):
                return False
            worker = find_rank(place, rank)
            assert worker is not None
            worker.kill()
            return True

        return kill_worker

    with sabotage(kill(1, after=0), kill(0, after=10)):
        train_run(config)
    assert_same_outcome(config.folder, whole_of_two)
    assert_nothing_left(config.folder)
    repeated = read_forwards(config.folder)
    report("SIGKILL of the worker of rank 1, later of rank 0's", repeated=repeated)


def test_a_trial_of_a_search_dies(
    describe_run: Any, whole: Path, place: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends as a run of the same settings does."""
    monkeypatch.chdir(place)
    sweep = {
        "name": "sweep",
        "run": describe_run("trials"),
        "space": {"training.save_every": {"grid": [SAVE_EVERY]}},
        "search": {"algorithm": "grid"},
        "max_concurrent": 1,
        "promote": None,
    }
    trials = place / "runs" / "sweep" / "trials"

    def kill_trial() -> bool:
        trial = find_rank(place, 0) if SAVE_EVERY < find_step(trials / "0001") < STEPS - SAVE_EVERY else None
        if trial is not None:
            trial.kill()
        return trial is not None

    with sabotage(kill_trial):
        record = run_sweep(parse_sweep(sweep, source="sweep"))
    assert read_computed_metrics(trials / "0001") == read_computed_metrics(whole)
    assert [trial.status for trial in Journal(trials)] == ["finished"]
    assert record.finished
    assert_nothing_left(trials)
    report("SIGKILL of a trial of a search")
