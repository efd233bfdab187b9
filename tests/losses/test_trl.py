"""Losses that TRL also has, computed by TRL's own code from the same log-probs."""

import os
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from losses.preference import preference_loss
from losses.presets import preset
from losses.scores import PairScores, ReferenceScores

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of packages that TRL imports
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer

LENGTHS = torch.tensor([[32, 59, 39, 5, 1], [32, 36, 58, 9, 2]])
POLICY = torch.tensor([[-92.5, -110.6, -89.8, -3.2, -0.1], [-66.2, -113.8, -137.3, -20.5, -4.0]])
REFERENCE = torch.tensor([[-88.3, -112.2, -84.3, -8.4, -0.7], [-58.8, -109.6, -143.4, -25.0, -2.5]])


def compute_trl_dpo_loss(
    pair: int, loss_types: list[str], loss_weights: list[float], **settings: Any
) -> float:
    """Compute DPOTrainer's loss of one pair; a fake model spreads the log-prob over the tokens."""
    policy, reference, lengths = POLICY[:, pair], REFERENCE[:, pair], LENGTHS[:, pair]
    mask = torch.zeros(2, int(lengths.max()) + 1, dtype=torch.long)
    for row, length in enumerate(lengths.tolist()):
        mask[row, 1 : length + 1] = 1
    per_token = (policy / lengths)[:, None] * mask[:, 1:]
    outputs = SimpleNamespace(
        log_probs=per_token,
        entropy=torch.zeros_like(per_token),
        mean_logits=torch.zeros_like(per_token),
        is_top1=torch.zeros_like(per_token, dtype=torch.bool),
    )
    gather = {"gather": lambda x: x, "gather_for_metrics": lambda x: x}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), **gather),
        args=SimpleNamespace(discopop_tau=0.05),
        loss_types=loss_types,
        loss_weights=loss_weights,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{"beta": 0.1, "label_smoothing": 0.0, **settings},
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:1],
        "ref_rejected_logps": reference[1:],
    }
    model = lambda **_: outputs  # noqa: E731
    return float(DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False))


def compute_our_losses(name: str, **stages: Any) -> Tensor:
    policy = PairScores(*POLICY.double(), *LENGTHS)
    reference = ReferenceScores(*REFERENCE.double(), *LENGTHS)
    return preference_loss(policy, [reference], config=preset(name, **stages)).losses


@pytest.mark.parametrize(
    ("name", "stages", "loss_types", "loss_weights", "settings"),
    [
        ("dpo", {}, ["sigmoid"], [1], {}),
        ("dpo", {"beta": 0.5, "length_normalized": True}, ["sigmoid_norm"], [1], {"beta": 0.5}),
        ("hinge", {}, ["hinge"], [1], {}),
        ("exo", {}, ["exo_pair"], [1], {"label_smoothing": 0.001}),
        ("nca", {}, ["nca_pair"], [1], {}),
        ("robust_dpo", {}, ["robust"], [1], {"label_smoothing": 0.1}),
        ("bco_pair", {}, ["bco_pair"], [1], {}),
        ("sppo", {}, ["sppo_hard"], [1], {}),
        ("apo_zero", {}, ["apo_zero"], [1], {}),
        ("apo_down", {}, ["apo_down"], [1], {}),
        ("discopop", {}, ["discopop"], [1], {}),
        ("sft", {}, ["sft"], [1], {}),
        ("rpo", {}, ["sigmoid", "sft"], [1, 0.5], {}),
    ],
)
def test_dpo_trainer(
    name: str,
    stages: dict[str, Any],
    loss_types: list[str],
    loss_weights: list[float],
    settings: dict[str, Any],
) -> None:
    theirs = [
        compute_trl_dpo_loss(pair, loss_types, loss_weights, **settings) for pair in range(POLICY.shape[1])
    ]
    torch.testing.assert_close(
        compute_our_losses(name, **stages), torch.tensor(theirs).double(), rtol=2e-5, atol=2e-6
    )


def test_dpo_trainers_ipo_is_ours_length_normalised() -> None:
    theirs = [compute_trl_dpo_loss(pair, ["ipo"], [1]) for pair in range(POLICY.shape[1])]
    ours = compute_our_losses("ipo_length_normalized")
    torch.testing.assert_close(ours, torch.tensor(theirs).double(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("loss_type", "stages", "settings"),
    [
        ("sigmoid", {}, {}),
        ("sigmoid", {"soft_label": {"type": "mixture"}}, {"label_smoothing": 0.2}),
        ("hinge", {"link": {"type": "hinge"}}, {}),
        ("ipo", {"link": {"type": "ipo"}, "length_normalized": True}, {}),
        (
            "simpo",
            {"length_normalized": True, "beta": 2.0, "margin": 0.25},
            {"beta": 2.0, "simpo_gamma": 0.5},
        ),
    ],
)
def test_cpo_trainer(loss_type: str, stages: dict[str, Any], settings: dict[str, Any]) -> None:
    average = stages.get("length_normalized", False)
    logps = POLICY / LENGTHS if average else POLICY
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type=loss_type,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        **{"beta": 0.1, "label_smoothing": 0.0, **settings},
    )
    theirs, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, *logps)
    config = preset("cpo", sft_weight=0, **stages)
    p = torch.full((POLICY.shape[1],), 1 - trainer.label_smoothing)
    ours = preference_loss(PairScores(*POLICY, *LENGTHS), [], config=config, soft_labels=p)
    torch.testing.assert_close(ours.losses, theirs)
    torch.testing.assert_close(ours.chosen_rewards, chosen_rewards)
    torch.testing.assert_close(ours.rejected_rewards, rejected_rewards)


def test_orpo_trainer() -> None:
    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device=torch.device("cpu")))
    minus_losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, *(POLICY / LENGTHS))
    torch.testing.assert_close(
        compute_our_losses("orpo", sft_weight=0), -minus_losses.double(), rtol=1e-5, atol=1e-7
    )
