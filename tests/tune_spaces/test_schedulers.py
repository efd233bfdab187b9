"""Schedulers built from settings, fed with reports of trials that do not run. Ray is not started."""

from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import MagicMock

import pytest
from pydantic import TypeAdapter
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import SearchGenerator

from tune_spaces.domains import Domain, SpaceError, parse_domain
from tune_spaces.population import PopulationScheduler
from tune_spaces.schedulers import AshaConfig, FifoConfig, PbtConfig, SchedulerConfig, build_scheduler

METRIC = "eval/accuracy"
VALUES = (0.1, 0.5, 0.6, 0.9)
RANGES: dict[str, Domain] = {
    "training.learning_rate": parse_domain({"loguniform": [1e-6, 1e-4]}),
    "training.warmup": parse_domain({"uniform": [0, 0.2]}),
    "training.pairs_per_step": parse_domain({"randint": [4, 9]}),
}


def make_scheduler(config: Any, *, mode: Literal["max", "min"] = "max", **changes: Any) -> Any:
    settings = {"max_steps": 90, "every_steps": 10, "mutations": RANGES, "seed": 0} | changes
    return build_scheduler(config, metric=METRIC, mode=mode, **settings)


def report_result(scheduler: Any, trial: Any, step: int, value: float, controller: Any = None) -> str:
    return str(scheduler.on_trial_result(controller, trial, {"step": step, METRIC: value}))


def test_the_type_says_which_scheduler() -> None:
    read = TypeAdapter(SchedulerConfig).validate_python
    assert read({"type": "asha", "grace_steps": 5}) == AshaConfig(grace_steps=5)
    assert read({"type": "pbt"}) == PbtConfig()
    assert read({"type": "fifo"}) == FifoConfig()
    with pytest.raises(ValueError, match="reduction_factor"):
        read({"type": "asha", "reduction_factr": 2})


def test_fifo_lets_every_trial_continue() -> None:
    assert (
        report_result(make_scheduler(FifoConfig()), SimpleNamespace(trial_id="a"), 10, 0.0)
        == TrialScheduler.CONTINUE
    )


@pytest.mark.parametrize(("mode", "good", "bad"), [("max", 0.9, 0.1), ("min", 0.1, 0.9)])
def test_asha_stops_the_worse_at_a_rung_but_never_at_the_last_report(
    mode: Literal["max", "min"], good: float, bad: float
) -> None:
    asha = make_scheduler(AshaConfig(), mode=mode)  # rungs at 90 / 3^2 = 10 and at 30; 90 is the end
    better, worse, late, short = (SimpleNamespace(trial_id=name) for name in "abcd")
    for trial in (better, worse, late, short):
        asha.on_trial_add(None, trial)
    steps = range(0, 91, 10)
    assert {report_result(asha, better, step, good) for step in steps} == {TrialScheduler.CONTINUE}
    assert report_result(asha, worse, 0, bad) == TrialScheduler.CONTINUE
    assert report_result(asha, worse, 10, bad) == TrialScheduler.STOP
    assert report_result(asha, late, 10, good) == TrialScheduler.CONTINUE
    assert report_result(asha, late, 20, bad) == TrialScheduler.CONTINUE
    assert report_result(asha, late, 30, bad) == TrialScheduler.STOP
    assert report_result(asha, short, 90, good) == TrialScheduler.CONTINUE


def test_a_scheduler_with_nothing_to_do_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"asha stops nothing before step 90.*at step 80.*grace_steps"):
        make_scheduler(AshaConfig(grace_steps=90))
    with pytest.raises(SpaceError, match=r"every_steps"):
        make_scheduler(AshaConfig(), every_steps=90)
    with pytest.raises(SpaceError, match=r"perturb_every_steps"):
        make_scheduler(PbtConfig(perturb_every_steps=90))
    with pytest.raises(SpaceError, match=r"this space has none.*learning_rate"):
        make_scheduler(PbtConfig(), mutations={"loss.preset": parse_domain({"choice": ["dpo", "ipo"]})})


def make_population(size: int = 4) -> tuple[PopulationScheduler, list[Trial], Any]:
    scheduler = make_scheduler(PbtConfig(resample_probability=0.5))
    controller = MagicMock(search_alg=MagicMock(spec=SearchGenerator))
    trials = []
    for number in range(1, size + 1):
        point = {"training.learning_rate": 5e-5, "training.warmup": 0.1, "training.pairs_per_step": 6}
        trial = Trial(
            "trial", stub=True, config={"number": number, "loss.preset": f"family {number}", **point}
        )
        trial.set_status(Trial.RUNNING)
        scheduler.on_trial_add(controller, trial)
        trials.append(trial)
    controller.get_trials.return_value = trials
    controller._schedule_trial_save.side_effect = lambda trial, result: f"weights of {trial.config['number']}"
    return scheduler, trials, controller


def test_pbt_gives_the_worst_trial_the_weights_and_settings_of_the_best() -> None:
    scheduler, trials, controller = make_population()
    best_first = list(zip(trials, VALUES, strict=True))[::-1]
    for trial, value in best_first:  # an eighth of 90 steps is done at step 20
        assert report_result(scheduler, trial, 10, value, controller) == TrialScheduler.CONTINUE
    controller._schedule_trial_save.assert_not_called()
    for step in (20, 40):
        for trial, value in best_first:
            report_result(scheduler, trial, step, value, controller)
    worst = trials[0]
    controller.pause_trial.assert_called_once_with(worst, should_checkpoint=False)
    assert worst.run_metadata.checkpoint_manager._latest_checkpoint_result.checkpoint == "weights of 4"
    assert (worst.config["number"], worst.config["loss.preset"]) == (1, "family 4")
    assert [trial.config["number"] for trial in trials] == [1, 2, 3, 4]


def test_pbt_does_not_change_a_trial_at_its_last_step() -> None:
    scheduler, trials, controller = make_population()
    for step in (70, 90, 90):
        for trial, value in zip(trials[::-1], VALUES[::-1], strict=True):
            assert report_result(scheduler, trial, step, value, controller) == TrialScheduler.CONTINUE
    controller.pause_trial.assert_not_called()


def test_pbt_explores_within_the_ranges() -> None:
    scheduler, (trial, best, *_), _ = make_population()
    seen: dict[str, set[float]] = {field: set() for field in RANGES}
    for _ in range(300):
        best.config, _operations = scheduler._get_new_config(trial, best)
        for field, values in seen.items():
            value = best.config[field]
            domain: Any = RANGES[field]
            assert domain.low <= value <= domain.high
            values.add(value)
    assert seen["training.pairs_per_step"] == set(range(4, 10))
    assert all(isinstance(value, int) for value in seen["training.pairs_per_step"])
    assert min(len(values) for field, values in seen.items() if field != "training.pairs_per_step") > 100
