"""A search driven by hand as Tune drives it, and killed at every write of its journal."""

import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import optuna
import pytest
from ray.tune.search import Searcher

from orchestrator.config.sweep import Objective, SearchConfig
from orchestrator.errors import UsageError
from orchestrator.search.journal import Journal, TrialRecord
from orchestrator.search.searcher import JournalSearcher, sample_points
from tune_spaces.spaces import SPACES, Space, SpaceError, Suggester, parse_domain

Point = Mapping[str, Any]
Score = Callable[[Point, int], Mapping[str, float]]
ACCURACY = Objective(metric="eval/accuracy", mode="max")
KL = Objective(metric="eval/kl/base", mode="min")
RATE = {"training.learning_rate": {"loguniform": [1e-6, 1e-4]}}
FAMILIES = RATE | {
    "loss.preset": {"choice": ["dpo", "gdpo"]},
    "loss.beta": {"choice": [0.1, 0.3]},
    "references.use": {"choice": [["a"], ["a", "b"]]},
}
SIX = {"loss.beta": {"choice": [0.1, 0.2, 0.3]}, "references.use": {"choice": [["a"], ["a", "b"]]}}


class Branching(Space):
    """beta has another range for each family, and one family has a field of its own."""

    def __init__(self) -> None:
        super().__init__((), {}, ("a",), {})

    def draw_point(self, ask: Suggester) -> dict[str, Any]:
        family = ask("loss.preset", parse_domain({"choice": ["dpo", "ipo", "simpo"]}))
        low = {"dpo": 0.01, "ipo": 0.1, "simpo": 1.0}[family]
        point = {"loss.preset": family}
        point["loss.beta"] = ask(f"loss.beta [{family}]", parse_domain({"loguniform": [low, low * 100]}))
        if family == "simpo":
            point["loss.margin"] = ask("loss.margin", parse_domain({"uniform": [0.0, 2.0]}))
        return point


def space_of(fields: Mapping[str, Any]) -> Space:
    return Space((), {name: parse_domain(value) for name, value in fields.items()}, ("a",), {})


class Killed(BaseException):
    pass


class Dying(Journal):
    """A journal whose process is killed instead of its write number `writes` + 1."""

    def __init__(self, folder: Path, writes: int) -> None:
        super().__init__(folder)
        self.writes = writes

    def _write(self, record: TrialRecord) -> None:
        if not self.writes:
            raise Killed
        self.writes -= 1
        super()._write(record)


def control(point: Point) -> Point | None:
    if point.get("loss.preset") != "gdpo":
        return None
    return {"loss.preset": "dpo", "loss.beta": point["loss.beta"]}


def make(
    journal: Journal | Path,
    space: Space,
    *objectives: Objective,
    allowed: Callable[[Point], str | None] = lambda point: None,
    **config: Any,
) -> JournalSearcher:
    """A search as a new process makes it over what the journal holds."""
    journal = Journal(journal) if isinstance(journal, Path) else journal
    objectives = objectives or (ACCURACY,)
    return JournalSearcher(
        space, SearchConfig(**config), objectives, journal, explain_refusal=allowed, find_control=control
    )


def flat(point: Point, repeat: int) -> dict[str, float]:
    return {"eval/accuracy": 0.5 + repeat / 10}


def drive(
    search: JournalSearcher, score: Score = flat, *, at_once: int = 1, most: float = math.inf
) -> list[int]:
    """Play Tune until nothing is left, or `most` trials were handed out and ended; their numbers in order."""
    numbers: list[int] = []
    running: list[tuple[str, dict[str, Any]]] = []
    for turn in itertools.count():
        config = search.suggest(f"t{turn}") if len(numbers) < most else Searcher.FINISHED
        if config != Searcher.FINISHED:
            numbers.append(config["number"])
            running.append((f"t{turn}", config))
        if len(running) == at_once or (running and config == Searcher.FINISHED):
            end(search, *running.pop(0), score)
        elif config == Searcher.FINISHED:
            return numbers
    raise AssertionError


