"""Settings of a loss, one field per stage. Torch-free, so that a run file can be checked anywhere.

A setting that cannot work is refused when the config is created; the message contains the remedy.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from losses.settings import Bounds, FrozenSettings, LossError, make_unknown_name_error

# ---------------------------------------------------------------- stage 1: references

CombineRule = Literal["none", "single", "harmonic", "geometric", "multi_loss"]
WeightRule = Literal["uniform", "adaptive", "adaptive_per_token"]


class ReferenceStageConfig(FrozenSettings):
    """Settings for combining K frozen references into one (losses.references).

    Numeric weights are in the order of the references, the primary first; they need not sum to 1.
    """

    combine: CombineRule = "single"
    """How the references' log-probs become one: none reads no reference, single the primary alone,
    harmonic and geometric a weighted mean, multi_loss takes the weighted mean of the losses against
    each."""
    weights: Annotated[WeightRule | tuple[float, ...], Field(examples=["adaptive"])] = "uniform"
    """A rule, or a number per reference, the primary's first; a run file may give them by name. They need not
    sum to 1."""
    trust_region: Annotated[Annotated[float, Bounds(0.1, above=0, below=1)] | None, Field(examples=[0.1])] = (
        None
    )
    """Clip further references around the primary, by this share; null: do not."""
    trust_region_mode: Literal["adaptive", "fixed"] = "adaptive"
    """fixed: both responses get the whole share; adaptive: it is divided between them by their mean
    log-probs."""

    @field_validator("weights", mode="before")
    @classmethod
    def _check_weights(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in get_args(WeightRule):
                raise make_unknown_name_error("weights", value, get_args(WeightRule))
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
    def _refuse_unused_settings(self) -> Self:
        if self.combine in ("none", "single"):
            if self.trust_region is not None:
                raise LossError(
                    f"trust_region clips further references around the first, but combine {self.combine} "
                    "reads at most one; set trust_region: null, or combine: harmonic"
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


class SoftLabelConfig(FrozenSettings):
    """Settings for the probability p that chosen really beats rejected (losses.soft_labels)."""

    type: Literal["none", "geometric", "mixture"] = "none"
    """none: labels are not used; geometric: multiply h by 2p - 1 (GDPO); mixture: weigh the losses of both
    orders by p and 1 - p (cDPO)."""


# ---------------------------------------------------------------- stage 3: dispersion


class NoDispersion(FrozenSettings):
    """No dispersion: all pairs count equally."""

    type: Literal["none"] = "none"
    """No dispersion: all pairs count equally."""


class EntropyDispersion(FrozenSettings):
    """Neg-log-dispersion from the primary reference's entropy H: phi_star * -log H.

    `auto` means the value that makes the mean scale 1; `LossConfig.with_phi_star` fills it in.
    """

    type: Literal["entropy"] = "entropy"
    """Dispersion from the primary reference's entropy: pairs where people scatter count less."""
    phi_star: Annotated[float | Literal["auto"], Bounds(0.29, at_least=1e-3)] = 0.29
    """Factor of the neg-log-dispersion; auto: the value that makes its mean over the training pairs 1."""

    @field_validator("phi_star", mode="before")
    @classmethod
    def _parse_phi_star(cls, value: Any) -> Any:
        try:
            return value if value == "auto" else float(value)
        except (TypeError, ValueError):
            raise LossError(f"phi_star must be a number or 'auto', got {value!r}; try 0.29") from None


class ConstantDispersion(FrozenSettings):
    """One neg-log-dispersion for all pairs."""

    type: Literal["constant"] = "constant"
    """One dispersion for all pairs."""
    # Below 1e-6 the Mallows distribution is practically uniform, and its loss no longer has a slope.
    value: Annotated[float, Bounds(1.0, at_least=1e-6), Field(examples=[1.0])]
    """The neg-log-dispersion of every pair."""


DispersionConfig = Annotated[
    NoDispersion | EntropyDispersion | ConstantDispersion, Field(discriminator="type")
]


# ---------------------------------------------------------------- stage 4: link


class DifferenceLink(FrozenSettings):
    """Links of h = u_chosen - u_rejected without parameters; `none` is for supervised fine-tuning."""

    two_sided: ClassVar[bool] = False
    type: Literal["sigmoid", "ipo", "hinge", "none"]
    """A link of h without parameters; none is for supervised fine-tuning."""


