"""Schedulers that decide which trials continue: their settings, and Ray Tune's objects built from them.

Importing this module imports neither torch nor Ray.
"""

import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from losses.settings import FrozenSettings
from tune_spaces.domains import Domain, RandInt, SpaceError, Uniform

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

STEP_KEY = "step"
"""Key of a trial's progress in its reports, in optimizer steps."""


class FifoConfig(FrozenSettings):
    """No scheduling: every trial runs to its end."""

    type: Literal["fifo"] = "fifo"
    """Every trial runs to its end."""


class AshaConfig(FrozenSettings):
    """Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934): the best at each rung continue.

    The first rung is at `grace_steps`, by default the run's length over reduction_factor squared; each next
    rung is at reduction_factor times that step.
    """

    type: Literal["asha"] = "asha"
    """Asynchronous successive halving: the best at each rung continue."""
    grace_steps: int | None = Field(default=None, ge=1, examples=[100])
    """Step of the first rung; null: the run's length over reduction_factor squared, rounded up to an
    evaluation."""
    reduction_factor: float = Field(default=3, gt=1, allow_inf_nan=False)
    """One in so many trials continues past a rung, and each next rung is at so many times the step."""
    brackets: int = Field(default=1, ge=1)
    """Groups of trials with different first rungs."""


class PbtConfig(FrozenSettings):
    """Population based training (Jaderberg et al. 2017, arXiv:1711.09846).

    The worst trials copy weights and settings of the best, with the numbers changed slightly.
    `perturb_every_steps` is an eighth of the run by default.
    """

    type: Literal["pbt"] = "pbt"
    """Population based training: the worst trials copy weights and settings of the best."""
    perturb_every_steps: int | None = Field(default=None, ge=1, examples=[100])
    """Steps between two exchanges; null: an eighth of the run, rounded up to an evaluation."""
    quantile_fraction: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the trials that copy, and of those that are copied."""
    resample_probability: float = Field(default=0.25, ge=0, le=1)
    """How often a copied number is drawn anew instead of changed a little."""


SchedulerConfig = Annotated[FifoConfig | AshaConfig | PbtConfig, Field(discriminator="type")]


def build_scheduler(
    config: FifoConfig | AshaConfig | PbtConfig,
    *,
    metric: str,
    mode: Literal["max", "min"],
    max_steps: int,
    every_steps: int,
    mutations: Mapping[str, Domain],
    seed: int,
) -> "TrialScheduler":
    """Build Ray Tune's scheduler.

    Args:
        config: type of scheduler and its settings.
        metric: key in the reports of the value by which trials are compared.
        mode: whether higher or lower is better.
        max_steps: length of a trial.
        every_steps: steps between two evaluations.
        mutations: domains by field; PBT may change the fields whose domain is a range.
        seed: seeds Python's and NumPy's global generators, which Ray's schedulers use.

    Raises:
        SpaceError: the scheduler would have nothing to do in this search.
    """
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    if config.type == "fifo":
        return FIFOScheduler()
    random.seed(seed)
    np.random.seed(seed)
    # The last evaluation at which stopping saves anything: at its last report a trial has already ended.
    horizon = (max_steps - 1) // every_steps * every_steps
    if config.type == "asha":
        share = max_steps / config.reduction_factor**2
        grace = config.grace_steps or _round_up_to_evaluation(share, every_steps)
        _refuse_idle_scheduler(
            grace, horizon, f"scheduler asha stops nothing before step {grace}", "grace_steps"
        )
        return AsyncHyperBandScheduler(
            time_attr=STEP_KEY,
            metric=metric,
            mode=mode,
            max_t=horizon,
            grace_period=grace,
            reduction_factor=config.reduction_factor,
            brackets=config.brackets,
            stop_last_trials=False,
        )
    interval = config.perturb_every_steps or _round_up_to_evaluation(max_steps / 8, every_steps)
    _refuse_idle_scheduler(
        interval, horizon, f"scheduler pbt changes nothing before step {interval}", "perturb_every_steps"
    )
    return _build_population_scheduler(config, metric, mode, interval, max_steps, mutations)


def _build_population_scheduler(
    config: PbtConfig, metric: str, mode: str, interval: int, max_steps: int, mutations: Mapping[str, Domain]
) -> "TrialScheduler":
    from tune_spaces.population import PopulationScheduler

    ranges = {field: domain for field, domain in mutations.items() if isinstance(domain, Uniform | RandInt)}
    if not ranges:
        raise SpaceError(
            "scheduler pbt changes numbers that every trial draws from one range, and this space has none; "
            "name the space optimizer, or give one, e.g. "
            "space: {training.learning_rate: {loguniform: [1.0e-6, 1.0e-4]}}"
        )
    return PopulationScheduler(
        ranges,
        last_step=max_steps,
        time_attr=STEP_KEY,
        metric=metric,
        mode=mode,
        perturbation_interval=interval,
        quantile_fraction=config.quantile_fraction,
        resample_probability=config.resample_probability,
    )


def _round_up_to_evaluation(steps: float, every_steps: int) -> int:
    """Round steps up to the next evaluation."""
    return max(1, math.ceil(steps / every_steps)) * every_steps


def _refuse_idle_scheduler(first: int, horizon: int, problem: str, field: str) -> None:
    """Refuse a scheduler whose first decision comes after the last evaluation that it can act on."""
    if first > horizon:
        raise SpaceError(
            f"{problem}, and the last evaluation before a trial's end is at step {horizon}; "
            f"lower scheduler.{field} or evaluation.every_steps, or use scheduler: {{type: fifo}}"
        )