def end(search: JournalSearcher, trial_id: str, config: dict[str, Any], score: Score) -> None:
    record = search._journal[config["number"]]
    assert record.status == "running"
    assert config == {"number": record.number, **record.point}
    search.on_trial_result(trial_id, {"step": 1, "eval/accuracy": 0.0, "time_total_s": 3.0})
    values = score(record.point, record.repeat)
    search.on_trial_complete(trial_id, {"step": 8, "total": 8, "config/beta": 1, "done": True, **values})


def drawn(folder: Path) -> list[dict[str, Any]]:
    """The points in the order they were entered, without controls."""
    return [of[0].drawn for of in Journal(folder).group_by_point().values() if of[0].control_of is None]


def test_points_get_their_repeats_and_each_distinct_control_once(tmp_path: Path) -> None:
    numbers = drive(make(tmp_path, space_of(FAMILIES), trials=12, repeats=3, controls=True, seed=1))
    groups = Journal(tmp_path).group_by_point()
    assert numbers == list(range(1, 3 * len(groups) + 1))
    assert len(drawn(tmp_path)) == 12
    for point_id, group in groups.items():
        assert [record.repeat for record in group] == [0, 1, 2]
        assert {json.dumps(record.point) for record in group} == {json.dumps(groups[point_id][0].drawn)}
        assert {(record.status, record.step) for record in group} == {("finished", 8)}
        assert [record.result["eval/accuracy"] for record in group] == [0.5, 0.6, 0.7]
        assert group[0].result.keys() == {"eval/accuracy"}
    controls = [group[0] for group in groups.values() if group[0].control_of is not None]
    soft = [point for point in drawn(tmp_path) if point["loss.preset"] == "gdpo"]
    assert sorted(record.point["loss.beta"] for record in controls) == [0.1, 0.3]
    assert len(soft) > 2
    assert all(control(groups[record.control_of][0].point) == record.point for record in controls)


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_kill_at_any_write_changes_nothing_but_where_it_goes_on(tmp_path: Path, at_once: int) -> None:
    settings: dict[str, Any] = {"trials": 3, "repeats": 2, "controls": True, "seed": 0}

    def outcome(folder: Path) -> list[Any]:
        return sorted(
            json.dumps([record.drawn, record.repeat, record.status, record.result, record.step])
            for record in Journal(folder)
        )

    whole = tmp_path / "whole"
    drive(make(whole, space_of(FAMILIES), **settings), at_once=at_once)
    assert len(Journal(whole).group_by_point()) == 5
    for writes in itertools.count():
        folder = tmp_path / str(writes)
        dying = Dying(folder, writes)
        try:
            drive(make(dying, space_of(FAMILIES), **settings), at_once=at_once)
        except Killed:
            over = {record.number for record in Journal(folder) if record.ended}
            again = drive(make(folder, space_of(FAMILIES), **settings), at_once=at_once)
            assert outcome(folder) == outcome(whole)
            assert drawn(folder) == drawn(whole)
            assert not over & set(again)
            assert len(over) + len(again) == len(Journal(folder))
        else:
            controlled = sum(record.control is not None for record in Journal(whole))
            assert writes == 4 * len(Journal(whole)) + controlled
            return


def test_what_was_running_is_handed_out_again_first(tmp_path: Path) -> None:
    search = make(tmp_path, space_of(FAMILIES), trials=4, repeats=2)
    first = [search.suggest(str(turn)) for turn in range(3)]
    search.on_trial_complete("0", {"step": 8, "total": 8, "eval/accuracy": 1.0})
    again = make(tmp_path, space_of(FAMILIES), trials=4, repeats=2)
    assert [again.suggest(str(turn)) for turn in range(2)] == first[1:]


def test_raised_repeats_and_trials_are_added_to_a_finished_search(tmp_path: Path) -> None:
    drive(make(tmp_path, space_of(FAMILIES), trials=2))
    before = drawn(tmp_path)
    assert drive(make(tmp_path, space_of(FAMILIES), trials=3, repeats=2)) == [3, 4, 5, 6]
    assert drawn(tmp_path)[:2] == before
    assert [record.point_id for record in Journal(tmp_path)] == [1, 2, 1, 2, 5, 5]