class TwoSidedLink(FrozenSettings):
    """Links that read u_chosen and u_rejected separately."""

    two_sided: ClassVar[bool] = True
    type: Literal["nca", "bco_pair", "apo_zero", "apo_down", "sppo", "orpo"]
    """A link that reads both responses' log-ratios separately, without parameters."""


class RobustLink(FrozenSettings):
    """rDPO: labels are flipped with a known probability."""

    two_sided: ClassVar[bool] = False
    type: Literal["robust"]
    """rDPO, for labels that are flipped with a known probability."""
    flip_probability: Annotated[float, Bounds(0.1, at_least=0, below=0.5)] = 0.1
    """The probability with which a label is flipped."""


class RopoLink(FrozenSettings):
    """ROPO: includes a bounded term, which learns little from pairs that the policy finds unlikely."""

    two_sided: ClassVar[bool] = False
    type: Literal["ropo"]
    """ROPO, whose bounded term learns little from pairs that the policy finds unlikely."""
    alpha: Annotated[float, Bounds(14, above=0)] = 14.0
    """Weight of the bounded term against the logistic one."""


class MallowsPhiLink(FrozenSettings):
    """MallowsPO-phi: the exact Mallows pairwise probability, smoothed where |beta * h| < smoothing."""

    two_sided: ClassVar[bool] = False
    type: Literal["mallows_phi"]
    """MallowsPO-phi, the exact Mallows probability of a pair; needs a dispersion."""
    smoothing: Annotated[float, Bounds(0.5, at_least=1e-3)] = 0.5
    """The loss is smoothed where |beta * h| is below this."""


class ExoLink(FrozenSettings):
    """EXO: reverse Kullback-Leibler divergence to the smoothed label."""

    two_sided: ClassVar[bool] = False
    type: Literal["exo"]
    """EXO, the reverse Kullback-Leibler divergence to the smoothed label."""
    label_smoothing: Annotated[float, Bounds(0.001, above=0, below=0.5)] = 0.001
    """How far the label is moved from 1 towards one half."""


class DiscopopLink(FrozenSettings):
    """DiscoPOP: logistic and exponential losses, blended by a sigmoid of this temperature."""

    two_sided: ClassVar[bool] = False
    type: Literal["discopop"]
    """DiscoPOP, a blend of the logistic and the exponential loss."""
    # Above 1 the blend no longer bounds the exponential part, which overflows on wrongly ranked pairs.
    temperature: Annotated[float, Bounds(0.05, above=0, at_most=1)] = 0.05
    """Temperature of the sigmoid that blends the two losses."""


class FunctionLink(FrozenSettings):
    """A Python function of the user's own, of h, or with `two_sided` of u_chosen and u_rejected."""

    type: Literal["function"]
    """A link of your own, a Python function."""
    function: Annotated[str, Field(min_length=1, examples=["my_losses:squared_hinge"])]
    """`package.module:function`, elementwise on tensors, with the keyword beta."""
    two_sided: bool = False
    """Whether the function reads both responses' log-ratios instead of their difference h."""


LinkConfig = Annotated[
    DifferenceLink
    | TwoSidedLink
    | RobustLink
    | RopoLink
    | MallowsPhiLink
    | ExoLink
    | DiscopopLink
    | FunctionLink,
    Field(discriminator="type"),
]


# ---------------------------------------------------------------- all stages


