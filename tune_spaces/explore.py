"""All the ways in which a draw can go."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from tune_spaces.domains import Choice, Domain, Fixed, Grid, RandInt
from tune_spaces.draft import Ask, Draft, Drawn

T = TypeVar("T")
Step = Callable[[Draft], None]
Options = Callable[[Domain], Sequence[Any]]


def branches(draw: Callable[[Ask], T], options: Options) -> Iterator[T]:
    """Call `draw` once for every combination of answers that it can be given, depth first.

    What it asks may depend on the answers so far; the same answers must lead to the same question.
    """
    script: list[tuple[Sequence[Any], int]] = []  # the answers to each question, and which to give now
    while True:
        depth = 0

        def ask(name: str, domain: Domain, /) -> Any:
            nonlocal depth
            if depth == len(script):
                script.append((options(domain), 0))
            answers, now = script[depth]
            depth += 1
            return answers[now]

        yield draw(ask)
        while script and script[-1][1] + 1 == len(script[-1][0]):
            script.pop()
        if not script:
            return
        answers, now = script[-1]
        script[-1] = (answers, now + 1)


@dataclass(frozen=True)
class Explored:
    """What some named spaces can ask.

    Attributes:
        drawn: every way in which a field can be drawn.
        always: names that are asked whatever the answers are.
    """

    drawn: tuple[Drawn, ...]
    always: frozenset[str]


def explore(steps: Sequence[Step], start: Draft) -> Explored:
    """Go through named spaces one after another.

    Drafts of one shape go on as one, for a space may look at nothing else; that keeps their number small.
    """
    drawn: dict[tuple[str, str], Drawn] = {}
    ends = [(start, frozenset[str]())]
    for step in steps:
        merged: dict[Any, tuple[Draft, frozenset[str]]] = {}
        for draft, always in ends:
            for end in branches(partial(_stepped, step, draft), _kinds):
                drawn.update(((one.field, one.when), one) for one in end.drawn)
                names = always | {one.name for one in end.drawn}
                shape = end.shape
                _, others = merged.get(shape, (end, names))
                merged[shape] = (end, names & others)
        ends = list(merged.values())
    return Explored(tuple(drawn.values()), frozenset.intersection(*(always for _, always in ends)))


def discrete(domain: Domain) -> Sequence[Any] | None:
    """A domain's values, or None where it has too many to go through."""
    if isinstance(domain, RandInt):
        return range(domain.low, domain.high + 1)
    if isinstance(domain, Choice | Grid):
        return domain.values
    return [domain.value] if isinstance(domain, Fixed) else None


def _kinds(domain: Domain) -> Sequence[Any]:
    """Values that can lead to different questions: all of a choice, any one of a range."""
    return (
        domain.values
        if isinstance(domain, Choice)
        else [domain.value if isinstance(domain, Fixed) else domain.low]
    )


def _stepped(step: Step, draft: Draft, ask: Ask) -> Draft:
    fork = replace(draft, ask=ask, fields=dict(draft.fields), drawn=[])
    step(fork)
    return fork
