"""Where a search's points come from: the grid of its space, or Optuna, whose study the journal rebuilds."""

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

TRIES = 100
"""Draws for one new point; a refused one, or one that was already entered, is drawn again."""

Turn = tuple[tuple[str, str], ...]
"""The values of the grid fields asked so far."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A point that may be entered.

    Attributes:
        point: fields of the run file.
        params: names that the space asked, and the answers.
        refusal: why there is no such point after all.
        asked: its trial in Optuna's study.
        turn: its grid fields.
    """

    point: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    asked: int = -1
    turn: Turn = ()


class PointSource(Protocol):
    """Where points come from. An entered point is known by the number of its first trial."""

    def propose_points(self, entered: int) -> Iterator[Proposal]:
        """Proposals for the next point after `entered` ones; asking for another refuses the last."""

    def accept_proposal(self, point_id: int, proposal: Proposal) -> None:
        """The proposal was taken."""

    def restore_point(self, point_id: int, params: Mapping[str, Any]) -> None:
        """An earlier process entered this point."""

    def record_result(self, point_id: int, values: Sequence[float] | None) -> None:
        """All repeats of a point have ended: its objectives, or None if no repeat gave them."""


class GridSource:
    """Every combination of the space once, in its order; results teach it nothing."""

    def __init__(self, space: Space) -> None:
        self._points = space.iterate_grid()

    def propose_points(self, entered: int) -> Iterator[Proposal]:
        """What is left of the grid."""
        return (Proposal(point=point) for point in self._points)

    def accept_proposal(self, point_id: int, proposal: Proposal) -> None:
        """Its turn is over."""

    def restore_point(self, point_id: int, params: Mapping[str, Any]) -> None:
        """The search passes over points that it has."""

    def record_result(self, point_id: int, values: Sequence[float] | None) -> None:
        """The order stands."""


class OptunaSource:
    """Random draws, or TPE: it learns from points that have ended, and keeps away from those that have not.

    Fields given as a grid are none of the sampler's business: their values take turns.
    """

    def __init__(self, space: Space, config: SearchConfig, objectives: Sequence[Objective]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._config = config
        self._study = optuna.create_study(
            sampler=self._make_sampler(0, chance=True),
            directions=["maximize" if objective.mode == "max" else "minimize" for objective in objectives],
        )
        self._asked: dict[int, int] = {}
        self._turns: Counter[Turn] = Counter()

    def propose_points(self, entered: int) -> Iterator[Proposal]:
        """At most TRIES draws. Their seed is of `entered`, so that a search that goes on draws new points."""
        tried: Counter[Turn] = Counter()
        for attempt in range(TRIES):
            # TPE may insist on a point that is taken; then chance finds what is left.
            if attempt in (0, TRIES // 2):
                self._study.sampler = self._make_sampler(entered, chance=attempt > 0)
            proposal = self._ask_study(tried)
            tried.update(_list_prefixes(proposal.turn))
            yield proposal
            self._study.tell(proposal.asked, state=TrialState.FAIL)

    def accept_proposal(self, point_id: int, proposal: Proposal) -> None:
        """From now on its trial in the study runs."""
        self._asked[point_id] = proposal.asked
        self._turns.update(_list_prefixes(proposal.turn))

    def restore_point(self, point_id: int, params: Mapping[str, Any]) -> None:
        """Put it back into the study as a running trial; what the space no longer has teaches nothing."""
        questions = _Questions(lambda name, domain, turn: params[name])
        try:
            self._space.draw_point(questions)
            trial = create_trial(
                state=TrialState.RUNNING,
                params={
                    name: _to_optuna_value(params[name], of) for name, of in questions.distributions.items()
                },
                distributions=questions.distributions,
            )
        except (KeyError, ValueError):
            return
        self._study.add_trial(trial)
        self._asked[point_id] = len(self._study.get_trials(deepcopy=False)) - 1
        self._turns.update(_list_prefixes(questions.turn))

    def record_result(self, point_id: int, values: Sequence[float] | None) -> None:
        """The study learns the values; a point without any has failed there."""
        if point_id in self._asked:
            state = TrialState.FAIL if values is None else TrialState.COMPLETE
            self._study.tell(self._asked[point_id], values, state=state)

    def _ask_study(self, tried: Mapping[Turn, int]) -> Proposal:
        trial = self._study.ask()

        def answer(name: str, domain: Domain, turn: Turn) -> Any:
            if isinstance(domain, Grid):
                return min(
                    domain.values, key=lambda value: self._count_uses(tried, (*turn, (name, to_key(value))))
                )
            match _to_distribution(domain):
                case FloatDistribution() as of:
                    return trial.suggest_float(name, of.low, of.high, log=of.log)
                case IntDistribution() as of:
                    return trial.suggest_int(name, of.low, of.high)
                case CategoricalDistribution() as of:
                    return json.loads(str(trial.suggest_categorical(name, of.choices)))

        questions = _Questions(answer)
        point, refusal = {}, None
        try:
            point = self._space.draw_point(questions)
        except SpaceError as error:
            refusal = str(error)
        return Proposal(
            point=point, params=questions.answers, refusal=refusal, asked=trial.number, turn=questions.turn
        )

    def _count_uses(self, tried: Mapping[Turn, int], turn: Turn) -> tuple[int, int]:
        """How often it was tried for this point, then how many points have it."""
        return tried.get(turn, 0), self._turns[turn]

    def _make_sampler(self, entered: int, *, chance: bool) -> BaseSampler:
        seed = int(np.random.SeedSequence([self._config.seed, entered]).generate_state(1)[0])
        if chance or self._config.algorithm == "random":
            return RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return TPESampler(
                seed=seed,
                constant_liar=True,
                # Fields that only some losses ask are modelled among the points that have them.
                multivariate=True,
                group=True,
                # With fewer points it settles on a family before it has seen the others.
                n_startup_trials=max(10, (self._config.trials or 0) // 3),
            )


class _Questions:
    """Asks on behalf of a space and keeps what was asked."""

    def __init__(self, answer: Callable[[str, Domain, Turn], Any]) -> None:
        self._answer = answer
        self.answers: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}
        self.turn: Turn = ()

    def __call__(self, name: str, domain: Domain, /) -> Any:
        value = self._answer(name, domain, self.turn)
        self.answers[name] = value
        if isinstance(domain, Grid):
            self.turn += ((name, to_key(value)),)
        else:
            self.distributions[name] = _to_distribution(domain)
        return value


def to_key(value: Any) -> str:
    """One text per JSON value, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True)


def _list_prefixes(turn: Turn) -> Iterator[Turn]:
    return (turn[:length] for length in range(1, len(turn) + 1))


def _to_distribution(domain: Domain) -> BaseDistribution:
    """Optuna's counterpart; it takes no lists as choices, so that all are texts."""
    match domain:
        case LogUniform():
            return FloatDistribution(domain.low, domain.high, log=True)
        case Uniform():
            return FloatDistribution(domain.low, domain.high)
        case RandInt():
            return IntDistribution(domain.low, domain.high)
        case Choice():
            return CategoricalDistribution([to_key(value) for value in domain.values])
    raise AssertionError(f"{domain} is not asked")


def _to_optuna_value(value: Any, of: BaseDistribution) -> Any:
    return to_key(value) if isinstance(of, CategoricalDistribution) else value
