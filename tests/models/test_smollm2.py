"""Shared prompts and chunks are exact for a real language model too, end-of-turn tokens included."""

from functools import cache
from typing import Any

import pytest
import torch

from models.config import LoraSettings, ModelConfig, PolicyConfig
from models.load import load_model, load_tokenizer, locate_model
from models.logprobs import Scorer
from models.rows import PromptWithResponses, build_rows
from tests.support.plain_logits import assert_equal_gradients, gradients, plain_scores, weighted

pytestmark = pytest.mark.smollm2

TEXTS = [
    (
        "The film opens on a quiet street, and",
        [" then everything goes wrong.", " nothing else happens, ever."],
    ),
    ("I had hoped for more:", [" the plot is thin, the acting thinner.", " it was wonderful!"]),
]


@cache
def find_model_folder() -> str:
    from orchestrator.demo.assets import fetch_smollm2

    return str(fetch_smollm2())


@cache
def tokenize_groups() -> list[PromptWithResponses]:
    config = ModelConfig(model=find_model_folder())
    tokenizer: Any = load_tokenizer(locate_model(config), config)
    # The pad token is the end-of-turn token: responses end in it and must be scored to the last token.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    return [
        PromptWithResponses(
            tokenizer(p)["input_ids"],
            [[*tokenizer(r)["input_ids"], tokenizer.eos_token_id] for r in responses],
        )
        for p, responses in TEXTS
    ]


@pytest.mark.parametrize("shared", [True, False])
def test_rows_equal_plain_logits(shared: bool) -> None:
    config = PolicyConfig(
        model=find_model_folder(), adapter=LoraSettings(r=4, target_modules=("q_proj", "v_proj"))
    )
    model = load_model(locate_model(config), config, device="cpu", trainable=True)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    scorer = Scorer(model, chunk_tokens=8)
    assert scorer.prefix_sharing_unavailable_reason is None
    pad = 2
    scores = scorer(build_rows(tokenize_groups(), shared=shared, pad_id=pad), entropy=True)
    logps, entropies = plain_scores(model, tokenize_groups())
    torch.testing.assert_close(scores.logps, logps, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(scores.entropy, entropies, rtol=1e-4, atol=0.0)
    assert -8.0 < (scores.logps / scores.lengths).mean() < -1.0  # it is a language model
    assert_equal_gradients(gradients(model, weighted(scores.logps)), gradients(model, weighted(logps)), 1e-4)
