"""Enumeration of all cases in which a point can be drawn."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from tune_spaces.domains import Choice, Domain, Fixed, Grid, RandInt
from tune_spaces.draft import DrawnField, PointDraft, Suggester

T = TypeVar("T")
DrawStep = Callable[[PointDraft], None]


def iterate_branches(
    draw: Callable[[Suggester], T], list_options: Callable[[Domain], Sequence[Any]]
) -> Iterator[T]:
    """Call `draw` once for every combination of values that it can be given, depth first.

    Which domains it draws from may depend on the values so far; the same values must lead to the same domain.

    Args:
        draw: called with the function that gives it its values.
        list_options: returns the values to try of a domain.
    """
    # Per drawn value: its options, and the index of the current one.
    path: list[tuple[Sequence[Any], int]] = []
    while True:
        depth = 0

        def suggest(name: str, domain: Domain, /) -> Any:
            nonlocal depth
            if depth == len(path):
                path.append((list_options(domain), 0))
            options, index = path[depth]
            depth += 1
            return options[index]

        yield draw(suggest)
        while path and path[-1][1] + 1 == len(path[-1][0]):
            path.pop()
        if not path:
            return
        options, index = path[-1]
        path[-1] = (options, index + 1)


@dataclass(frozen=True)
class Exploration:
    """The result of exploring named spaces.

    Attributes:
        drawn_fields: every way in which a field can be drawn.
        always_drawn: names that are drawn in every case.
    """

    drawn_fields: tuple[DrawnField, ...]
    always_drawn: frozenset[str]


def explore_spaces(steps: Sequence[DrawStep], start: PointDraft) -> Exploration:
    """Run named spaces one after another, in every case that can occur.

    Drafts with the same visible state are merged after each space, since later spaces may read nothing else;
    that keeps their number small.
    """
    drawn_fields: dict[tuple[str, str], DrawnField] = {}
    ends = [(start, frozenset[str]())]
    for step in steps:
        merged: dict[Any, tuple[PointDraft, frozenset[str]]] = {}
        for draft, always in ends:
            for end in iterate_branches(partial(_run_step, step, draft), _list_branch_values):
                drawn_fields.update(((one.field, one.when), one) for one in end.drawn_fields)
                names = always | {one.name for one in end.drawn_fields}
                state = end.visible_state
                _, others = merged.get(state, (end, names))
                merged[state] = (end, names & others)
        ends = list(merged.values())
    return Exploration(tuple(drawn_fields.values()), frozenset.intersection(*(always for _, always in ends)))


def list_values(domain: Domain) -> Sequence[Any] | None:
    """Return a domain's values, or None if it is continuous."""
    if isinstance(domain, RandInt):
        return range(domain.low, domain.high + 1)
    if isinstance(domain, Choice | Grid):
        return domain.values
    return [domain.value] if isinstance(domain, Fixed) else None


def _list_branch_values(domain: Domain) -> Sequence[Any]:
    """List values that can lead to different cases: all of a choice, any one of a range."""
    return (
        domain.values
        if isinstance(domain, Choice)
        else [domain.value if isinstance(domain, Fixed) else domain.low]
    )


def _run_step(step: DrawStep, draft: PointDraft, suggest: Suggester) -> PointDraft:
    fork = replace(draft, suggest=suggest, fields=dict(draft.fields), drawn_fields=[])
    step(fork)
    return fork