def test_a_grid_goes_through_its_points_in_order(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"algorithm": "grid"}

    def allowed(point: Point) -> str | None:
        return "it is too much" if point["loss.beta"] == 0.2 and len(point["references.use"]) == 2 else None

    expected = [point for point in space_of(SIX).iterate_grid() if allowed(point) is None]
    drive(make(tmp_path, space_of(SIX), allowed=allowed, trials=2, **settings))
    assert drawn(tmp_path) == expected[:2]
    drive(make(tmp_path, space_of(SIX), allowed=allowed, **settings))
    assert drawn(tmp_path) == expected
    with pytest.raises(SpaceError, match="beta is wrong"):
        make(tmp_path / "none", space_of(SIX), allowed=lambda point: "beta is wrong", **settings)


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_a_small_space_ends_when_all_its_points_are_there(tmp_path: Path, algorithm: str) -> None:
    space = space_of({f"loss.{name}": {"choice": [0, 1, 2, 3]} for name in "ab"})

    def score(point: Point, repeat: int) -> dict[str, float]:
        """Draws TPE to one point again and again."""
        return {"eval/accuracy": float(-point["loss.a"] - point["loss.b"])}

    drive(make(tmp_path, space, algorithm=algorithm, trials=30), score)
    assert sorted(map(json.dumps, drawn(tmp_path))) == sorted(map(json.dumps, space.iterate_grid()))


def test_a_point_that_is_refused_is_drawn_again_until_it_is_hopeless(tmp_path: Path) -> None:
    def allowed(point: Point) -> str | None:
        return None if point["training.learning_rate"] < 1e-5 else "the rate is too high"

    drive(make(tmp_path, space_of(RATE), allowed=allowed, trials=12))
    assert len(drawn(tmp_path)) == 12
    assert all(point["training.learning_rate"] < 1e-5 for point in drawn(tmp_path))
    with pytest.raises(SpaceError, match="the rate is too high"):
        make(tmp_path / "none", space_of(RATE), allowed=lambda point: "the rate is too high", trials=1)
    assert len(Journal(tmp_path / "none")) == 0


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_grid_fields_share_a_random_search_evenly(tmp_path: Path, algorithm: str) -> None:
    fields = RATE | {"loss.preset": {"grid": ["dpo", "ipo"]}, "references.use": {"grid": [["a"], ["a", "b"]]}}
    score: Score = lambda point, repeat: {"eval/accuracy": float(point["loss.preset"] == "ipo")}  # noqa: E731
    for trials in (5, 18):
        drive(make(tmp_path, space_of(fields), algorithm=algorithm, trials=trials), score)
        cells = Counter((point["loss.preset"], len(point["references.use"])) for point in drawn(tmp_path))
        assert len(cells) == 4
        assert max(cells.values()) - min(cells.values()) == 1
    assert len({point["training.learning_rate"] for point in drawn(tmp_path)}) == 18


def test_a_grid_value_that_is_refused_leaves_its_turn_to_the_others(tmp_path: Path) -> None:
    fields = RATE | {"loss.preset": {"grid": ["dpo", "ipo", "hinge"]}}

    def allowed(point: Point) -> str | None:
        return "not ipo" if point["loss.preset"] == "ipo" else None

    drive(make(tmp_path, space_of(fields), allowed=allowed, trials=8))
    assert Counter(point["loss.preset"] for point in drawn(tmp_path)) == {"dpo": 4, "hinge": 4}


def hill(point: Point, repeat: int) -> dict[str, float]:
    """Best at simpo, beta 10, margin 0.5; repeats scatter evenly around the value."""
    far = {"dpo": 1.5, "ipo": 1.0, "simpo": 0.0}[point["loss.preset"]]
    far += abs(math.log10(point["loss.beta"]) - 1) + abs(point.get("loss.margin", 0.5) - 0.5)
    return {"eval/accuracy": -far + (repeat - 0.5) / 10, "eval/kl/base": point["loss.beta"]}


