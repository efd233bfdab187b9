"""Batches of pairs for the tests of losses: drawn by hypothesis, or given as numbers."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from losses.config import LossConfig
from losses.preference import preference_loss
from losses.presets import PRESETS
from losses.scores import LossOutput, PairScores, ReferenceScores

TWO_SIDED_LINKS = ("nca", "bco_pair", "apo_zero", "apo_down", "sppo")
DIFFERENCE_LINKS = (
    {"type": "sigmoid"},
    {"type": "ipo"},
    {"type": "hinge"},
    {"type": "robust", "flip_probability": 0.2},
    {"type": "ropo", "alpha": 14},
    {"type": "exo", "label_smoothing": 0.01},
    {"type": "discopop", "temperature": 0.5},
    {"type": "mallows_phi", "smoothing": 0.5},
)
COMBINE_RULES = ("harmonic", "geometric", "multi_loss")


def to_float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_policy_scores(chosen: list[float], rejected: list[float], length: int = 10) -> PairScores:
    lengths = torch.full((len(chosen),), length)
    return PairScores(to_float64(*chosen), to_float64(*rejected), lengths, lengths)


def make_reference_scores(chosen: list[float], rejected: list[float], length: int = 10) -> ReferenceScores:
    lengths = torch.full((len(chosen),), length)
    entropy = torch.full((len(chosen),), 0.3, dtype=torch.float64)
    return ReferenceScores(to_float64(*chosen), to_float64(*rejected), lengths, lengths, entropy, entropy)


@st.composite
def batches(draw: st.DrawFn, min_references: int = 1) -> tuple[PairScores, list[ReferenceScores], Tensor]:
    """A policy, 1 to 4 references and soft labels for 1 to 3 pairs, in float64.

    Log-probs per token are those of language models: between -8 and -0.01 nats.
    """
    pairs = draw(st.integers(1, 3))

    def numbers(low: float, high: float) -> Tensor:
        return to_float64(*draw(st.lists(st.floats(low, high), min_size=pairs, max_size=pairs)))

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
def valid_configs(draw: st.DrawFn) -> LossConfig:
    """Any valid combination of stages, for two references or more."""
    combine = draw(st.sampled_from(("none", "single", *COMBINE_RULES)))
    references: dict[str, Any] = {"combine": combine}
    if combine in COMBINE_RULES:
        references["weights"] = draw(st.sampled_from(("uniform", "adaptive", "adaptive_per_token")))
        references["trust_region"] = draw(st.sampled_from((None, 0.1)))
        references["trust_region_mode"] = draw(st.sampled_from(("adaptive", "fixed")))
    link = draw(st.sampled_from((*DIFFERENCE_LINKS, *({"type": name} for name in TWO_SIDED_LINKS))))
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
            "margin": 0 if link["type"] in TWO_SIDED_LINKS else draw(st.sampled_from((0.0, 0.5))),
            "sft_weight": draw(st.sampled_from((0.0, 1.0))),
            "link": link,
            "references": references,
            "soft_label": {"type": draw(st.sampled_from(("none", "geometric", "mixture")))},
            "dispersion": draw(st.sampled_from(dispersions)),
        }
    )


def swap_responses(scores: Any) -> Any:
    """Return the same scores with chosen and rejected swapped."""
    swapped = replace(
        scores,
        chosen=scores.rejected,
        rejected=scores.chosen,
        chosen_lengths=scores.rejected_lengths,
        rejected_lengths=scores.chosen_lengths,
    )
    if isinstance(scores, ReferenceScores):
        swapped = replace(
            swapped, chosen_entropy=scores.rejected_entropy, rejected_entropy=scores.chosen_entropy
        )
    return swapped


def select_pairs(scores: Any, rows: Tensor) -> Any:
    """Return the scores of some of the pairs."""
    return replace(scores, **{name: value[rows] for name, value in vars(scores).items() if value is not None})


def require_gradients(policy: PairScores) -> PairScores:
    return replace(
        policy,
        chosen=policy.chosen.clone().requires_grad_(),
        rejected=policy.rejected.clone().requires_grad_(),
    )


def compute_gradients(out: LossOutput, policy: PairScores) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        out.losses.sum(), (policy.chosen, policy.rejected), allow_unused=True, materialize_grads=True
    )


def compute_losses(
    name: str, policy: PairScores, *references: ReferenceScores, p: Tensor | None = None
) -> Tensor:
    return preference_loss(policy, references, config=PRESETS[name], soft_labels=p).losses
