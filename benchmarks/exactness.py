"""How far log-probs of SmolLM2-135M move: between policy and reference, layouts, and companies of a batch.

    python benchmarks/exactness.py

Prints one row for each dtype: the largest |h| of an untrained policy against itself as its reference in the
same layout of rows (nats per pair), and the largest differences of a response's log-prob (nats per token)
between shared and plain rows, and between alone and in company. Takes two minutes on two cores, and 3 GB.
"""

import torch

from models.config import ModelConfig, PolicyConfig
from models.load import load_model, load_tokenizer, locate_model
from models.logprobs import Scorer
from models.parallel import prepare_parallel
from models.rows import PromptWithResponses, build_rows
from orchestrator.demo.assets import fetch_smollm2

PROMPTS = (
    "The film opens on a quiet street, and",
    "I had hoped for more:",
    "Ask anyone in this town about the old cinema, and they will tell you the same story:",
)
RESPONSES = (
    (" then everything goes wrong.", " nothing else happens, ever, to anyone at all."),
    (" the plot is thin, the acting thinner.", " it was wonderful!"),
    (" it burned.", " every Friday the owner played one film for himself alone, until the projector died."),
)


@torch.no_grad()
def score(scorer: torch.nn.Module, groups: list[PromptWithResponses], *, shared: bool) -> torch.Tensor:
    """Return the log-prob of every response, summed over its tokens."""
    logps: torch.Tensor = scorer(build_rows(groups, shared=shared, pad_id=0)).logps
    return logps


def measure(dtype: str) -> tuple[float, float, float]:
    """Return the largest |h|, and the largest differences between layouts and between companies."""
    folder = str(fetch_smollm2())
    config = ModelConfig(model=folder, dtype=dtype)
    files, device, precision = locate_model(config), torch.device("cpu"), getattr(torch, dtype)
    tokenizer = load_tokenizer(files, config)
    groups = [
        PromptWithResponses(
            tokenizer(prompt)["input_ids"],
            [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts],
        )
        for prompt, texts in zip(PROMPTS, RESPONSES, strict=True)
    ]
    reference = Scorer(load_model(files, config, device=device, trainable=False))
    lengths = build_rows(groups, shared=False, pad_id=0).lengths
    shared, plain = (score(reference, groups, shared=s) for s in (True, False))
    alone = torch.cat(
        [
            score(reference, [PromptWithResponses(g.prompt, [r])], shared=False)
            for g in groups
            for r in g.responses
        ]
    )
    policy = Scorer(load_model(files, PolicyConfig(model=folder, dtype=dtype), device=device, trainable=True))
    parallel = prepare_parallel(policy, precision=precision, device=device, learning_rate=1e-6)
    gaps = score(parallel.module, groups, shared=True) - shared
    return (
        (gaps[0::2] - gaps[1::2]).abs().max().item(),
        ((shared - plain).abs() / lengths).max().item(),
        ((alone - plain).abs() / lengths).max().item(),
    )


if __name__ == "__main__":
    print("| dtype | largest |h| at the start | shared against plain | alone against in company |")
    print("|---|---|---|---|")
    for name in ("float32", "bfloat16"):
        print(f"| {name} | {' | '.join(f'{value:.1e}' for value in measure(name))} |")
