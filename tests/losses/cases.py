"""Batches of pairs for the tests of losses: drawn by hypothesis, or written out."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from losses.config import LossConfig
from losses.preference import preference_loss
from losses.presets import PRESETS
from losses.scores import LossOutput, PairScores, ReferenceScores

TWO_SIDED = ("nca", "bco_pair", "apo_zero", "apo_down", "sppo")
OF_DIFFERENCE = (
    {"type": "sigmoid"},
    {"type": "ipo"},
    {"type": "hinge"},
    {"type": "robust", "flip_probability": 0.2},
    {"type": "ropo", "alpha": 14},
    {"type": "exo", "label_smoothing": 0.01},
    {"type": "discopop", "temperature": 0.5},
    {"type": "mallows_phi", "smoothing": 0.5},
)
SEVERAL = ("harmonic", "geometric", "multi_loss")


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def policy_of(chosen: list[float], rejected: list[float], length: int = 10) -> PairScores:
    lengths = torch.full((len(chosen),), length)
    return PairScores(doubles(*chosen), doubles(*rejected), lengths, lengths)


def reference_of(chosen: list[float], rejected: list[float], length: int = 10) -> ReferenceScores:
    lengths = torch.full((len(chosen),), length)
    entropy = torch.full((len(chosen),), 0.3, dtype=torch.float64)
    return ReferenceScores(doubles(*chosen), doubles(*rejected), lengths, lengths, entropy, entropy)


@st.composite
def batches(draw: st.DrawFn, min_references: int = 1) -> tuple[PairScores, list[ReferenceScores], Tensor]:
    """A policy, 1 to 4 references and soft labels for 1 to 3 pairs, in float64.

    Log-probs per token are those of language models: between -8 and -0.01 nats.
    """
    pairs = draw(st.integers(1, 3))

    def numbers(low: float, high: float) -> Tensor:
        return doubles(*draw(st.lists(st.floats(low, high), min_size=pairs, max_size=pairs)))

    def scores() -> dict[str, Tensor]:
        chosen_lengths, rejected_lengths = numbers(1, 60).ceil(), numbers(1, 60).ceil()
        return {
            "chosen": numbers(-8, -0.01) * chosen_lengths,
            "rejected": numbers(-8, -0.01) * rejected_lengths,
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
        }

    references = [
        ReferenceScores(**scores(), chosen_entropy=numbers(0, 1), rejected_entropy=numbers(0, 1))
        for _ in range(draw(st.integers(min_references, 4)))
    ]
    return PairScores(**scores()), references, numbers(0, 1)


@st.composite
def fitting_configs(draw: st.DrawFn) -> LossConfig:
    """Any free composition of stages that is not refused, for two references or more."""
    combine = draw(st.sampled_from(("none", "single", *SEVERAL)))
    references: dict[str, Any] = {"combine": combine}
    if combine in SEVERAL:
        references["weights"] = draw(st.sampled_from(("uniform", "adaptive", "adaptive_per_token")))
        references["trust_region"] = draw(st.sampled_from((None, 0.1)))
        references["trust_region_mode"] = draw(st.sampled_from(("adaptive", "fixed")))
    link = draw(st.sampled_from((*OF_DIFFERENCE, *({"type": name} for name in TWO_SIDED))))
    dispersions: list[dict[str, Any]] = [
        {"type": "entropy", "phi_star": 0.29},
        {"type": "constant", "value": 0.7},
    ]
    if link["type"] != "mallows_phi":
        dispersions.append({"type": "none"})
    return LossConfig.model_validate(
        {
            "beta": draw(st.sampled_from((0.01, 0.1, 1.0))),
            "length_normalized": draw(st.booleans()),
            "margin": 0 if link["type"] in TWO_SIDED else draw(st.sampled_from((0.0, 0.5))),
            "sft_weight": draw(st.sampled_from((0.0, 1.0))),
            "link": link,
            "references": references,
            "soft_label": {"type": draw(st.sampled_from(("none", "geometric", "mixture")))},
            "dispersion": draw(st.sampled_from(dispersions)),
        }
    )


def swapped(scores: Any) -> Any:
    """The same scores with the responses' roles exchanged."""
    turned = replace(
        scores,
        chosen=scores.rejected,
        rejected=scores.chosen,
        chosen_lengths=scores.rejected_lengths,
        rejected_lengths=scores.chosen_lengths,
    )
    if isinstance(scores, ReferenceScores):
        turned = replace(
            turned, chosen_entropy=scores.rejected_entropy, rejected_entropy=scores.chosen_entropy
        )
    return turned


def taken(scores: Any, rows: Tensor) -> Any:
    """The same scores of some of the pairs."""
    return replace(scores, **{name: value[rows] for name, value in vars(scores).items() if value is not None})


def with_gradients(policy: PairScores) -> PairScores:
    return replace(
        policy,
        chosen=policy.chosen.clone().requires_grad_(),
        rejected=policy.rejected.clone().requires_grad_(),
    )


def gradients(out: LossOutput, policy: PairScores) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        out.losses.sum(), (policy.chosen, policy.rejected), allow_unused=True, materialize_grads=True
    )


def losses_of(name: str, policy: PairScores, *references: ReferenceScores, p: Tensor | None = None) -> Tensor:
    return preference_loss(policy, references, config=PRESETS[name], soft_labels=p).losses