class LossConfig(FrozenSettings):
    """A preference loss: one setting per stage. Without arguments it is DPO at beta 0.1."""

    beta: Annotated[float, Bounds(0.1, above=0)] = 0.1
    """Inverse temperature: the larger, the closer the policy stays to its reference."""
    length_normalized: bool = False
    """Divide a response's log-probs by its number of tokens."""
    margin: Annotated[float, Bounds(0.0), Field(examples=[0.3])] = 0.0
    """What is taken off h, in its units: nats, or nats per token when length-normalised. Refused with links
    that read both responses separately."""
    sft_weight: Annotated[float, Bounds(1.0, at_least=0), Field(examples=[0.5])] = 0.0
    """Weight of the chosen response's negative log-likelihood per token, which is added to the loss."""
    link: LinkConfig = DifferenceLink(type="sigmoid")
    """The function that turns h, or both responses' log-ratios, into a loss."""
    references: ReferenceStageConfig = ReferenceStageConfig()
    """How several references are combined into one."""
    soft_label: SoftLabelConfig = SoftLabelConfig()
    """What labels below 1 do."""
    dispersion: DispersionConfig = NoDispersion()
    """What people's disagreement about a pair does."""

    @field_validator("link", "soft_label", "dispersion", mode="before")
    @classmethod
    def _refuse_unknown_type(cls, value: Any, info: ValidationInfo) -> Any:
        field = str(info.field_name)
        types = _list_types(field)
        if isinstance(value, str):
            raise LossError(f"{field} must be a mapping, got {value!r}; write {field}: {{type: {value}}}")
        if isinstance(value, Mapping):
            if "type" not in value:
                raise LossError(
                    f"{field} needs a type; write {field}: {{type: {types[0]}}} or one of {', '.join(types)}"
                )
            if value["type"] not in types:
                raise make_unknown_name_error(f"{field} type", value["type"], types)
        return value

    @model_validator(mode="after")
    def _refuse_conflicting_stages(self) -> Self:
        conflict = next(_find_conflicts(self), None)
        if conflict is not None:
            raise LossError(conflict)
        return self

    @property
    def reference_free(self) -> bool:
        """Whether h contains no reference. An entropy dispersion may still need one: `needs_entropy`."""
        return self.references.combine == "none"

    @property
    def needs_entropy(self) -> bool:
        """Whether the primary reference's entropies are needed as well as its log-probs."""
        return self.dispersion.type == "entropy"

    @property
    def needs_calibration(self) -> bool:
        """Whether `phi_star: auto` must still be resolved from a sample of the training set's entropies."""
        return isinstance(self.dispersion, EntropyDispersion) and self.dispersion.phi_star == "auto"

    @property
    def reads_soft_labels(self) -> bool:
        """Whether labels below 1 change the loss."""
        return self.soft_label.type != "none"

    @property
    def completions_only(self) -> bool:
        """Whether rejected responses are ignored (supervised fine-tuning)."""
        return self.link.type == "none"

    @property
    def min_references(self) -> int:
        """The minimum number of references that `preference_loss` needs."""
        if isinstance(self.references.weights, tuple):
            return len(self.references.weights)
        if self.references.trust_region is not None:
            return 2
        return int(not self.reference_free or self.needs_entropy)

    def with_phi_star(self, phi_star: float) -> Self:
        """Return this loss with `phi_star: auto` replaced by a result of `dispersion.calibrate_phi_star`."""
        if not self.needs_calibration:
            raise LossError("phi_star is calibrated only for dispersion: {type: entropy, phi_star: auto}")
        calibrated = EntropyDispersion(phi_star=phi_star)
        return type(self).model_validate({**self.model_dump(), "dispersion": calibrated})


def _list_types(field: str) -> list[str]:
    """List the values that `type` may take in a stage of LossConfig."""
    annotation = LossConfig.model_fields[field].annotation
    stages = get_args(annotation) or (annotation,)
    return [name for stage in stages for name in get_args(stage.model_fields["type"].annotation)]


def _find_conflicts(config: LossConfig) -> Iterator[str]:
    """Yield each reason why the stages do not fit together, with its remedy."""
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
        yield from _find_orpo_conflicts(config)
    if link.type == "none":
        yield from _find_no_link_conflicts(config)


def _find_orpo_conflicts(config: LossConfig) -> Iterator[str]:
    if not config.length_normalized:
        yield "link orpo reads the odds of a probability per token; set length_normalized: true"
    if not config.reference_free:
        yield (
            f"link orpo has no reference, but references.combine is {config.references.combine}; "
            "set references: {combine: none}"
        )


def _find_no_link_conflicts(config: LossConfig) -> Iterator[str]:
    if config.sft_weight == 0:
        yield "link none with sft_weight 0 leaves no loss; set sft_weight: 1, or another link"
    if not config.reference_free:
        yield "link none reads no reference; set references: {combine: none}"
    for field in ("soft_label", "dispersion"):
        if getattr(config, field).type != "none":
            yield f"link none compares no responses, so {field} does nothing; set {field}: {{type: none}}"
    if config.margin != 0:
        yield "link none compares no responses, so margin does nothing; set margin: 0"