def test_tpe_finds_more_than_chance(tmp_path: Path) -> None:
    best: dict[str, list[float]] = {"random": [], "tpe": []}
    for (algorithm, values), seed in itertools.product(best.items(), range(3)):
        folder = tmp_path / f"{algorithm}-{seed}"
        drive(make(folder, Branching(), algorithm=algorithm, trials=36, seed=seed), hill, at_once=2)
        values.append(np.mean(sorted(record.result["eval/accuracy"] for record in Journal(folder))[-10:]))
    assert np.mean(best["tpe"]) > np.mean(best["random"]) + 0.2


@pytest.mark.parametrize("objectives", [(ACCURACY,), (ACCURACY, KL), (KL,)])
def test_tpe_goes_on_as_if_it_had_never_stopped(tmp_path: Path, objectives: Sequence[Objective]) -> None:
    settings: dict[str, Any] = {"algorithm": "tpe", "trials": 18, "repeats": 2, "seed": 5}
    space = Branching()
    drive(make(tmp_path / "whole", space, *objectives, **settings), hill)
    for most in (7, 6, 4, 4, 4, 6):
        drive(make(tmp_path / "parts", space, *objectives, **settings), hill, most=most)
    drive(make(tmp_path / "parts", space, *objectives, **settings), hill)
    assert drawn(tmp_path / "parts") == drawn(tmp_path / "whole")


def start(folder: Path, **config: Any) -> tuple[JournalSearcher, TrialRecord]:
    search = make(folder, space_of(RATE), **{"trials": 1, **config})
    return search, search._journal[search.suggest("t")["number"]]


@pytest.mark.parametrize(
    ("result", "error", "status", "reason"),
    [
        ({"step": 8, "total": 8, "eval/accuracy": 0.6}, False, "finished", None),
        ({"step": 4, "total": 8, "eval/accuracy": 0.6}, False, "stopped", None),
        ({"failed": "the loss is not finite at step 5"}, False, "failed", "the loss is not finite at step 5"),
        (None, True, "failed", "the trial's process ended with an error"),
        (None, False, "failed", "it ended without a result"),
    ],
)
def test_how_a_trial_ended(
    tmp_path: Path, result: dict[str, Any] | None, error: bool, status: str, reason: str | None
) -> None:
    search, _ = start(tmp_path)
    search.on_trial_complete("t", result, error)
    record = Journal(tmp_path)[1]
    assert (record.status, record.reason) == (status, reason)


def test_a_reason_known_before_the_error_stands(tmp_path: Path) -> None:
    search, record = start(tmp_path)
    record.reason = "out of memory"
    search.on_trial_complete("t", error=True)
    assert Journal(tmp_path)[1].reason == "out of memory"


def test_a_waiting_trial_that_the_scheduler_gives_up_keeps_its_last_metrics(tmp_path: Path) -> None:
    search, _ = start(tmp_path)
    reported = {
        "step": 4,
        "total": 8,
        "eval/accuracy": 0.6,
        "eval/kl/base": math.nan,
        "time": 1.0,
        "eval/x": "?",
    }
    search.on_trial_result("t", reported)
    running = Journal(tmp_path)[1]
    assert (running.status, running.step, running.result) == ("running", 4, {"eval/accuracy": 0.6})
    search.on_trial_complete("t")
    search.on_trial_complete("t", error=True)  # Tune may tell twice
    stopped = Journal(tmp_path)[1]
    assert (stopped.status, stopped.step, stopped.result) == ("stopped", 4, {"eval/accuracy": 0.6})


def test_optuna_is_told_the_mean_of_the_repeats_that_gave_all_objectives(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"algorithm": "tpe", "trials": 3, "repeats": 3}
    search = make(tmp_path, space_of(RATE), ACCURACY, KL, **settings)
    values = [(0.5, 2.0), (0.7, 4.0), None, (0.1, math.nan), None, None, None, None, None]
    for turn, pair in enumerate(values):
        search.suggest(str(turn))
        search.on_trial_result(str(turn), {"step": 4, "eval/accuracy": 0.9, "eval/kl/base": 9.0})
        result = {"failed": "it diverged"}
        if pair:
            result = dict(zip(("eval/accuracy", "eval/kl/base"), pair, strict=True))
        search.on_trial_complete(str(turn), {"step": 8, "total": 8, **result})
    for process in (search, make(tmp_path, space_of(RATE), ACCURACY, KL, **settings)):
        study = process._source._study
        assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
        told = study.trials
        assert [trial.state.name for trial in told] == ["COMPLETE", "FAIL", "FAIL"]
        assert told[0].values == pytest.approx([0.6, 3.0])


