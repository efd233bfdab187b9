"""Log-probs, entropies and gradients of rows against plain logits, one sequence at a time."""

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
    MambaConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
)

from models.adapters import add_lora
from models.config import LoraSettings, ModelError
from models.head import LinearHead, LogitTransform, ModelForwardHead
from models.logprobs import Scorer, get_causal_model, prefix_sharing_unavailable_reason
from models.rows import PromptWithResponses, build_rows
from tests.support import tiny
from tests.support.plain_logits import GROUPS, assert_equal_gradients, gradients, plain_scores, weighted

SMALL: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny.llama,
    "qwen": tiny.qwen,
    "gpt2": tiny.gpt2,
    "llama-eager": lambda: tiny.build(tiny.llama_config(), attention="eager"),
    "gpt2-eager": lambda: tiny.build(tiny.gpt2_config(), attention="eager"),
}


def build_group_rows(shared: bool) -> Any:
    return build_rows(GROUPS, shared=shared, pad_id=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_rows_equal_plain_logits(name: str, shared: bool, dtype: torch.dtype, tolerance: float) -> None:
    model = ARCHITECTURES[name]().to(dtype)
    if "eager" in name:  # its softmax rounds to float32 whatever the model's dtype
        tolerance = max(tolerance, 1e-6)
    scorer = Scorer(model, chunk_tokens=5)
    assert scorer.prefix_sharing_unavailable_reason is None
    scores = scorer(build_group_rows(shared), entropy=True)
    logps, entropies = plain_scores(model, GROUPS)
    torch.testing.assert_close(scores.logps, logps, rtol=tolerance, atol=0.0)
    torch.testing.assert_close(scores.entropy, entropies, rtol=tolerance, atol=0.0)
    assert scores.lengths.tolist() == [len(r) for g in GROUPS for r in g.responses]
    assert scores.logps.dtype == torch.promote_types(dtype, torch.float32)
    assert not scores.entropy.requires_grad
    found, expected = gradients(model, weighted(scores.logps)), gradients(model, weighted(logps))
    # RMSNorm rounds to float32 whatever the model's dtype; GPT-2's layer norm does not.
    assert_equal_gradients(found, expected, tolerance if "gpt2" in name else max(tolerance, 1e-6))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("chunk_tokens", [2, 1000])
def test_only_what_is_not_a_complement_is_scored(shared: bool, chunk_tokens: int) -> None:
    """The turns of an assistant around a tool's answer."""
    model = tiny.llama().double()
    prompt, response = [11, 12, 13], [21, 22, 31, 32, 33, 23, 24]
    scored = [0, 1, 5, 6]
    masked = [token if place in scored else ~token for place, token in enumerate(response)]
    groups = [PromptWithResponses(prompt, [masked, [41, 42]])]
    scores = Scorer(model, chunk_tokens=chunk_tokens)(
        build_rows(groups, shared=shared, pad_id=0), entropy=True
    )
    every = (
        model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    )
    logps = every[range(len(response)), response][scored]
    entropies = -(every.exp() * every).sum(-1)[scored]
    torch.testing.assert_close(scores.logps[0], logps.sum(), rtol=1e-11, atol=0.0)
    torch.testing.assert_close(
        scores.entropy[0], entropies.mean() / math.log(every.shape[-1]), rtol=1e-11, atol=0.0
    )
    assert scores.lengths.tolist() == [4, 2]
    found, expected = gradients(model, scores.logps[0]), gradients(model, logps.sum())
    assert_equal_gradients(found, expected, 1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 26, 1000])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_chunks_do_not_matter(chunk_tokens: int, frozen_head: bool) -> None:
    model = tiny.gpt2(tie_word_embeddings=False).double()
    model.lm_head.weight.requires_grad_(not frozen_head)
    scores = Scorer(model, chunk_tokens=chunk_tokens)(build_group_rows(True), entropy=True)
    logps, entropies = plain_scores(model, GROUPS)
    torch.testing.assert_close(scores.logps, logps, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(scores.entropy, entropies, rtol=1e-12, atol=0.0)
    assert_equal_gradients(gradients(model, weighted(scores.logps)), gradients(model, weighted(logps)), 1e-11)


def build_cohere() -> PreTrainedModel:
    return tiny.build(CohereConfig(**SMALL, logit_scale=0.35))


TAILS: dict[str, tuple[Callable[[], PreTrainedModel], type]] = {
    "softcap": (
        lambda: tiny.build(
            Gemma2Config(
                **SMALL, head_dim=8, final_logit_softcapping=2.0, layer_types=["full_attention"] * 2
            ),
            attention="eager",
        ),
        LinearHead,
    ),
    "scale": (build_cohere, LinearHead),
    "divisor": (lambda: tiny.build(GraniteConfig(**SMALL, logits_scaling=3.0)), LinearHead),
    "bias": (lambda: tiny.build(PhiConfig(**SMALL)), LinearHead),
}


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("frozen_head", [True, False])
def test_logit_transforms_are_exact(name: str, frozen_head: bool) -> None:
    make, head = TAILS[name]
    model = make().double()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    for weight in model.lm_head.parameters():
        weight.requires_grad_(not frozen_head)
    scorer = Scorer(model, chunk_tokens=4)
    assert type(scorer._head) is head
    scores = scorer(build_group_rows(scorer.prefix_sharing_unavailable_reason is None), entropy=True)
    logps, entropies = plain_scores(model, GROUPS)
    torch.testing.assert_close(scores.logps, logps, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(scores.entropy, entropies, rtol=1e-6, atol=0.0)
    assert_equal_gradients(gradients(model, weighted(scores.logps)), gradients(model, weighted(logps)), 1e-6)


class CubicLlama(LlamaForCausalLM):
    """A model with an unknown head: it adds a little of the cubed logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.01 * output.logits**3
        return output


def build_cubic_llama() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CubicLlama(tiny.llama_config()).eval()


def build_lora_on_head() -> PreTrainedModel:
    model = add_lora(tiny.llama(), LoraSettings(r=2, target_modules=("lm_head", "q_proj")))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("make", [build_cubic_llama, build_lora_on_head])
def test_other_heads_run_through_the_models_own_forward(
    make: Callable[[], PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    model = make().double()
    with caplog.at_level(logging.INFO, "models.logprobs"):
        scorer = Scorer(model, chunk_tokens=4)
    assert isinstance(scorer._head, ModelForwardHead)
    assert "the lm head runs through the model's own forward" in caplog.text
    scores = scorer(build_group_rows(True), entropy=True)
    logps, entropies = plain_scores(model, GROUPS)
    torch.testing.assert_close(scores.logps, logps, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(scores.entropy, entropies, rtol=1e-11, atol=0.0)
    assert_equal_gradients(gradients(model, weighted(scores.logps)), gradients(model, weighted(logps)), 1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(
            scorer(build_group_rows(False)).logps, logps.detach(), rtol=1e-11, atol=0.0
        )


class LargestLogits(TorchDispatchMode):
    """Record the most rows of any tensor created in this mode whose last dimension is the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("make", [tiny.llama, build_cubic_llama, build_lora_on_head])
def test_no_tensor_of_tokens_by_vocabulary_ever_exists(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    scorer = Scorer(model, chunk_tokens=40)  # above the width 32, whose weights have V columns too
    some = build_rows(
        [PromptWithResponses(list(range(40)), [list(range(40)), list(range(50))])], shared=True, pad_id=0
    )
    with LargestLogits(tiny.VOCAB) as seen:
        scores = scorer(some, entropy=True)
        scores.logps.sum().backward()
    assert seen.rows == 40  # neither the 90 response tokens at once, nor the 128 tokens of the row
    with LargestLogits(tiny.VOCAB) as seen:
        model(input_ids=some.input_ids)
    assert seen.rows == some.tokens  # the mode does see plain logits


@pytest.mark.parametrize("shared", [True, False])
def test_an_empty_microbatch_gives_zero_gradients_to_every_weight(shared: bool) -> None:
    for model in (tiny.llama(), build_lora_on_head()):
        scores = Scorer(model)(build_rows([], shared=shared, pad_id=0), entropy=True)
        assert scores.logps.shape == scores.entropy.shape == (0,)
        assert all(not g.any() for g in gradients(model, scores.logps.sum()).values())


def test_mode_and_random_state_are_left_alone() -> None:
    model = tiny.gpt2().train()
    model.transformer.h[0].eval()
    state = torch.get_rng_state()
    Scorer(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.transformer.h[1].attn.training
    assert not model.transformer.h[0].attn.training
    assert "forward" not in vars(model.get_decoder())


def test_bfloat16_stays_near_float32() -> None:
    exact = Scorer(tiny.llama())(build_group_rows(True), entropy=True)
    half = Scorer(tiny.llama().to(torch.bfloat16))(build_group_rows(True), entropy=True)
    assert half.logps.dtype == half.entropy.dtype == torch.float32
    per_token = ((half.logps - exact.logps) / exact.lengths).abs().max()
    assert 1e-5 < per_token < 0.1
    torch.testing.assert_close(half.entropy, exact.entropy, rtol=0.0, atol=5e-3)


@pytest.mark.parametrize("frozen_head", [True, False])
def test_logits_of_half_precision_weights_are_not_rounded(frozen_head: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 500).to(torch.bfloat16).requires_grad_(not frozen_head)
    hidden = (30 * torch.randn(40, 64)).to(torch.bfloat16).requires_grad_()
    targets = torch.arange(40)
    head = LinearHead(linear, LogitTransform())
    found, _, _ = head(hidden, targets, chunk_tokens=16, entropy=False)

    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
    exact_hidden = hidden.detach().double().requires_grad_()
    logits = exact_hidden @ weight.T + bias
    expected = logits.log_softmax(-1)[targets, targets]
    rounded = logits.to(torch.bfloat16).double().log_softmax(-1)[targets, targets]
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4 < 0.02 < (rounded - expected).abs().max()

    found.sum().backward()
    expected.sum().backward()
    assert hidden.grad is not None
    assert exact_hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=0.02, atol=0.02)
    assert (linear.weight.grad is None) == frozen_head


@pytest.mark.parametrize("make", [tiny.llama, build_lora_on_head])
def test_activation_checkpointing_changes_nothing(make: Callable[[], PreTrainedModel]) -> None:
    model = make().train()
    plain = gradients(model, weighted(Scorer(model)(build_group_rows(True)).logps))
    get_causal_model(model).activation_checkpointing_enable({"use_reentrant": False})
    assert_equal_gradients(
        gradients(model, weighted(Scorer(model)(build_group_rows(True)).logps)), plain, 1e-6
    )


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "window": (tiny.sliding, "sliding window of 4 tokens"),
    "mixed": (
        lambda: tiny.build(Gemma2Config(**SMALL, head_dim=8, sliding_window=4), attention="eager"),
        "layers of type sliding_attention",
    ),
    "alibi": (
        lambda: tiny.build(
            BloomConfig(vocab_size=120, hidden_size=16, n_layer=2, n_head=2), attention="eager"
        ),
        "ALiBi",
    ),
    "recurrent": (
        lambda: tiny.build(
            MambaConfig(vocab_size=120, hidden_size=16, num_hidden_layers=2, state_size=4), attention="eager"
        ),
        "linear_attention",
    ),
    "longrope": (
        lambda: tiny.build(
            Phi3Config(
                **SMALL,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 16,
                },
                max_position_embeddings=64,
            )
        ),
        "longrope",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sharing_is_refused_where_it_is_not_exact(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = REFUSED[name]
    model = make()
    with caplog.at_level(logging.INFO, "models.logprobs"):
        assert reason in str(prefix_sharing_unavailable_reason(model))
        scorer = Scorer(model)
    assert caplog.text.count("prompts are not shared") == 1
    with pytest.raises(ModelError, match="prefix sharing is not exact"):
        scorer(build_group_rows(True))
    # Plain rows are still exact, padding included.
    torch.testing.assert_close(
        scorer(build_group_rows(False)).logps, plain_scores(model, GROUPS)[0], rtol=1e-4, atol=0.0
    )


def test_the_probe_finds_what_the_config_does_not_say() -> None:
    model = tiny.llama()
    decoder = model.get_decoder()
    own = decoder.forward
    # A decoder that numbers positions by column and ignores given positions, as some do.
    decoder.forward = lambda *a, position_ids=None, **k: own(*a, **k)
    assert "other log-probs with a shared prompt" in str(prefix_sharing_unavailable_reason(model))


def test_the_probe_finds_a_leak_in_bfloat16() -> None:
    model = tiny.llama().to(torch.bfloat16)
    decoder = model.get_decoder()
    own = decoder.forward
    decoder.forward = lambda *a, attention_mask=None, **k: own(*a, **k)
    assert prefix_sharing_unavailable_reason(model) is not None
    assert prefix_sharing_unavailable_reason(tiny.llama().to(torch.bfloat16)) is None


def test_a_disabled_window_allows_sharing() -> None:
    assert prefix_sharing_unavailable_reason(tiny.qwen(sliding_window=4, use_sliding_window=False)) is None


def test_logits_that_do_not_follow_from_the_decoder_are_refused() -> None:
    class Flipped(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            return super().forward(input_ids=input_ids.flip(-1), **kwargs)

    with pytest.raises(ModelError, match="differ from its logits"):
        Scorer(Flipped(tiny.llama_config()).eval())


def test_settings_are_checked() -> None:
    with pytest.raises(ModelError, match="chunk_tokens must be at least 1, got 0; try"):
        Scorer(tiny.llama(), chunk_tokens=0)


def test_flex_attention_is_refused_on_a_cpu() -> None:
    model = tiny.llama()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(
        ModelError, match="attention: flex has no backward pass on a CPU; set attention: sdpa"
    ):
        Scorer(model)


def test_flops_by_hand() -> None:
    some = build_rows([PromptWithResponses([1, 2, 3], [[4, 5], [6, 7, 8]])], shared=True, pad_id=0)
    # Per layer: q and o 32 x 32, k and v 32 x 16, three of 32 x 64 = 9,216 weights; the head 32 x 261.
    # Prompt 3, responses of 1 and 2 inputs: attended 6 + (3 + 1) + (3 + 1 + 3 + 2); 2 layers of 4 heads of 8.
    expected = 2 * (2 * 9216 * 6 + 32 * 261 * 5) + 4 * 64 * (6 + 4 + 9)
    assert Scorer(tiny.llama()).estimate_forward_flops(some) == expected
    assert Scorer(tiny.gpt2()).estimate_forward_flops(some) == 2 * (24576 * 6 + 32 * 261 * 5) + 4 * 64 * 19
    assert SimpleNamespace(attended=some.attended_pairs) == SimpleNamespace(attended=19)
