"""The sources of a search's points: its space's grid, or Optuna, whose study the journal restores."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from orchestrator.config.sweep import Objective, SearchConfig
from tune_spaces.domains import Choice, Domain, Grid, LogUniform, RandInt, SpaceError, Uniform
from tune_spaces.spaces import Space

MAX_DRAWS = 100
"""Most draws for one new point; a refused point, or one that the search already has, is drawn again."""

GridValues = tuple[tuple[str, str], ...]
"""The (field, value) pairs of the grid fields that a space has drawn so far for a point."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A point that a source proposes to the search.

    Attributes:
        point: fields of the run file.
        params: the values that were drawn, by the names that the space gives them.
        refusal: why the space has no such point after all, None if it has.
        study_trial: number of its trial in Optuna's study.
        grid_values: its grid fields.
    """

    point: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    study_trial: int = -1
    grid_values: GridValues = ()


class PointSource(Protocol):
    """A source of points. An accepted point is identified by the number of its first trial."""

    def propose_points(self, point_count: int) -> Iterator[Proposal]:
        """Propose the next point of a search that has `point_count`; advancing rejects the last proposal."""

    def accept_proposal(self, point_id: int, proposal: Proposal) -> None:
        """Note that the search has added the proposed point."""

    def restore_point(self, point_id: int, params: Mapping[str, Any]) -> None:
        """Add a point that an earlier process added to the search."""

    def record_result(self, point_id: int, values: Sequence[float] | None) -> None:
        """Record a point's objectives once all its repeats have ended, None if no repeat has them."""


class GridSource:
    """Every combination of the space once, in the space's order; results do not change it."""

    def __init__(self, space: Space) -> None:
        self._points = space.iterate_grid()

    def propose_points(self, point_count: int) -> Iterator[Proposal]:
        """Propose the rest of the grid."""
        return (Proposal(point=point) for point in self._points)

    def accept_proposal(self, point_id: int, proposal: Proposal) -> None:
        """Do nothing: the iterator has moved past the point."""

    def restore_point(self, point_id: int, params: Mapping[str, Any]) -> None:
        """Do nothing: the search skips points that it has."""

    def record_result(self, point_id: int, values: Sequence[float] | None) -> None:
        """Do nothing: the order of a grid is fixed."""


