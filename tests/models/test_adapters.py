"""LoRA enabled, disabled and merged."""

import pytest
import torch

from models.adapters import add_lora, describe_reach, disable_adapter, find_adapter, merge_adapter
from models.config import LoraSettings, ModelError
from models.logprobs import Scorer
from models.rows import build_rows
from tests.support import tiny
from tests.support.architectures import build_tiny
from tests.support.plain_logits import GROUPS

ROWS = build_rows(GROUPS, shared=True, pad_id=0)


def build_nonzero_lora(seed: int = 0, **settings: object) -> torch.nn.Module:
    """Build a LoRA policy whose adapter is not zero."""
    model = add_lora(tiny.llama(), LoraSettings(r=2, **settings), seed=seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    return model


def test_lora_starts_as_its_base_and_from_its_seed_alone() -> None:
    base = Scorer(tiny.llama())(ROWS).logps
    state = torch.get_rng_state()
    first = add_lora(tiny.llama(), LoraSettings(r=2), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again = add_lora(tiny.llama(), LoraSettings(r=2), seed=5)
    other = add_lora(tiny.llama(), LoraSettings(r=2), seed=6)
    assert torch.equal(Scorer(first)(ROWS).logps, base)
    weights, same, different = (
        {n: p for n, p in m.named_parameters() if p.requires_grad} for m in (first, again, other)
    )
    assert all("lora_" in name for name in weights)
    assert all(torch.equal(w, same[n]) for n, w in weights.items())
    assert any(not torch.equal(w, different[n]) for n, w in weights.items())


def test_adapter_weights_are_float32_on_a_bfloat16_base() -> None:
    model = add_lora(tiny.llama().to(torch.bfloat16), LoraSettings(r=2))
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize("dora", [False, True])
def test_a_disabled_adapter_gives_the_base_and_everything_is_restored(dora: bool) -> None:
    base = Scorer(tiny.llama())(ROWS).logps
    model = build_nonzero_lora(dora=dora, dropout=0.5).train()
    scorer = Scorer(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with disable_adapter(scorer):
        off = scorer(ROWS).logps
    torch.testing.assert_close(off, base.detach())
    assert not off.requires_grad
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert model.training
    assert model.base_model.model.model.layers[0].self_attn.q_proj.training
    model.eval()
    assert not torch.allclose(scorer(ROWS).logps, base)
    with pytest.raises(RuntimeError, match="inside"), disable_adapter(scorer):
        raise RuntimeError("inside")
    assert not torch.allclose(scorer(ROWS).logps, base)


def test_disabling_the_adapter_between_forward_and_backward_keeps_the_gradient() -> None:
    model = build_nonzero_lora()
    scorer = Scorer(model)
    scorer(ROWS).logps.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss = scorer(ROWS).logps.sum()
    with disable_adapter(model):
        scorer(ROWS)
    loss.backward()
    assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_merge_keeps_the_scores() -> None:
    model = build_nonzero_lora()
    before = Scorer(model)(ROWS).logps
    merged = merge_adapter(model)
    assert find_adapter(merged) is None
    torch.testing.assert_close(Scorer(merged)(ROWS).logps, before, rtol=1e-4, atol=0.0)
    assert merge_adapter(merged) is merged


def test_impossible_adapter_operations_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"target_modules \('nope',\) does not fit llama.*down_proj.*all-linear"
    ):
        add_lora(tiny.llama(), LoraSettings(target_modules=("nope",)))
    with pytest.raises(ModelError, match="already carries an adapter; merge it first"):
        add_lora(build_nonzero_lora(), LoraSettings())
    with (
        pytest.raises(ModelError, match=r"model: policy .* this policy has none; add policy.adapter"),
        disable_adapter(tiny.llama()),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "reached", "left"),
    [
        (
            "llama",
            "adapter on 14 modules (down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj)",
            None,
        ),
        ("gpt_oss", "adapter on 8 modules (k_proj, o_proj, q_proj, v_proj)", "GptOssExperts.gate_up_proj"),
        ("granitemoe", "adapter on 8 modules (k_proj, o_proj, q_proj, v_proj)", "GraniteMoeExperts.gate_up"),
    ],
)
def test_what_all_linear_does_not_reach_is_said(name: str, reached: str, left: str | None) -> None:
    text = describe_reach(add_lora(build_tiny(name), LoraSettings(r=2)))
    assert text.startswith(reached)
    assert (left is None) == ("none on" not in text)
    assert left is None or left in text
