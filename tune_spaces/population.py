"""Population based training with a searcher of our own. Imports Ray."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from tune_spaces.domains import LogUniform, RandInt, Uniform

NUMBER = "number"
"""Field of a trial's config that says which trial it is, whoever's settings it takes over."""


class Population(PopulationBasedTraining):
    """Ray's population based training, with four differences.

    Numbers stay in their ranges; a trial keeps its number; one that has reached its end is left alone; and
    trials may come from a search algorithm, whose points are the population's first.
    """

    def __init__(
        self, ranges: Mapping[str, Uniform | RandInt], *, last_step: int, time_attr: str, **settings: Any
    ) -> None:
        """Ranges by field of a trial's config; the other settings are Ray's."""
        super().__init__(
            time_attr=time_attr,
            hyperparam_mutations={field: _sampled(domain) for field, domain in ranges.items()},
            custom_explore_fn=self._clipped,
            log_config=False,
            require_attrs=False,
            **settings,
        )
        self._ranges = dict(ranges)
        self._last_step = last_step
        self._step = time_attr

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Take a trial into the population.

        Ray refuses every search algorithm here, since most would learn from points that were changed later.
        """
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide what a trial does next, unless it is done."""
        if result.get(self._step, 0) >= self._last_step:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        if NUMBER in trial.config:
            config[NUMBER] = trial.config[NUMBER]
        return config, operations

    def _clipped(self, config: dict[str, Any]) -> dict[str, Any]:
        inside = {
            field: domain.clip(config[field]) for field, domain in self._ranges.items() if field in config
        }
        return {**config, **inside}


def _sampled(domain: Uniform | RandInt) -> Any:
    """The same range in Ray's terms."""
    if isinstance(domain, RandInt):
        return tune.randint(domain.low, domain.high + 1)
    if isinstance(domain, LogUniform):
        return tune.loguniform(domain.low, domain.high)
    return tune.uniform(domain.low, domain.high)