class OptunaSource:
    """Random draws, or TPE, which learns from points that have ended and avoids those that still run.

    Fields given as a grid are not drawn by the sampler: their values are used in turn.
    """

    def __init__(self, space: Space, config: SearchConfig, objectives: Sequence[Objective]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._config = config
        self._study = optuna.create_study(
            sampler=self._build_sampler(0, uniform=True),
            directions=["maximize" if objective.mode == "max" else "minimize" for objective in objectives],
        )
        self._study_trials: dict[int, int] = {}
        self._grid_uses: Counter[GridValues] = Counter()

    def propose_points(self, point_count: int) -> Iterator[Proposal]:
        """Propose up to MAX_DRAWS points, seeded by `point_count`: a resumed search draws new ones."""
        draws: Counter[GridValues] = Counter()
        for attempt in range(MAX_DRAWS):
            # TPE may insist on a point that the search has; random draws then find what is left.
            if attempt in (0, MAX_DRAWS // 2):
                self._study.sampler = self._build_sampler(point_count, uniform=attempt > 0)
            proposal = self._draw_proposal(draws)
            draws.update(_list_prefixes(proposal.grid_values))
            yield proposal
            self._study.tell(proposal.study_trial, state=TrialState.FAIL)

    def accept_proposal(self, point_id: int, proposal: Proposal) -> None:
        """Keep the proposal's trial in the study as running."""
        self._study_trials[point_id] = proposal.study_trial
        self._grid_uses.update(_list_prefixes(proposal.grid_values))

    def restore_point(self, point_id: int, params: Mapping[str, Any]) -> None:
        """Add a point to the study as a running trial; one that the space no longer has is skipped."""
        recorder = _DrawRecorder(lambda name, *_: params[name])
        try:
            self._space.draw_point(recorder)
            trial = create_trial(
                state=TrialState.RUNNING,
                params={
                    name: _to_optuna_value(params[name], distribution)
                    for name, distribution in recorder.distributions.items()
                },
                distributions=recorder.distributions,
            )
        except (KeyError, ValueError):
            return
        self._study.add_trial(trial)
        self._study_trials[point_id] = len(self._study.get_trials(deepcopy=False)) - 1
        self._grid_uses.update(_list_prefixes(recorder.grid_values))

    def record_result(self, point_id: int, values: Sequence[float] | None) -> None:
        """Record a point's values in the study; a point without values is a failed trial there."""
        if point_id in self._study_trials:
            state = TrialState.FAIL if values is None else TrialState.COMPLETE
            self._study.tell(self._study_trials[point_id], values, state=state)

    def _draw_proposal(self, draws: Mapping[GridValues, int]) -> Proposal:
        """Draw one point; `draws` counts grid values that were already drawn for this point."""
        trial = self._study.ask()

        def draw_value(name: str, domain: Domain, grid_values: GridValues) -> Any:
            if isinstance(domain, Grid):
                return min(
                    domain.values,
                    key=lambda value: self._count_uses(draws, (*grid_values, (name, to_key(value)))),
                )
            match _to_distribution(domain):
                case FloatDistribution() as distribution:
                    return trial.suggest_float(
                        name, distribution.low, distribution.high, log=distribution.log
                    )
                case IntDistribution() as distribution:
                    return trial.suggest_int(name, distribution.low, distribution.high)
                case CategoricalDistribution() as distribution:
                    return json.loads(str(trial.suggest_categorical(name, distribution.choices)))

        recorder = _DrawRecorder(draw_value)
        point, refusal = {}, None
        try:
            point = self._space.draw_point(recorder)
        except SpaceError as error:
            refusal = str(error)
        return Proposal(
            point=point,
            params=recorder.values,
            refusal=refusal,
            study_trial=trial.number,
            grid_values=recorder.grid_values,
        )

    def _count_uses(self, draws: Mapping[GridValues, int], grid_values: GridValues) -> tuple[int, int]:
        """Count the draws of these grid values for this point, then the points that have them."""
        return draws.get(grid_values, 0), self._grid_uses[grid_values]

    def _build_sampler(self, point_count: int, *, uniform: bool) -> BaseSampler:
        """Build the sampler for the next point, a random one if `uniform` or if the search is random."""
        seed = int(np.random.SeedSequence([self._config.seed, point_count]).generate_state(1)[0])
        if uniform or self._config.algorithm == "random":
            return RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return TPESampler(
                seed=seed,
                constant_liar=True,
                # Fields that only some losses have are modelled among the points that have them.
                multivariate=True,
                group=True,
                # With fewer random points it settles on a family of losses before it has seen the others.
                n_startup_trials=max(10, (self._config.trials or 0) // 3),
            )


class _DrawRecorder:
    """Draws values for a space and records them with their distributions.

    Args:
        draw_value: (name, domain, grid values so far) -> value.
    """

    def __init__(self, draw_value: Callable[[str, Domain, GridValues], Any]) -> None:
        self._draw_value = draw_value
        self.values: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}
        self.grid_values: GridValues = ()

    def __call__(self, name: str, domain: Domain, /) -> Any:
        value = self._draw_value(name, domain, self.grid_values)
        self.values[name] = value
        if isinstance(domain, Grid):
            self.grid_values += ((name, to_key(value)),)
        else:
            self.distributions[name] = _to_distribution(domain)
        return value


def to_key(value: Any) -> str:
    """Return the same text for equal JSON values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True)


def _list_prefixes(grid_values: GridValues) -> Iterator[GridValues]:
    return (grid_values[:length] for length in range(1, len(grid_values) + 1))


def _to_distribution(domain: Domain) -> BaseDistribution:
    """Convert a domain to Optuna's distribution, with choices as texts, because Optuna takes no lists."""
    match domain:
        case LogUniform():
            return FloatDistribution(domain.low, domain.high, log=True)
        case Uniform():
            return FloatDistribution(domain.low, domain.high)
        case RandInt():
            return IntDistribution(domain.low, domain.high)
        case Choice():
            return CategoricalDistribution([to_key(value) for value in domain.values])
    raise AssertionError(f"{domain} has no distribution")


def _to_optuna_value(value: Any, distribution: BaseDistribution) -> Any:
    return to_key(value) if isinstance(distribution, CategoricalDistribution) else value
