"""Identities that hold for every loss, whatever the numbers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losses.config import LossConfig
from losses.dispersion import calibrate_phi_star
from losses.preference import preference_loss
from losses.presets import PRESETS, preset
from losses.references import (
    clip_to_primary,
    compute_geometric_mean,
    compute_harmonic_mean,
    compute_reference_weights,
)
from losses.scores import PairScores, ReferenceScores
from tests.support.loss_cases import (
    COMBINE_RULES,
    DIFFERENCE_LINKS,
    TWO_SIDED_LINKS,
    batches,
    compute_gradients,
    compute_losses,
    make_policy_scores,
    make_reference_scores,
    require_gradients,
    select_pairs,
    swap_responses,
    to_float64,
    valid_configs,
)

Batch = tuple[PairScores, list[ReferenceScores], Tensor]
quick = settings(max_examples=25, deadline=None)
close = torch.testing.assert_close


def make_config(link: dict[str, Any], **stages: Any) -> LossConfig:
    dispersion = {"type": "constant", "value": 0.7} if link["type"] == "mallows_phi" else {"type": "none"}
    return LossConfig.model_validate({"link": link, "dispersion": dispersion, **stages})


# ---------------------------------------------------------------- references


@pytest.mark.parametrize("combine", COMBINE_RULES)
@pytest.mark.parametrize("weights", ["uniform", "adaptive", "adaptive_per_token", [3.0]])
@quick
@given(batch=batches())
def test_one_reference_is_exactly_dpo(combine: str, weights: Any, batch: Batch) -> None:
    policy, references, p = batch
    config = preset("gdpo", references={"combine": combine, "weights": weights})
    ours = preference_loss(policy, references[:1], config=config, soft_labels=p)
    dpo = preference_loss(policy, references[:1], config=preset("gdpo"), soft_labels=p)
    assert ours.losses.equal(dpo.losses)
    assert ours.chosen_rewards.equal(dpo.chosen_rewards)
    assert ours.weights.equal(torch.ones(len(policy), 1, dtype=torch.float64))


@pytest.mark.parametrize("trust_region", [None, 0.1])
@pytest.mark.parametrize("combine", COMBINE_RULES)
@quick
@given(batch=batches(), count=st.integers(2, 5))
def test_identical_references_are_dpo(
    combine: str, trust_region: float | None, batch: Batch, count: int
) -> None:
    policy, references, _ = batch
    config = preset("mrpo", references={"combine": combine, "trust_region": trust_region})
    ours = preference_loss(policy, references[:1] * count, config=config)
    close(ours.losses, compute_losses("dpo", policy, references[0]), rtol=1e-9, atol=1e-12)


@quick
@given(batch=batches(min_references=2), rule=st.sampled_from(["uniform", "adaptive", "adaptive_per_token"]))
def test_harmonic_lies_between_least_likely_reference_and_geometric(batch: Batch, rule: str) -> None:
    _, references, _ = batch
    weights = compute_reference_weights(references, rule)
    close(weights.sum(dim=1), torch.ones(len(weights), dtype=torch.float64))
    logps = torch.stack([reference.chosen for reference in references], dim=1)
    harmonic = compute_harmonic_mean(logps, weights)
    counted = logps.where(weights > 0, math.inf)
    assert (harmonic >= counted.amin(dim=1, keepdim=True) - 1e-9).all()
    assert (harmonic <= compute_geometric_mean(logps, weights) + 1e-9).all()


@quick
@given(batch=batches(min_references=2))
def test_multi_loss_is_the_weighted_sum_of_losses_with_each_reference(batch: Batch) -> None:
    policy, references, p = batch
    stages = {"soft_label": {"type": "mixture"}, "dispersion": {"type": "constant", "value": 0.6}}
    config = preset("multi_dpo", **stages)
    out = preference_loss(policy, references, config=config, soft_labels=p)
    alone = [
        preference_loss(policy, [reference], config=preset("dpo", **stages), soft_labels=p)
        for reference in references
    ]
    losses = torch.stack([single.losses for single in alone], dim=1)
    rewards = torch.stack([single.rejected_rewards for single in alone], dim=1)
    close(out.losses, (out.weights * losses).sum(dim=1), rtol=1e-12, atol=1e-12)
    close(out.rejected_rewards, (out.weights * rewards).sum(dim=1), rtol=1e-12, atol=1e-12)


def test_weights_by_hand() -> None:
    # Gaps -10 and 30 over 10 tokens and 60: a quarter and three quarters by sums, 1 to 0.5 by tokens.
    short, long = (
        make_reference_scores([-20], [-10], length=10),
        make_reference_scores([-10], [-40], length=60),
    )
    close(compute_reference_weights([short, long], "adaptive"), to_float64(0.25, 0.75)[None])
    close(compute_reference_weights([short, long], "adaptive_per_token"), to_float64(2 / 3, 1 / 3)[None])
    close(compute_reference_weights([short, long], (1.0, 4.0)), to_float64(0.2, 0.8)[None])
    tied = make_reference_scores([-5], [-5])
    close(compute_reference_weights([tied, tied], "adaptive"), to_float64(0.5, 0.5)[None])


def test_trust_region_by_hand() -> None:
    chosen, rejected = to_float64(-100, -150, -20)[None], to_float64(-50, -40, -51)[None]
    fixed = clip_to_primary(chosen, rejected, radius=0.1, mode="fixed")
    close(fixed[0], to_float64(-100, -110, -90)[None])
    close(fixed[1], to_float64(-50, -45, -51)[None])
    # Means -90 and -47: the chosen's radius is 0.1 * 90 / 137.
    adaptive = clip_to_primary(chosen, rejected, radius=0.1, mode="adaptive")
    share = 90 / 137
    close(adaptive[0], to_float64(-100, -100 * (1 + 0.1 * share), -100 * (1 - 0.1 * share))[None])
    close(adaptive[1], to_float64(-50, -50 * (1 - 0.1 * (1 - share)), -51)[None])


def test_trust_region_of_certain_references_is_finite() -> None:
    zero = to_float64(0, 0)[None]
    close(clip_to_primary(zero, zero, radius=0.1, mode="adaptive"), (zero, zero))


def test_a_reference_of_zero_weight_has_no_effect() -> None:
    policy, a, b = (
        make_policy_scores([-3], [-4]),
        make_reference_scores([-5], [-7]),
        make_reference_scores([-90], [-2]),
    )
    for combine in COMBINE_RULES:
        config = preset("dpo", references={"combine": combine, "weights": [1, 0]})
        out = preference_loss(policy, [a, b], config=config)
        close(out.losses, compute_losses("dpo", policy, a))


# ---------------------------------------------------------------- soft labels


@pytest.mark.parametrize("soft_label", ["geometric", "mixture"])
@pytest.mark.parametrize(
    "link", [*DIFFERENCE_LINKS, *({"type": name} for name in TWO_SIDED_LINKS)], ids=lambda x: x["type"]
)
@quick
@given(batch=batches(min_references=2))
def test_swapping_a_pair_and_its_label_changes_nothing(
    link: dict[str, Any], soft_label: str, batch: Batch
) -> None:
    policy, references, p = batch
    config = make_config(link, soft_label={"type": soft_label}, references={"combine": "harmonic"}, beta=0.02)
    swapped = [swap_responses(reference) for reference in references]
    ours = preference_loss(policy, references, config=config, soft_labels=p).losses
    theirs = preference_loss(swap_responses(policy), swapped, config=config, soft_labels=1 - p).losses
    close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("link", DIFFERENCE_LINKS, ids=lambda link: link["type"])
@quick
@given(batch=batches())
def test_an_even_label_has_no_gradient(link: dict[str, Any], batch: Batch) -> None:
    policy, references, p = batch
    policy = require_gradients(policy)
    config = make_config(link, soft_label={"type": "geometric"})
    out = preference_loss(policy, references, config=config, soft_labels=torch.full_like(p, 0.5))
    for gradient in compute_gradients(out, policy):
        assert gradient.eq(0).all()


@quick
@given(batch=batches(min_references=2), config=valid_configs())
def test_label_one_equals_no_label(batch: Batch, config: LossConfig) -> None:
    policy, references, _ = batch
    none = config.model_copy(update={"soft_label": preset("dpo").soft_label})
    plain = preference_loss(policy, references, config=none).losses
    certain = preference_loss(policy, references, config=config, soft_labels=torch.ones_like(policy.chosen))
    absent = preference_loss(policy, references, config=config)
    assert certain.losses.equal(absent.losses)
    close(certain.losses, plain, rtol=0, atol=0)


@quick
@given(batch=batches())
def test_label_zero_equals_the_swapped_pair(batch: Batch) -> None:
    policy, references, p = batch
    swapped = compute_losses("dpo", swap_responses(policy), swap_responses(references[0]))
    for name in ("gdpo", "cdpo"):
        close(compute_losses(name, policy, references[0], p=torch.zeros_like(p)), swapped, rtol=1e-12, atol=0)


def test_gdpo_is_dpo_at_a_smaller_beta_and_cdpo_fits_the_label() -> None:
    policy, reference = (
        make_policy_scores([-30, -60], [-50, -40]),
        make_reference_scores([-40, -50], [-45, -55]),
    )
    p = to_float64(0.8, 0.8)
    softened = preference_loss(policy, [reference], config=preset("dpo", beta=0.1 * 0.6)).losses
    close(compute_losses("gdpo", policy, reference, p=p), softened)

    # The gradient of cDPO is zero where sigma(beta h) = p.
    h = math.log(0.8 / 0.2) / 0.1
    fitted = require_gradients(make_policy_scores([h], [0.0]))
    out = preference_loss(
        fitted, [make_reference_scores([0.0], [0.0])], config=preset("cdpo"), soft_labels=to_float64(0.8)
    )
    close(compute_gradients(out, fitted)[0], to_float64(0.0), rtol=0, atol=1e-16)


# ---------------------------------------------------------------- dispersion


@quick
@given(entropies=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_calibration_makes_the_mean_scale_one(entropies: list[float]) -> None:
    n = len(entropies)
    entropy = to_float64(*entropies)
    lengths = torch.ones(n, dtype=torch.float64)
    reference = ReferenceScores(-lengths, -lengths, lengths, lengths, entropy, entropy)
    config = preset("mallows_theta", dispersion={"phi_star": "auto"})
    config = config.with_phi_star(calibrate_phi_star(entropy))
    out = preference_loss(PairScores(-lengths, -lengths, lengths, lengths), [reference], config=config)
    assert (out.scale > 0).all()
    close(out.scale.mean(), torch.ones((), dtype=torch.float64), rtol=1e-12, atol=0)


@quick
@given(batch=batches(), value=st.floats(0.01, 3))
def test_constant_dispersion_only_rescales_beta_of_the_sigmoid(batch: Batch, value: float) -> None:
    policy, references, _ = batch
    dispersed = preset("dpo", dispersion={"type": "constant", "value": value})
    rescaled = preset("dpo", beta=0.1 * value)
    ours = preference_loss(policy, references, config=dispersed)
    close(ours.losses, preference_loss(policy, references, config=rescaled).losses, rtol=1e-9, atol=1e-12)
    assert ours.scale.eq(value).all()


@quick
@given(batch=batches(min_references=2))
def test_entropy_is_the_primary_references_and_certain_pairs_count_more(batch: Batch) -> None:
    policy, references, _ = batch
    config = preset("mallows_theta", references={"combine": "harmonic"})
    scale = preference_loss(policy, references, config=config).scale
    close(scale, preference_loss(policy, references[:1], config=config).scale, rtol=0, atol=0)
    primary = references[0]
    assert primary.chosen_entropy is not None
    assert primary.rejected_entropy is not None
    order = (primary.chosen_entropy + primary.rejected_entropy).argsort()
    assert (scale[order].diff() <= 0).all()


# ---------------------------------------------------------------- all stages


@quick
@given(batch=batches())
def test_a_policy_equal_to_its_reference_has_loss_log_2(batch: Batch) -> None:
    _, references, p = batch
    first = references[0]
    policy = PairScores(first.chosen, first.rejected, first.chosen_lengths, first.rejected_lengths)
    for name in ("dpo", "gdpo", "cdpo", "mallows_theta", "mallows_phi"):
        losses = compute_losses(name, policy, first, p=p)
        close(losses, torch.full_like(losses, math.log(2)), rtol=1e-15, atol=0)


@quick
@given(batch=batches(min_references=2), config=valid_configs())
def test_a_pair_does_not_depend_on_the_rest_of_the_batch(batch: Batch, config: LossConfig) -> None:
    policy, references, p = batch
    whole = preference_loss(policy, references, config=config, soft_labels=p)
    for index in range(len(policy)):
        row = torch.tensor([index])
        alone = preference_loss(
            select_pairs(policy, row),
            [select_pairs(r, row) for r in references],
            config=config,
            soft_labels=p[row],
        )
        for ours, theirs in zip(vars(whole).values(), vars(alone).values(), strict=True):
            close(ours[row], theirs, rtol=1e-10, atol=1e-12)


@quick
@given(batch=batches(min_references=2), config=valid_configs())
def test_every_composition_is_finite_and_detached_but_for_the_losses(
    batch: Batch, config: LossConfig
) -> None:
    policy, references, p = batch
    policy = require_gradients(policy)
    references = [require_gradients(reference) for reference in references]  # type: ignore[misc]
    out = preference_loss(policy, references, config=config, soft_labels=p)
    for value in (*vars(out).values(), *compute_gradients(out, policy)):
        assert value.isfinite().all()
    assert out.losses.requires_grad
    assert not any(v.requires_grad for name, v in vars(out).items() if name != "losses")
    into_references = torch.autograd.grad(out.losses.sum(), [r.chosen for r in references], allow_unused=True)
    assert all(gradient is None for gradient in into_references)


@quick
@given(batch=batches(), shift=st.floats(-50, 50))
def test_a_constant_added_to_both_responses_cancels(batch: Batch, shift: float) -> None:
    policy, references, _ = batch
    first = references[0]
    moved = ReferenceScores(
        first.chosen + shift, first.rejected + shift, first.chosen_lengths, first.rejected_lengths
    )
    close(compute_losses("dpo", policy, moved), compute_losses("dpo", policy, first), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_gradcheck(name: str) -> None:
    lengths = torch.tensor([12, 7, 30])
    a = make_reference_scores([-22.3, -14.1, -61.0], [-17.9, -20.2, -55.3])
    b = make_reference_scores([-24.1, -13.0, -70.2], [-19.9, -18.7, -52.1])
    p = to_float64(0.9, 0.35, 0.6)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return compute_losses(name, PairScores(chosen, rejected, lengths, lengths), a, b, p=p)

    chosen, rejected = to_float64(-21.2, -15.8, -60.1), to_float64(-19.4, -18.1, -57.7)
    assert torch.autograd.gradcheck(losses, (chosen.requires_grad_(), rejected.requires_grad_()))


@pytest.mark.parametrize("name", PRESETS)
def test_a_batch_may_be_empty(name: str) -> None:
    policy = require_gradients(make_policy_scores([], []))
    out = preference_loss(policy, [make_reference_scores([], [])] * 2, config=PRESETS[name])
    assert out.losses.shape == (0,)
    assert out.weights.shape == (0, 2)
    assert compute_gradients(out, policy)[0].shape == (0,)


def test_implied_rewards_and_logged_weights() -> None:
    policy, a, b = (
        make_policy_scores([-30], [-50]),
        make_reference_scores([-40], [-45]),
        make_reference_scores([-10], [-20]),
    )
    dpo = preference_loss(policy, [a, b], config=preset("dpo"))
    close((dpo.chosen_rewards, dpo.rejected_rewards), (to_float64(1.0), to_float64(-0.5)))
    assert dpo.weights.tolist() == [[1, 0]]
    simpo = preference_loss(policy, [a, b], config=preset("simpo"))
    close((simpo.chosen_rewards, simpo.rejected_rewards), (to_float64(-30.0), to_float64(-50.0)))
    assert simpo.weights.tolist() == [[0, 0]]
    assert preference_loss(policy, [], config=preset("simpo")).weights.shape == (1, 0)
    geometric = preference_loss(policy, [a, b], config=preset("geometric_references"))
    close(geometric.chosen_rewards, to_float64(0.1 * (-30 + 25)))


def test_supervised_loss_is_the_chosen_responses_mean_and_needs_no_rejected() -> None:
    lengths, none = torch.tensor([10, 4]), torch.zeros(2)
    policy = require_gradients(PairScores(to_float64(-30, -2), none.double(), lengths, none.long()))
    out = preference_loss(policy, [], config=preset("sft"))
    close(out.losses.detach(), to_float64(3, 0.5))
    close(compute_gradients(out, policy), (to_float64(-0.1, -0.25), to_float64(0, 0)))
