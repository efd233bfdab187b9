"""A point of the search space while it is drawn, field by field."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from losses.config import LossConfig
from losses.presets import loss_config_from_settings
from tune_spaces.domains import Choice, Domain, Fixed, SpaceError

PRESET_FIELD = "loss.preset"
USE_FIELD = "references.use"


class Suggester(Protocol):
    """A source of values for the drawn fields: a sampler, a grid, a test."""

    def __call__(self, name: str, domain: Domain, /) -> Any:
        """Return a value of the domain. The same name always comes with the same domain."""


@dataclass(frozen=True)
class DrawnField:
    """A drawn field: its domain, the case it is drawn in, and whether the sweep file narrows it."""

    field: str
    domain: Domain
    when: str = ""
    narrowed: bool = False

    @property
    def name(self) -> str:
        """`loss.beta`, or `loss.beta [simpo]` if the domain belongs to that case only."""
        return f"{self.field} [{self.when}]" if self.when and not self.narrowed else self.field


@dataclass(kw_only=True)
class PointDraft:
    """An unfinished point, to which named spaces add fields.

    A named space may read the references, which fields are drawn, and the types of the loss's stages
    (`visible_state`), but no drawn numbers: that keeps the number of different cases small enough to list.

    Attributes:
        suggest: chooses the values.
        references: names in the base run, the primary first.
        base_loss: the base run's `loss` section.
        narrowed: domains from the sweep file, by field; they override a named space's own.
        fields: run-file fields drawn so far, with their values.
        drawn_fields: how each field was drawn.
    """

    suggest: Suggester
    references: tuple[str, ...]
    base_loss: Mapping[str, Any]
    narrowed: Mapping[str, Domain] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    drawn_fields: list[DrawnField] = field(default_factory=list)

    def draw_field(
        self, field: str, domain: Domain, when: str = "", is_suitable: Callable[[Any], bool] | None = None
    ) -> Any:
        """Choose a field's value and return it.

        Args:
            field: dotted name, as in the run file.
            domain: the possible values, unless the sweep file narrows them.
            when: the case that the domain belongs to, e.g. a loss family; a narrowed domain belongs to all.
            is_suitable: whether a value of a narrowed choice is possible in this case; others are left out.

        Raises:
            SpaceError: the sweep file gives no value for this case.
        """
        narrowed = self.narrowed.get(field)
        drawn = DrawnField(field, narrowed or domain, when, narrowed=narrowed is not None)
        if is_suitable and isinstance(narrowed, Choice) and not all(map(is_suitable, narrowed.values)):
            drawn = DrawnField(field, _keep_suitable_values(narrowed, is_suitable, field, when), when)
        domain = drawn.domain
        self.fields[field] = domain.value if isinstance(domain, Fixed) else self.suggest(drawn.name, domain)
        self.drawn_fields.append(drawn)
        return self.fields[field]

    def fix_field(self, field: str, value: Any) -> None:
        """Set a field whose value follows from other drawn fields."""
        self.fields[field] = value

    @property
    def loss(self) -> LossConfig:
        """The loss so far.

        Raises:
            SpaceError: the fields make no valid loss, because of how the sweep file narrows them.
        """
        loss = apply_point({"loss": self.base_loss}, self.fields)["loss"]
        stage = loss.get("references")
        if isinstance(stage, Mapping) and isinstance(weights := stage.get("weights"), Mapping):
            by_order = [weights[name] for name in self.references if name in weights]
            loss = {**loss, "references": {**stage, "weights": by_order}}
        try:
            return loss_config_from_settings(loss)
        except ValueError as error:
            raise SpaceError(f"a point of the search, {self.fields}, makes no loss: {error}") from None

    @property
    def has_family(self) -> bool:
        """Whether a named loss was drawn, whose defining settings other spaces must keep."""
        return PRESET_FIELD in self.fields

    @property
    def visible_state(self) -> tuple[Any, ...]:
        """Everything that later spaces may read."""
        loss = self.loss
        stages = (loss.link.type, loss.references.combine, loss.dispersion.type, loss.soft_label.type)
        return (frozenset(self.fields), *stages)


def _keep_suitable_values(
    choice: Choice, is_suitable: Callable[[Any], bool], field: str, when: str
) -> Choice:
    values = tuple(filter(is_suitable, choice.values))
    if not values:
        raise SpaceError(
            f"{field} is narrowed to {choice}: no value is for {when}; add one, or narrow loss.preset"
        )
    return type(choice)(values=values)


def apply_point(content: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a run file with a point's fields put in.

    A drawn `loss.preset` replaces the whole loss. A drawn `type` replaces its whole section if that has
    another type, since the section's other fields belong to the type.
    """
    content = dict(content)
    if PRESET_FIELD in point:
        content["loss"] = {}
    for name in sorted(point, key=lambda name: (name.count("."), not name.endswith(".type"))):
        *sections, last = name.split(".")
        section = content
        for part in sections:
            inner = section.get(part)
            section[part] = dict(inner) if isinstance(inner, Mapping) else {}
            section = section[part]
        if last == "type" and section.get("type") != point[name]:
            section.clear()
        section[last] = point[name]
    return content
