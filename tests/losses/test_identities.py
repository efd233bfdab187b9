"""What must hold of every loss, whatever the numbers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losses.config import LossConfig
from losses.dispersion import calibrated_phi_star
from losses.preference import preference_loss
from losses.presets import PRESETS, preset
from losses.references import clip_to_primary, geometric_mean, harmonic_mean, reference_weights
from losses.scores import PairScores, ReferenceScores
from tests.losses.cases import (
    OF_DIFFERENCE,
    SEVERAL,
    TWO_SIDED,
    batches,
    doubles,
    fitting_configs,
    gradients,
    losses_of,
    policy_of,
    reference_of,
    swapped,
    taken,
    with_gradients,
)

Batch = tuple[PairScores, list[ReferenceScores], Tensor]
quick = settings(max_examples=25, deadline=None)
close = torch.testing.assert_close


def config_with(link: dict[str, Any], **stages: Any) -> LossConfig:
    dispersion = {"type": "constant", "value": 0.7} if link["type"] == "mallows_phi" else {"type": "none"}
    return LossConfig.model_validate({"link": link, "dispersion": dispersion, **stages})


# ---------------------------------------------------------------- references


@pytest.mark.parametrize("combine", SEVERAL)
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
@pytest.mark.parametrize("combine", SEVERAL)
@quick
@given(batch=batches(), count=st.integers(2, 5))
def test_identical_references_are_dpo(
    combine: str, trust_region: float | None, batch: Batch, count: int
) -> None:
    policy, references, _ = batch
    config = preset("mrpo", references={"combine": combine, "trust_region": trust_region})
    ours = preference_loss(policy, references[:1] * count, config=config)
    close(ours.losses, losses_of("dpo", policy, references[0]), rtol=1e-9, atol=1e-12)


@quick
@given(batch=batches(min_references=2), rule=st.sampled_from(["uniform", "adaptive", "adaptive_per_token"]))
def test_harmonic_lies_between_least_likely_reference_and_geometric(batch: Batch, rule: str) -> None:
    _, references, _ = batch
    weights = reference_weights(references, rule)
    close(weights.sum(dim=1), torch.ones(len(weights), dtype=torch.float64))
    logps = torch.stack([reference.chosen for reference in references], dim=1)
    harmonic = harmonic_mean(logps, weights)
    counted = logps.where(weights > 0, math.inf)
    assert (harmonic >= counted.amin(dim=1, keepdim=True) - 1e-9).all()
    assert (harmonic <= geometric_mean(logps, weights) + 1e-9).all()


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
    short, long = reference_of([-20], [-10], length=10), reference_of([-10], [-40], length=60)
    close(reference_weights([short, long], "adaptive"), doubles(0.25, 0.75)[None])
    close(reference_weights([short, long], "adaptive_per_token"), doubles(2 / 3, 1 / 3)[None])
    close(reference_weights([short, long], (1.0, 4.0)), doubles(0.2, 0.8)[None])
    tied = reference_of([-5], [-5])
    close(reference_weights([tied, tied], "adaptive"), doubles(0.5, 0.5)[None])


def test_trust_region_by_hand() -> None:
    chosen, rejected = doubles(-100, -150, -20)[None], doubles(-50, -40, -51)[None]
    fixed = clip_to_primary(chosen, rejected, radius=0.1, mode="fixed")
    close(fixed[0], doubles(-100, -110, -90)[None])
    close(fixed[1], doubles(-50, -45, -51)[None])
    # Means -90 and -47: the chosen's radius is 0.1 * 90 / 137.
    adaptive = clip_to_primary(chosen, rejected, radius=0.1, mode="adaptive")
    share = 90 / 137
    close(adaptive[0], doubles(-100, -100 * (1 + 0.1 * share), -100 * (1 - 0.1 * share))[None])
    close(adaptive[1], doubles(-50, -50 * (1 - 0.1 * (1 - share)), -51)[None])


def test_trust_region_of_certain_references_is_finite() -> None:
    zero = doubles(0, 0)[None]
    close(clip_to_primary(zero, zero, radius=0.1, mode="adaptive"), (zero, zero))


def test_a_reference_of_no_weight_does_not_count() -> None:
    policy, a, b = policy_of([-3], [-4]), reference_of([-5], [-7]), reference_of([-90], [-2])
    for combine in SEVERAL:
        config = preset("dpo", references={"combine": combine, "weights": [1, 0]})
        out = preference_loss(policy, [a, b], config=config)
        close(out.losses, losses_of("dpo", policy, a))


# ---------------------------------------------------------------- soft labels


@pytest.mark.parametrize("soft_label", ["geometric", "mixture"])
@pytest.mark.parametrize(
    "link", [*OF_DIFFERENCE, *({"type": name} for name in TWO_SIDED)], ids=lambda x: x["type"]
)
@quick
@given(batch=batches(min_references=2))
def test_turning_a_pair_round_turns_its_label_round(
    link: dict[str, Any], soft_label: str, batch: Batch
) -> None:
    policy, references, p = batch
    config = config_with(link, soft_label={"type": soft_label}, references={"combine": "harmonic"}, beta=0.02)
    turned = [swapped(reference) for reference in references]
    ours = preference_loss(policy, references, config=config, soft_labels=p).losses
    theirs = preference_loss(swapped(policy), turned, config=config, soft_labels=1 - p).losses
    close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("link", OF_DIFFERENCE, ids=lambda link: link["type"])
@quick
@given(batch=batches())
def test_an_even_label_has_no_gradient(link: dict[str, Any], batch: Batch) -> None:
    policy, references, p = batch
    policy = with_gradients(policy)
    config = config_with(link, soft_label={"type": "geometric"})
    out = preference_loss(policy, references, config=config, soft_labels=torch.full_like(p, 0.5))
    for gradient in gradients(out, policy):
        assert gradient.eq(0).all()


@quick
@given(batch=batches(min_references=2), config=fitting_configs())
def test_a_certain_label_is_no_label(batch: Batch, config: LossConfig) -> None:
    policy, references, _ = batch
    none = config.model_copy(update={"soft_label": preset("dpo").soft_label})
    plain = preference_loss(policy, references, config=none).losses
    certain = preference_loss(policy, references, config=config, soft_labels=torch.ones_like(policy.chosen))
    absent = preference_loss(policy, references, config=config)
    assert certain.losses.equal(absent.losses)
    close(certain.losses, plain, rtol=0, atol=0)


@quick
@given(batch=batches())
def test_a_certainly_wrong_label_is_the_pair_swapped(batch: Batch) -> None:
    policy, references, p = batch
    turned = losses_of("dpo", swapped(policy), swapped(references[0]))
    for name in ("gdpo", "cdpo"):
        close(losses_of(name, policy, references[0], p=torch.zeros_like(p)), turned, rtol=1e-12, atol=0)


def test_gdpo_is_dpo_at_a_smaller_beta_and_cdpo_fits_the_label() -> None:
    policy, reference = policy_of([-30, -60], [-50, -40]), reference_of([-40, -50], [-45, -55])
    p = doubles(0.8, 0.8)
    softened = preference_loss(policy, [reference], config=preset("dpo", beta=0.1 * 0.6)).losses
    close(losses_of("gdpo", policy, reference, p=p), softened)

    # cDPO is at rest where sigma(beta h) = p.
    h = math.log(0.8 / 0.2) / 0.1
    fitted = with_gradients(policy_of([h], [0.0]))
    out = preference_loss(
        fitted, [reference_of([0.0], [0.0])], config=preset("cdpo"), soft_labels=doubles(0.8)
    )
    close(gradients(out, fitted)[0], doubles(0.0), rtol=0, atol=1e-16)


# ---------------------------------------------------------------- dispersion


@quick
@given(entropies=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_calibration_makes_the_mean_scale_one(entropies: list[float]) -> None:
    n = len(entropies)
    entropy = doubles(*entropies)
    lengths = torch.ones(n, dtype=torch.float64)
    reference = ReferenceScores(-lengths, -lengths, lengths, lengths, entropy, entropy)
    config = preset("mallows_theta", dispersion={"phi_star": "auto"})
    config = config.with_phi_star(calibrated_phi_star(entropy))
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


# ---------------------------------------------------------------- the whole


@quick
@given(batch=batches())
def test_a_policy_equal_to_its_reference_has_loss_log_2(batch: Batch) -> None:
    _, references, p = batch
    first = references[0]
    policy = PairScores(first.chosen, first.rejected, first.chosen_lengths, first.rejected_lengths)
    for name in ("dpo", "gdpo", "cdpo", "mallows_theta", "mallows_phi"):
        losses = losses_of(name, policy, first, p=p)
        close(losses, torch.full_like(losses, math.log(2)), rtol=1e-15, atol=0)


@quick
@given(batch=batches(min_references=2), config=fitting_configs())
def test_a_pair_does_not_see_its_neighbours(batch: Batch, config: LossConfig) -> None:
    policy, references, p = batch
    whole = preference_loss(policy, references, config=config, soft_labels=p)
    for index in range(len(policy)):
        row = torch.tensor([index])
        alone = preference_loss(
            taken(policy, row), [taken(r, row) for r in references], config=config, soft_labels=p[row]
        )
        for ours, theirs in zip(vars(whole).values(), vars(alone).values(), strict=True):
            close(ours[row], theirs, rtol=1e-10, atol=1e-12)


@quick
@given(batch=batches(min_references=2), config=fitting_configs())
def test_every_composition_is_finite_and_detached_but_for_the_losses(
    batch: Batch, config: LossConfig
) -> None:
    policy, references, p = batch
    policy = with_gradients(policy)
    references = [with_gradients(reference) for reference in references]  # type: ignore[misc]
    out = preference_loss(policy, references, config=config, soft_labels=p)
    for value in (*vars(out).values(), *gradients(out, policy)):
        assert value.isfinite().all()
    assert out.losses.requires_grad
    assert not any(v.requires_grad for name, v in vars(out).items() if name != "losses")
    into_references = torch.autograd.grad(out.losses.sum(), [r.chosen for r in references], allow_unused=True)
    assert all(gradient is None for gradient in into_references)


@quick
@given(batch=batches(), shift=st.floats(-50, 50))
def test_what_a_prompt_adds_to_both_responses_cancels(batch: Batch, shift: float) -> None:
    policy, references, _ = batch
    first = references[0]
    moved = ReferenceScores(
        first.chosen + shift, first.rejected + shift, first.chosen_lengths, first.rejected_lengths
    )
    close(losses_of("dpo", policy, moved), losses_of("dpo", policy, first), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_gradcheck(name: str) -> None:
    lengths = torch.tensor([12, 7, 30])
    a = reference_of([-22.3, -14.1, -61.0], [-17.9, -20.2, -55.3])
    b = reference_of([-24.1, -13.0, -70.2], [-19.9, -18.7, -52.1])
    p = doubles(0.9, 0.35, 0.6)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses_of(name, PairScores(chosen, rejected, lengths, lengths), a, b, p=p)

    chosen, rejected = doubles(-21.2, -15.8, -60.1), doubles(-19.4, -18.1, -57.7)
    assert torch.autograd.gradcheck(losses, (chosen.requires_grad_(), rejected.requires_grad_()))


@pytest.mark.parametrize("name", PRESETS)
def test_a_batch_may_be_empty(name: str) -> None:
    policy = with_gradients(policy_of([], []))
    out = preference_loss(policy, [reference_of([], [])] * 2, config=PRESETS[name])
    assert out.losses.shape == (0,)
    assert out.weights.shape == (0, 2)
    assert gradients(out, policy)[0].shape == (0,)


def test_implied_rewards_and_weights_for_the_record() -> None:
    policy, a, b = policy_of([-30], [-50]), reference_of([-40], [-45]), reference_of([-10], [-20])
    dpo = preference_loss(policy, [a, b], config=preset("dpo"))
    close((dpo.chosen_rewards, dpo.rejected_rewards), (doubles(1.0), doubles(-0.5)))
    assert dpo.weights.tolist() == [[1, 0]]
    simpo = preference_loss(policy, [a, b], config=preset("simpo"))
    close((simpo.chosen_rewards, simpo.rejected_rewards), (doubles(-30.0), doubles(-50.0)))
    assert simpo.weights.tolist() == [[0, 0]]
    assert preference_loss(policy, [], config=preset("simpo")).weights.shape == (1, 0)
    geometric = preference_loss(policy, [a, b], config=preset("geometric_references"))
    close(geometric.chosen_rewards, doubles(0.1 * (-30 + 25)))


def test_supervised_loss_is_the_chosen_responses_mean_and_needs_no_rejected() -> None:
    lengths, none = torch.tensor([10, 4]), torch.zeros(2)
    policy = with_gradients(PairScores(doubles(-30, -2), none.double(), lengths, none.long()))
    out = preference_loss(policy, [], config=preset("sft"))
    close(out.losses.detach(), doubles(3, 0.5))
    close(gradients(out, policy), (doubles(-0.1, -0.25), doubles(0, 0)))
