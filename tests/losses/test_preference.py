"""Refusals of `preference_loss`, and the dtypes it accepts."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from losses.config import LossError
from losses.dispersion import calibrate_phi_star
from losses.preference import preference_loss
from losses.presets import PRESETS, preset
from losses.scores import PairScores, ReferenceScores
from tests.support.loss_cases import (
    compute_gradients,
    make_policy_scores,
    make_reference_scores,
    require_gradients,
    to_float64,
)

POLICY = make_policy_scores([-30, -60], [-50, -40])
A, B = make_reference_scores([-40, -50], [-45, -55]), make_reference_scores([-41, -70], [-35, -52])
NO_ENTROPY = replace(A, chosen_entropy=None, rejected_entropy=None)


@pytest.mark.parametrize(
    ("name", "stages", "references", "remedy"),
    [
        ("dpo", {}, [], "set references: {combine: none}"),
        ("mrpo", {}, [], "pass ReferenceScores"),
        ("mrpo", {}, [A], "set trust_region: null, or add a reference"),
        ("geometric_references", {"references": {"weights": [1, 2, 3]}}, [A, B], "give one each"),
        (
            "mallows_theta",
            {},
            [NO_ENTROPY],
            "chosen_entropy and rejected_entropy, or set dispersion: {type: none}",
        ),
        ("mallows_simpo", {}, [], "set dispersion: {type: none}"),
        ("mallows_theta", {"dispersion": {"phi_star": "auto"}}, [A], "calibrate_phi_star"),
        ("dpo", {}, [make_reference_scores([-1], [-2])], "score the same"),
    ],
)
def test_missing_scores_are_refused_with_the_remedy(
    name: str, stages: dict[str, Any], references: list[ReferenceScores], remedy: str
) -> None:
    with pytest.raises(LossError) as refusal:
        preference_loss(POLICY, references, config=preset(name, **stages))
    assert remedy in str(refusal.value)


def test_soft_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(LossError, match="give each pair one"):
        preference_loss(POLICY, [A], config=preset("gdpo"), soft_labels=to_float64(0.5))


@pytest.mark.parametrize("shape", [(2, 3), (), (3,)])
def test_scores_per_token_or_of_other_batches_are_refused(shape: tuple[int, ...]) -> None:
    good, bad = torch.zeros(2), torch.zeros(shape)
    with pytest.raises(LossError, match="sum log-probs over the response's tokens first"):
        PairScores(good, bad, good, good)
    with pytest.raises(LossError, match=r"ReferenceScores.rejected_entropy"):
        ReferenceScores(good, good, good, good, good, bad)


@pytest.mark.parametrize("entropies", [[], [0.5, 40.0], [-0.1], [float("nan")]])
def test_calibration_refuses_anything_but_mean_normalised_entropies(entropies: list[float]) -> None:
    with pytest.raises(LossError, match="divide the mean over a response's tokens"):
        calibrate_phi_star(torch.tensor(entropies))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_log_probs_are_widened(name: str, dtype: torch.dtype) -> None:
    narrow = require_gradients(POLICY.to(dtype))
    references = [A.to(dtype), B.to(dtype)]
    out = preference_loss(narrow, references, config=PRESETS[name], soft_labels=torch.tensor([0.9, 0.6]))
    assert out.losses.dtype == out.chosen_rewards.dtype == out.weights.dtype == torch.float32
    wide = require_gradients(narrow.detach().to(torch.float64))
    exact = preference_loss(
        wide,
        [reference.to(torch.float64) for reference in references],
        config=PRESETS[name],
        soft_labels=to_float64(0.9, 0.6),
    )
    torch.testing.assert_close(out.losses.double(), exact.losses, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(compute_gradients(out, narrow), compute_gradients(exact, wide), strict=True):
        assert ours.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=1e-6)


def test_references_may_be_wider_than_the_policy() -> None:
    out = preference_loss(POLICY.to(torch.float32), [A, B], config=preset("mrpo"))
    assert out.losses.dtype == torch.float64


@pytest.mark.parametrize("name", PRESETS)
def test_no_stage_leaves_the_device_or_synchronises_with_it(name: str) -> None:
    # A meta tensor has no values: reading one, or mixing in a tensor of another device, raises.
    policy, *references = (
        replace(scores, **{field: value.to("meta") for field, value in vars(scores).items()})
        for scores in (POLICY, A, B)
    )
    labels = torch.ones(2, device="meta")
    out = preference_loss(policy, references, config=PRESETS[name], soft_labels=labels)
    assert {value.device.type for value in vars(out).values()} == {"meta"}
