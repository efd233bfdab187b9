"""The search space of a sweep: named spaces, narrowed and added to by the sweep file.

A point is a flat mapping of dotted run-file fields to plain JSON values.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from losses.settings import unknown
from tune_spaces.dispersion import dispersion
from tune_spaces.domains import Domain, Numeric, SpaceError, parse
from tune_spaces.draft import USE, Ask, Draft, Drawn, applied
from tune_spaces.explore import Explored, Step, branches, discrete, explore
from tune_spaces.losses import losses
from tune_spaces.optimizer import optimizer
from tune_spaces.references import SEVERAL, are_several, references
from tune_spaces.soft_labels import soft_labels

__all__ = ["SPACES", "Ask", "Domain", "NamedSpace", "Row", "Space", "SpaceError", "applied", "parse"]


@dataclass(frozen=True)
class NamedSpace:
    """A part of the search that a sweep file can name."""

    name: str
    description: str
    draw: Step


_NAMED = (
    NamedSpace("losses", "the loss family, with its own range of beta and its own settings", losses),
    NamedSpace(
        "references", "which references, and how several are weighed, clipped and combined", references
    ),
    NamedSpace(
        "dispersion", "whether and how pairs on which people scatter count less (MallowsPO)", dispersion
    ),
    NamedSpace(
        "soft_labels", "what the share of people who preferred `chosen` does to the loss", soft_labels
    ),
    NamedSpace("optimizer", "learning rate, warm-up and weight decay", optimizer),
)
SPACES: Mapping[str, NamedSpace] = MappingProxyType({space.name: space for space in _NAMED})
"""The named spaces, in the order in which they are drawn: each looks at what those before it drew."""


@dataclass(frozen=True)
class Row:
    """A line of the table that shows a space: a field, what it may be, and in which case it is searched."""

    field: str
    domain: str
    when: str


class Space:
    """What a search draws its points from.

    Every point of named spaces makes a valid run. The order in which spaces are named does not matter.
    """

    def __init__(
        self,
        names: Iterable[str],
        fields: Mapping[str, Domain],
        references: Iterable[str],
        base_loss: Mapping[str, Any],
    ) -> None:
        """Put the space together.

        Args:
            names: named spaces.
            fields: domains by dotted run-file field. Those that a named space asks are narrowed by them, the
                others are added.
            references: names of the base run's references, the primary first.
            base_loss: the base run's `loss` section.

        Raises:
            SpaceError: there is no such named space.
        """
        names = set(names)
        for name in sorted(names - set(SPACES)):
            raise SpaceError(str(unknown("space", name, SPACES)))
        self._steps = [space.draw for name, space in SPACES.items() if name in names]
        self._fields = dict(fields)
        self._references = tuple(references)
        self._base_loss = base_loss

    def draw(self, ask: Ask) -> dict[str, Any]:
        """A point whose values `ask` chooses.

        Raises:
            SpaceError: the fields that the sweep file narrows fit no loss with what was drawn.
        """
        draft = self._draft(ask)
        for step in self._steps:
            step(draft)
        for field, domain in self._added.items():
            if field != USE:
                draft.draw(field, domain)
        self._choose_references(draft)
        return draft.fields

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every point, once.

        Raises:
            SpaceError: a domain is continuous; says which.
        """
        endless = {one.field: one.domain for one in self._drawn if discrete(one.domain) is None}
        for field, domain in endless.items():
            more = f" (and {len(endless) - 1} more)" if len(endless) > 1 else ""
            raise SpaceError(
                f"{field}{more} is continuous ({domain}), and a grid goes through values; "
                f"set space: {{{field}: {{grid: [...]}}}}, or search.algorithm: random"
            )
        return self._each_once()

    def table(self) -> list[Row]:
        """The space as a person reads it; cases that share a domain share a line."""
        cases: dict[str, dict[str, list[str]]] = {}
        for one in self._drawn:
            when = "" if one.name in self._explored.always else one.when
            cases.setdefault(one.field, {}).setdefault(str(one.domain), []).append(when)
        return [
            Row(field, domain, ", ".join(filter(None, when)))
            for field, domains in cases.items()
            for domain, when in domains.items()
        ]

    @property
    def numeric(self) -> dict[str, Domain]:
        """Fields with a range that every point draws from the same one, by field: what a trial can change."""
        always = self._explored.always | set(self._added)
        return {one.field: one.domain for one in self._drawn if one.name in always and _has_range(one)}

    @cached_property
    def _explored(self) -> Explored:
        """What the named spaces can ask."""
        return explore(self._steps, self._draft(_no_answer))

    @cached_property
    def _added(self) -> dict[str, Domain]:
        """Fields of the sweep file that no named space asks."""
        asked = {one.field for one in self._explored.drawn}
        return {field: domain for field, domain in self._fields.items() if field not in asked}

    @property
    def _drawn(self) -> list[Drawn]:
        return [*self._explored.drawn, *(Drawn(field, domain) for field, domain in self._added.items())]

    def _draft(self, ask: Ask) -> Draft:
        return Draft(ask=ask, references=self._references, base_loss=self._base_loss, narrowed=self._fields)

    def _choose_references(self, draft: Draft) -> None:
        """Leave the references that the loss makes something of, or ask which if the sweep file does.

        A base run without a reference in its loss keeps those it lists: it may be measured against them.
        """
        try:
            combine = draft.loss.references.combine if len(self._references) > 1 else None
        except SpaceError:  # an added field does not fit; the run file's check says why
            return
        if combine == "single" or (combine == "none" and draft.has_family):
            draft.fix(USE, [self._references[0]])
        elif USE in self._added:
            several = are_several if combine not in (None, "none") else None
            draft.draw(USE, self._added[USE], when=SEVERAL if several else "", suits=several)

    def _each_once(self) -> Iterator[dict[str, Any]]:
        seen = set()
        for point in branches(self.draw, lambda domain: discrete(domain) or ()):
            key = json.dumps(point, sort_keys=True)
            if key not in seen:
                seen.add(key)
                yield point


def _has_range(drawn: Drawn) -> bool:
    return isinstance(drawn.domain, Numeric) and drawn.name == drawn.field


def _no_answer(name: str, domain: Domain, /) -> Any:
    raise AssertionError(f"{name} asked before anything was explored")
