"""Float32 copies of models, from which exports are merged."""

import pytest
import torch

from models.adapters import add_lora, merge_adapter
from models.config import LoraSettings
from models.merge import copy_in_float32
from models.probe import compute_probe_logits
from tests.support.architectures import build_tiny

ROWS = torch.randint(5, 150, (2, 16), generator=torch.Generator().manual_seed(0))
# Tied heads, transposed layers, experts in one tensor, states with float32 buffers, several kinds of layers.
NAMES = ["gpt2", "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3", "mamba2", "falcon_h1", "bloom"]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_computes_the_same_and_shares_no_change(name: str) -> None:
    model = build_tiny(name).eval()
    expected = compute_probe_logits(model, ROWS)
    copied = copy_in_float32(model)
    torch.testing.assert_close(compute_probe_logits(copied, ROWS), expected, rtol=0, atol=1e-5)
    half = copy_in_float32(model.to(torch.bfloat16))
    assert {w.dtype for w in half.parameters()} == {torch.float32}
    assert {w.dtype for w in model.parameters()} >= {torch.bfloat16}


@pytest.mark.parametrize("dora", [False, True])
def test_merging_a_copy_leaves_the_model_and_its_adapter(dora: bool) -> None:
    model = add_lora(build_tiny("gpt2"), LoraSettings(r=2, dora=dora)).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    expected = compute_probe_logits(model, ROWS)
    merged = merge_adapter(copy_in_float32(model))
    torch.testing.assert_close(compute_probe_logits(merged, ROWS), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
