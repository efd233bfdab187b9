"""Population based training on points of the project's own search. Imports Ray."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from tune_spaces.domains import LogUniform, RandInt, Uniform

NUMBER_FIELD = "number"
"""Field of a trial's config with the trial's number, which stays when it copies another trial's settings."""


class PopulationScheduler(PopulationBasedTraining):
    """Ray's population based training, with four differences.

    Numbers stay in their ranges; a trial keeps its number; a trial at its last step is left alone; and trials
    may come from a search algorithm, whose points are the initial population.
    """

    def __init__(
        self, ranges: Mapping[str, Uniform | RandInt], *, last_step: int, time_attr: str, **settings: Any
    ) -> None:
        """Create the scheduler.

        Args:
            ranges: by field of a trial's config.
            last_step: step at which a trial ends.
            time_attr: key of a result's step.
            settings: other arguments of Ray's scheduler.
        """
        super().__init__(
            time_attr=time_attr,
            hyperparam_mutations={field: _to_ray_domain(domain) for field, domain in ranges.items()},
            custom_explore_fn=self._clip_to_ranges,
            log_config=False,
            require_attrs=False,
            **settings,
        )
        self._ranges = dict(ranges)
        self._last_step = last_step
        self._step_key = time_attr

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Add a trial to the population.

        Ray refuses every search algorithm here, since most would learn from points that are changed later; it
        gets a stand-in without one.
        """
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide what a trial does next; a trial at its last step is not changed."""
        if result.get(self._step_key, 0) >= self._last_step:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        if NUMBER_FIELD in trial.config:
            config[NUMBER_FIELD] = trial.config[NUMBER_FIELD]
        return config, operations

    def _clip_to_ranges(self, config: dict[str, Any]) -> dict[str, Any]:
        clipped = {
            field: domain.clip(config[field]) for field, domain in self._ranges.items() if field in config
        }
        return {**config, **clipped}


def _to_ray_domain(domain: Uniform | RandInt) -> Any:
    """Convert a range to Ray's equivalent."""
    if isinstance(domain, RandInt):
        return tune.randint(domain.low, domain.high + 1)
    if isinstance(domain, LogUniform):
        return tune.loguniform(domain.low, domain.high)
    return tune.uniform(domain.low, domain.high)
