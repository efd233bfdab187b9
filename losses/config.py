"""The settings of a loss, one field per stage. Torch-free, so that a run file can be checked anywhere.

A setting that cannot work is refused when the config is made, with the remedy in the message.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from losses.settings import LossError, Settings, Within, unknown

# ---------------------------------------------------------------- stage 1: references

Combine = Literal["none", "single", "harmonic", "geometric", "multi_loss"]
WeightRule = Literal["uniform", "adaptive", "adaptive_per_token"]


class ReferencesConfig(Settings):
    """How K frozen references become one (losses.references).

    Numeric weights follow the order of the references, the primary first; they need not sum to 1.
    """

    combine: Combine = "single"
    weights: WeightRule | tuple[float, ...] = "uniform"
    trust_region: Annotated[float, Within(0.1, above=0, below=1)] | None = None
    trust_region_mode: Literal["adaptive", "fixed"] = "adaptive"

    @field_validator("weights", mode="before")
    @classmethod
    def _weights_make_sense(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in get_args(WeightRule):
                raise unknown("weights", value, get_args(WeightRule))
            return value
        if not isinstance(value, Sequence):
            raise LossError(
                f"weights must be a rule or a list in the references' order, got {value!r}; try 'uniform'"
            )
        usable = all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in value)
        if not (usable and sum(value) > 0):
            raise LossError(
                f"weights must be numbers >= 0 with a positive sum, got {list(value)}; try [0.5, 0.5]"
            )
        return value

    @model_validator(mode="after")
    def _several_are_read(self) -> Self:
        if self.combine in ("none", "single"):
            if self.trust_region is not None:
                raise LossError(
                    f"trust_region clips further references around the first, but combine {self.combine} "
                    "reads none; set trust_region: null, or combine: harmonic"
                )
            if self.weights != "uniform":
                raise LossError(
                    f"weights are for several references, but combine {self.combine} reads one at most; "
                    "set weights: uniform, or combine: harmonic"
                )
        if self.trust_region is not None and isinstance(self.weights, tuple) and len(self.weights) == 1:
            raise LossError(
                "trust_region clips further references around the first, but weights has one entry; "
                "give a weight to each of several references, or set trust_region: null"
            )
        return self


# ---------------------------------------------------------------- stage 2: soft label


class SoftLabelConfig(Settings):
    """What the probability p that chosen really beats rejected does to the loss (losses.soft_labels)."""

    type: Literal["none", "geometric", "mixture"] = "none"


# ---------------------------------------------------------------- stage 3: dispersion


class NoDispersion(Settings):
    """Every pair counts alike."""

    type: Literal["none"] = "none"


class EntropyDispersion(Settings):
    """Neg-log-dispersion from the primary reference's entropy: phi_star * -log H.

    `auto` stands for the value that makes the mean scale 1; `LossConfig.with_phi_star` puts it in.
    """

    type: Literal["entropy"] = "entropy"
    phi_star: Annotated[float | Literal["auto"], Within(0.29, at_least=1e-3)] = 0.29

    @field_validator("phi_star", mode="before")
    @classmethod
    def _auto_or_number(cls, value: Any) -> Any:
        try:
            return value if value == "auto" else float(value)
        except (TypeError, ValueError):
            raise LossError(f"phi_star must be a number or 'auto', got {value!r}; try 0.29") from None


class ConstantDispersion(Settings):
    """One neg-log-dispersion for every pair."""

    type: Literal["constant"] = "constant"
    # Below 1e-6 the Mallows distribution is uniform to all intents, and its loss no longer has a slope.
    value: Annotated[float, Within(1.0, at_least=1e-6)]


DispersionConfig = Annotated[
    NoDispersion | EntropyDispersion | ConstantDispersion, Field(discriminator="type")
]


# ---------------------------------------------------------------- stage 4: link


class DifferenceLink(Settings):
    """Links of h = u_chosen - u_rejected without a knob; `none` is for supervised fine-tuning."""

    two_sided: ClassVar[bool] = False
    type: Literal["sigmoid", "ipo", "hinge", "none"]


class TwoSidedLink(Settings):
    """Links that read u_chosen and u_rejected apart."""

    two_sided: ClassVar[bool] = True
    type: Literal["nca", "bco_pair", "apo_zero", "apo_down", "sppo", "orpo"]


class RobustLink(Settings):
    """rDPO: labels are flipped with a known probability."""

    two_sided: ClassVar[bool] = False
    type: Literal["robust"]
    flip_probability: Annotated[float, Within(0.1, at_least=0, below=0.5)] = 0.1


class RopoLink(Settings):
    """ROPO: a bounded term that learns little from pairs it finds unlikely."""

    two_sided: ClassVar[bool] = False
    type: Literal["ropo"]
    alpha: Annotated[float, Within(14, above=0)] = 14.0


class MallowsPhiLink(Settings):
    """MallowsPO-phi: the exact Mallows pairwise probability, smoothed where |beta * h| < smoothing."""

    two_sided: ClassVar[bool] = False
    type: Literal["mallows_phi"]
    smoothing: Annotated[float, Within(0.5, at_least=1e-3)] = 0.5


class ExoLink(Settings):
    """EXO: reverse Kullback-Leibler divergence to the smoothed label."""

    two_sided: ClassVar[bool] = False
    type: Literal["exo"]
    label_smoothing: Annotated[float, Within(0.001, above=0, below=0.5)] = 0.001


class DiscopopLink(Settings):
    """DiscoPOP: logistic and exponential losses blended by a sigmoid of this temperature."""

    two_sided: ClassVar[bool] = False
    type: Literal["discopop"]
    # Above 1 the exponential part is no longer tamed by the blend and overflows on wrong pairs.
    temperature: Annotated[float, Within(0.05, above=0, at_most=1)] = 0.05


LinkConfig = Annotated[
    DifferenceLink | TwoSidedLink | RobustLink | RopoLink | MallowsPhiLink | ExoLink | DiscopopLink,
    Field(discriminator="type"),
]


# ---------------------------------------------------------------- the whole


class LossConfig(Settings):
    """A preference loss: one setting per stage. Without arguments it is DPO at beta 0.1.

    `margin` is in units of h (nats, or nats per token when length-normalised); `sft_weight` weighs the
    chosen response's negative log-likelihood per token, added to the loss.
    """

    beta: Annotated[float, Within(0.1, above=0)] = 0.1
    length_normalized: bool = False
    margin: Annotated[float, Within(0.0)] = 0.0
    sft_weight: Annotated[float, Within(1.0, at_least=0)] = 0.0
    link: LinkConfig = DifferenceLink(type="sigmoid")
    references: ReferencesConfig = ReferencesConfig()
    soft_label: SoftLabelConfig = SoftLabelConfig()
    dispersion: DispersionConfig = NoDispersion()

    @field_validator("link", "soft_label", "dispersion", mode="before")
    @classmethod
    def _known_type(cls, value: Any, info: ValidationInfo) -> Any:
        field = str(info.field_name)
        types = _types_of(field)
        if isinstance(value, str):
            raise LossError(f"{field} must be a mapping, got {value!r}; write {field}: {{type: {value}}}")
        if isinstance(value, Mapping):
            if "type" not in value:
                raise LossError(
                    f"{field} needs a type; write {field}: {{type: {types[0]}}} or one of {', '.join(types)}"
                )
            if value["type"] not in types:
                raise unknown(f"{field} type", value["type"], types)
        return value

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        refusal = next(_refusals(self), None)
        if refusal is not None:
            raise LossError(refusal)
        return self

    @property
    def reference_free(self) -> bool:
        """Whether h has no reference in it. An entropy dispersion may still need one: `needs_entropy`."""
        return self.references.combine == "none"

    @property
    def needs_entropy(self) -> bool:
        """Whether the primary reference has to be scored with its entropies."""
        return self.dispersion.type == "entropy"

    @property
    def needs_calibration(self) -> bool:
        """Whether `phi_star: auto` is still to be resolved, from a sample of the training set's entropies."""
        return isinstance(self.dispersion, EntropyDispersion) and self.dispersion.phi_star == "auto"

    @property
    def completions_only(self) -> bool:
        """Whether rejected responses play no part (supervised fine-tuning)."""
        return self.link.type == "none"

    @property
    def min_references(self) -> int:
        """The least number of references to give `preference_loss`."""
        if isinstance(self.references.weights, tuple):
            return len(self.references.weights)
        if self.references.trust_region is not None:
            return 2
        return int(not self.reference_free or self.needs_entropy)

    def with_phi_star(self, phi_star: float) -> Self:
        """This loss with `phi_star: auto` replaced by what `dispersion.calibrated_phi_star` found."""
        if not self.needs_calibration:
            raise LossError("phi_star is calibrated only for dispersion: {type: entropy, phi_star: auto}")
        calibrated = EntropyDispersion(phi_star=phi_star)
        return type(self).model_validate({**self.model_dump(), "dispersion": calibrated})


