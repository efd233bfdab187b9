"""A point of the search while it is drawn, field by field."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from losses.config import LossConfig
from losses.presets import from_settings
from tune_spaces.domains import Choice, Domain, Fixed, SpaceError

PRESET = "loss.preset"
USE = "references.use"


class Ask(Protocol):
    """Whoever chooses: a sampler, a grid, a test."""

    def __call__(self, name: str, domain: Domain, /) -> Any:
        """A value of the domain. A name has the same domain whenever it is asked."""


@dataclass(frozen=True)
class Drawn:
    """That a field was drawn: from what, in which case, and whether the sweep file narrows it."""

    field: str
    domain: Domain
    when: str = ""
    narrowed: bool = False

    @property
    def name(self) -> str:
        """`loss.beta`, or `loss.beta [simpo]` for a field whose domain is of that case only."""
        return f"{self.field} [{self.when}]" if self.when and not self.narrowed else self.field


@dataclass(kw_only=True)
class Draft:
    """What a named space works on.

    A named space may look at the references, at which fields are drawn, and at the types of the loss's stages
    (`shape`), not at drawn numbers: that keeps what a space can ask small enough to be listed.

    Attributes:
        ask: chooses the values.
        references: names in the base run, the primary first.
        base_loss: the base run's `loss` section.
        narrowed: domains that the sweep file gives, by field; they go before a named space's own.
        fields: run-file fields drawn so far.
        drawn: where each came from.
    """

    ask: Ask
    references: tuple[str, ...]
    base_loss: Mapping[str, Any]
    narrowed: Mapping[str, Domain] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    drawn: list[Drawn] = field(default_factory=list)

    def draw(
        self, field: str, domain: Domain, when: str = "", suits: Callable[[Any], bool] | None = None
    ) -> Any:
        """Choose a field's value.

        Args:
            field: dotted, as in the run file.
            domain: what it may be, unless the sweep file narrows it.
            when: the case that the domain belongs to, e.g. a loss family. A narrowed domain is of all cases.
            suits: which values of a narrowed choice can be in this case; those alone are asked then.

        Raises:
            SpaceError: the sweep file gives no value for this case.
        """
        narrowed = self.narrowed.get(field)
        drawn = Drawn(field, narrowed or domain, when, narrowed=narrowed is not None)
        if suits and isinstance(narrowed, Choice) and not all(map(suits, narrowed.values)):
            drawn = Drawn(field, _suiting(narrowed, suits, field, when), when)
        domain = drawn.domain
        self.fields[field] = domain.value if isinstance(domain, Fixed) else self.ask(drawn.name, domain)
        self.drawn.append(drawn)
        return self.fields[field]

    def fix(self, field: str, value: Any) -> None:
        """Set a field that follows from what was drawn."""
        self.fields[field] = value

    @property
    def loss(self) -> LossConfig:
        """The loss so far.

        Raises:
            SpaceError: the fields fit no loss, because of how the sweep file narrows them.
        """
        loss = applied({"loss": self.base_loss}, self.fields)["loss"]
        stage = loss.get("references")
        if isinstance(stage, Mapping) and isinstance(weights := stage.get("weights"), Mapping):
            by_order = [weights[name] for name in self.references if name in weights]
            loss = {**loss, "references": {**stage, "weights": by_order}}
        try:
            return from_settings(loss)
        except ValueError as error:
            raise SpaceError(f"a point of the search, {self.fields}, makes no loss: {error}") from None

    @property
    def has_family(self) -> bool:
        """Whether a named loss was drawn, whose own settings make it what it is."""
        return PRESET in self.fields

    @property
    def shape(self) -> tuple[Any, ...]:
        """All that later spaces may look at."""
        loss = self.loss
        stages = (loss.link.type, loss.references.combine, loss.dispersion.type, loss.soft_label.type)
        return (frozenset(self.fields), *stages)


def _suiting(choice: Choice, suits: Callable[[Any], bool], field: str, when: str) -> Choice:
    values = tuple(filter(suits, choice.values))
    if not values:
        raise SpaceError(
            f"{field} is narrowed to {choice}: none is for {when}; add one, or narrow loss.preset"
        )
    return type(choice)(values=values)


def applied(content: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a run file with a point's fields in it.

    A drawn `loss.preset` replaces the whole loss, and a drawn `type` its whole section where that has another
    type, since the other fields belong to the type.
    """
    content = dict(content)
    if PRESET in point:
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
