"""Losses and gradients of the cases in goldens.json, computed independently in 50-digit arithmetic."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from losses.config import LossConfig
from losses.preference import preference_loss
from losses.presets import PRESETS
from losses.scores import PairScores, ReferenceScores

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("goldens.json").read_text())


def to_float64(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def build_inputs(case: dict[str, Any]) -> tuple[PairScores, list[ReferenceScores], torch.Tensor]:
    given = case["inputs"]
    policy = PairScores(
        to_float64(given["policy_chosen"]).requires_grad_(),
        to_float64(given["policy_rejected"]).requires_grad_(),
        torch.tensor(given["policy_chosen_lengths"]),
        torch.tensor(given["policy_rejected_lengths"]),
    )
    references = [
        ReferenceScores(
            chosen=to_float64(given["reference_chosen"][k]),
            rejected=to_float64(given["reference_rejected"][k]),
            chosen_lengths=torch.tensor(given["reference_chosen_lengths"][k]),
            rejected_lengths=torch.tensor(given["reference_rejected_lengths"][k]),
            chosen_entropy=to_float64(given["reference_chosen_entropy"][k]),
            rejected_entropy=to_float64(given["reference_rejected_entropy"][k]),
        )
        for k in range(len(given["reference_chosen"]))
    ]
    return policy, references, to_float64(given["soft_labels"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_losses_and_gradients_agree_with_50_digit_arithmetic(case: dict[str, Any]) -> None:
    policy, references, soft_labels = build_inputs(case)
    config = LossConfig.model_validate(case["config"])
    out = preference_loss(policy, references, config=config, soft_labels=soft_labels)
    gradients = torch.autograd.grad(
        out.losses.sum(), (policy.chosen, policy.rejected), allow_unused=True, materialize_grads=True
    )
    for ours, theirs in zip(
        (out.losses, *gradients),
        (case["losses"], case["grad_policy_chosen"], case["grad_policy_rejected"]),
        strict=True,
    ):
        torch.testing.assert_close(ours.detach(), to_float64(theirs), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", [c for c in CASES if c["name"] in PRESETS], ids=lambda case: case["name"])
def test_presets_are_the_configs_of_the_same_name(case: dict[str, Any]) -> None:
    config = LossConfig.model_validate(case["config"])
    if case["name"] == "geometric_references":  # how many weights depends on the references at hand
        references = config.references.model_copy(update={"weights": "uniform"})
        config = config.model_copy(update={"references": references})
    assert PRESETS[case["name"]] == config
    assert config.model_dump(mode="json").keys() == case["config"].keys()


def test_a_config_survives_json() -> None:
    for case in CASES:
        config = LossConfig.model_validate(case["config"])
        assert config.model_dump(mode="json") == case["config"]
        assert LossConfig.model_validate_json(config.model_dump_json()) == config