def _types_of(field: str) -> list[str]:
    """The values that `type` may take in a stage of LossConfig."""
    annotation = LossConfig.model_fields[field].annotation
    stages = get_args(annotation) or (annotation,)
    return [name for stage in stages for name in get_args(stage.model_fields["type"].annotation)]


def _refusals(config: LossConfig) -> Iterator[str]:
    """Why the stages do not fit together, each with its remedy."""
    link = config.link
    if link.two_sided and config.margin != 0:
        yield (
            f"margin shifts h, which link {link.type} does not read; set margin: 0 or link: {{type: sigmoid}}"
        )
    if link.type == "mallows_phi" and config.dispersion.type == "none":
        yield (
            "link mallows_phi needs a dispersion; set dispersion: {type: entropy} "
            "or {type: constant, value: 1}, or link: {type: sigmoid}"
        )
    if link.type == "orpo":
        yield from _orpo_refusals(config)
    if link.type == "none":
        yield from _no_link_refusals(config)


def _orpo_refusals(config: LossConfig) -> Iterator[str]:
    if not config.length_normalized:
        yield "link orpo reads the odds of a probability per token; set length_normalized: true"
    if not config.reference_free:
        yield (
            f"link orpo has no reference, but references.combine is {config.references.combine}; "
            "set references: {combine: none}"
        )


def _no_link_refusals(config: LossConfig) -> Iterator[str]:
    if config.sft_weight == 0:
        yield "link none with sft_weight 0 leaves no loss; set sft_weight: 1, or another link"
    if not config.reference_free:
        yield "link none reads no reference; set references: {combine: none}"
    for field in ("soft_label", "dispersion"):
        if getattr(config, field).type != "none":
            yield f"link none compares no responses, so {field} does nothing; set {field}: {{type: none}}"
    if config.margin != 0:
        yield "link none compares no responses, so margin does nothing; set margin: 0"
