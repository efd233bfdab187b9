"""The search space of a sweep: named spaces, which the sweep file narrows and adds fields to.

A point is a flat mapping of dotted run-file fields to plain JSON values.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from losses.settings import make_unknown_name_error
from tune_spaces.dispersion import draw_dispersion
from tune_spaces.domains import Domain, Numeric, SpaceError, parse_domain
from tune_spaces.draft import USE_FIELD, DrawnField, PointDraft, Suggester, apply_point
from tune_spaces.explore import DrawStep, Exploration, explore_spaces, iterate_branches, list_values
from tune_spaces.losses import draw_loss_family
from tune_spaces.optimizer import draw_optimizer_settings
from tune_spaces.references import WHEN_SEVERAL, draw_references, has_several_references
from tune_spaces.soft_labels import draw_soft_label_type

__all__ = [
    "SPACES",
    "Domain",
    "NamedSpace",
    "Space",
    "SpaceError",
    "SpaceRow",
    "Suggester",
    "apply_point",
    "parse_domain",
]


@dataclass(frozen=True)
class NamedSpace:
    """A part of the search space that a sweep file can name."""

    name: str
    description: str
    draw: DrawStep


_NAMED_SPACES = (
    NamedSpace(
        "losses", "the loss family, with its own range of beta and its own settings", draw_loss_family
    ),
    NamedSpace(
        "references", "which references, and how several are weighed, clipped and combined", draw_references
    ),
    NamedSpace(
        "dispersion",
        "whether and how pairs on which preferences scatter count less (MallowsPO)",
        draw_dispersion,
    ),
    NamedSpace(
        "soft_labels",
        "how the share of people who preferred `chosen` enters the loss",
        draw_soft_label_type,
    ),
    NamedSpace("optimizer", "learning rate, warm-up and weight decay", draw_optimizer_settings),
)
SPACES: Mapping[str, NamedSpace] = MappingProxyType({space.name: space for space in _NAMED_SPACES})
"""The named spaces, in the order in which they are drawn: each may read what the earlier ones drew."""


@dataclass(frozen=True)
class SpaceRow:
    """A row of the table that shows a space: a field, its domain, and the case in which it is searched."""

    field: str
    domain: str
    when: str


class Space:
    """The space that a search draws its points from.

    Every point of named spaces makes a valid run. The order in which spaces are named does not matter.
    """

    def __init__(
        self,
        names: Iterable[str],
        fields: Mapping[str, Domain],
        references: Iterable[str],
        base_loss: Mapping[str, Any],
    ) -> None:
        """Combine named spaces and the sweep file's fields.

        Args:
            names: named spaces.
            fields: domains by dotted run-file field. They narrow the fields that a named space draws, and add
                the others.
            references: names of the base run's references, the primary first.
            base_loss: the base run's `loss` section.

        Raises:
            SpaceError: a named space does not exist.
        """
        names = set(names)
        for name in sorted(names - set(SPACES)):
            raise SpaceError(str(make_unknown_name_error("space", name, SPACES)))
        self._steps = [space.draw for name, space in SPACES.items() if name in names]
        self._fields = dict(fields)
        self._references = tuple(references)
        self._base_loss = base_loss

    def draw_point(self, suggest: Suggester) -> dict[str, Any]:
        """Draw a point whose values `suggest` chooses.

        Raises:
            SpaceError: the drawn fields, as narrowed by the sweep file, make no valid loss.
        """
        draft = self._build_draft(suggest)
        for step in self._steps:
            step(draft)
        for field, domain in self._added_fields.items():
            if field != USE_FIELD:
                draft.draw_field(field, domain)
        self._choose_references(draft)
        return draft.fields

    def iterate_grid(self) -> Iterator[dict[str, Any]]:
        """Iterate over all points, each once.

        Raises:
            SpaceError: a domain is continuous; the message says which.
        """
        continuous = {
            drawn.field: drawn.domain for drawn in self._drawn_fields if list_values(drawn.domain) is None
        }
        for field, domain in continuous.items():
            more = f" (and {len(continuous) - 1} more)" if len(continuous) > 1 else ""
            raise SpaceError(
                f"{field}{more} is continuous ({domain}), and a grid goes through values; "
                f"set space: {{{field}: {{grid: [...]}}}}, or search.algorithm: random"
            )
        return self._iterate_unique_points()

    def list_rows(self) -> list[SpaceRow]:
        """List the rows of the space's table; cases that share a domain share a row."""
        cases: dict[str, dict[str, list[str]]] = {}
        for drawn in self._drawn_fields:
            when = "" if drawn.name in self._exploration.always_drawn else drawn.when
            cases.setdefault(drawn.field, {}).setdefault(str(drawn.domain), []).append(when)
        return [
            SpaceRow(field, domain, ", ".join(filter(None, when)))
            for field, domains in cases.items()
            for domain, when in domains.items()
        ]

    @property
    def numeric_domains(self) -> dict[str, Domain]:
        """Ranges that are the same for all points, by field: what a scheduler may change during a trial."""
        always = self._exploration.always_drawn | set(self._added_fields)
        return {one.field: one.domain for one in self._drawn_fields if one.name in always and _has_range(one)}

    @cached_property
    def _exploration(self) -> Exploration:
        """Everything that the named spaces can draw."""
        return explore_spaces(self._steps, self._build_draft(_refuse_suggestion))

    @cached_property
    def _added_fields(self) -> dict[str, Domain]:
        """Fields of the sweep file that no named space draws."""
        explored = {drawn.field for drawn in self._exploration.drawn_fields}
        return {field: domain for field, domain in self._fields.items() if field not in explored}

    @property
    def _drawn_fields(self) -> list[DrawnField]:
        return [
            *self._exploration.drawn_fields,
            *(DrawnField(field, domain) for field, domain in self._added_fields.items()),
        ]

    def _build_draft(self, suggest: Suggester) -> PointDraft:
        return PointDraft(
            suggest=suggest, references=self._references, base_loss=self._base_loss, narrowed=self._fields
        )

    def _choose_references(self, draft: PointDraft) -> None:
        """Restrict the references to those that the loss uses, or draw them if the sweep file gives a domain.

        If the base run's loss has no reference, all listed ones stay: the run may be measured against them.
        """
        try:
            combine = draft.loss.references.combine if len(self._references) > 1 else None
        except SpaceError:  # an added field does not fit; validation of the run file reports why
            return
        if combine == "single" or (combine == "none" and draft.has_family):
            draft.fix_field(USE_FIELD, [self._references[0]])
        elif USE_FIELD in self._added_fields:
            is_suitable = has_several_references if combine not in (None, "none") else None
            when = WHEN_SEVERAL if is_suitable else ""
            draft.draw_field(USE_FIELD, self._added_fields[USE_FIELD], when=when, is_suitable=is_suitable)

    def _iterate_unique_points(self) -> Iterator[dict[str, Any]]:
        seen = set()
        for point in iterate_branches(self.draw_point, lambda domain: list_values(domain) or ()):
            key = json.dumps(point, sort_keys=True)
            if key not in seen:
                seen.add(key)
                yield point


def _has_range(drawn: DrawnField) -> bool:
    return isinstance(drawn.domain, Numeric) and drawn.name == drawn.field


def _refuse_suggestion(name: str, domain: Domain, /) -> Any:
    raise AssertionError(f"{name} is drawn although nothing has been explored")