def test_a_changed_point_goes_on_changed_and_what_was_drawn_stands(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"algorithm": "grid", "controls": True}
    space = space_of({"loss.preset": "gdpo", "loss.beta": 0.1, "training.warmup": {"grid": [1, 2]}})
    search = make(tmp_path, space, **settings)
    assert [search.suggest(str(turn))["number"] for turn in range(3)] == [1, 2, 3]
    for number in (1, 2):  # a point and the control that it shares with the next point
        search.change_point(number, search._journal[number].point | {"loss.beta": 0.17})
    again = make(tmp_path, space, repeats=2, **settings)
    handed_out = [again.suggest(str(turn))["loss.beta"] for turn in range(6)]
    assert handed_out == [0.17, 0.17, 0.1, 0.1, 0.1, 0.1]
    assert again.next_trial() is None
    assert [record.drawn["loss.beta"] for record in Journal(tmp_path)] == [0.1] * 6


def test_a_widened_space_goes_on_with_what_still_fits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"algorithm": "tpe", "seed": 3}
    drive(make(tmp_path, space_of(RATE), trials=12, **settings), hill_of_rate)
    other = {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}
    drive(make(tmp_path, space_of(other), trials=20, **settings), hill_of_rate)
    assert len(drawn(tmp_path)) == 20
    assert all(point["training.learning_rate"] >= 1e-5 for point in drawn(tmp_path)[12:])


def hill_of_rate(point: Point, repeat: int) -> dict[str, float]:
    return {"eval/accuracy": -abs(math.log10(point["training.learning_rate"]) + 4)}


@pytest.mark.parametrize("references", [("base",), ("base", "old", "movie")])
def test_the_named_spaces_are_searched_and_taken_up_again_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], references: tuple[str, ...]
) -> None:
    space = Space(SPACES, {}, references, {"preset": "dpo"})
    optuna.logging.set_verbosity(optuna.logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for trials in (8, 16):
            search = make(tmp_path, space, algorithm="tpe", trials=trials, seed=1)
            assert len(cloudpickle.dumps(search)) < 1000  # Tune pickles what it is given
            drive(search)
    assert len({json.dumps(point) for point in drawn(tmp_path)}) == 16
    assert [trial.state.name for trial in search._source._study.trials] == ["COMPLETE"] * 16
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING


def test_points_can_be_sampled_without_a_journal() -> None:
    space = Space(
        SPACES, {"loss.preset": parse_domain({"grid": ["dpo", "ipo"]})}, ("base",), {"preset": "dpo"}
    )
    points = sample_points(space, 6, seed=1)
    assert points == sample_points(space, 6, seed=1) != sample_points(space, 6, seed=2)
    assert Counter(point["loss.preset"] for point in points) == {"dpo": 3, "ipo": 3}


def test_a_trial_of_before_versions_is_read_and_one_of_after_is_refused(tmp_path: Path) -> None:
    (record,) = Journal(tmp_path).add_point({"loss.preset": "dpo"})
    file = tmp_path / record.name / "trial.json"
    fields = json.loads(file.read_text())
    assert fields.pop("version") == 2
    del fields["sha256"]
    old = {"told" if name == "end_reported" else name: value for name, value in fields.items()}
    file.write_text(json.dumps(old | {"told": True}))
    assert Journal(tmp_path)[1].end_reported
    file.write_text(json.dumps(fields | {"version": 3}))
    with pytest.raises(UsageError, match=r"trial.json: is not a trial's record .* it has version 3"):
        Journal(tmp_path)
