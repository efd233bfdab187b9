"""Every causal architecture that transformers registers is scored as its own logits say, or refused by name.

`python -m tests.models.test_architectures` writes the table in docs/models.md, which these tests check.
"""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from models.architecture import find_row_limit
from models.config import ModelError
from models.logprobs import Scorer
from models.rows import PromptWithResponses, build_rows
from tests.support.architectures import NAMES, NOT_BUILT, VARIANTS, build_tiny

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- architectures -->\n", "<!-- end -->"
TOLERANCE = 1e-4  # nats per token
# Rows of 11, 44, 29, 4, 3, 110 and 91 tokens: within and beyond windows and original RoPE lengths.
LENGTHS = ((5, (6, 6)), (20, (24, 9)), (1, (3, 2)), (50, (60, 41)))

transformers_logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@dataclass(frozen=True)
class Comparison:
    """An architecture's scores beside its own logits.

    outcome: `shared` and `plain` rows as used, or `refused`; with a limit of tokens if there is one.
    worst:   largest difference over all rows by path (alone, beside others, shared), in nats per token.
    message: of the refusal.
    """

    outcome: str
    worst: dict[str, float] = field(default_factory=dict)
    message: str = ""


def make_groups() -> list[PromptWithResponses]:
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> list[int]:
        return torch.randint(4, 150, (count,), generator=generator).tolist()

    return [PromptWithResponses(draw(p), [draw(r) for r in responses]) for p, responses in LENGTHS]


@torch.no_grad()
def score_by_logits(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """Return log-prob per token and mean entropy / log V from a fresh copy's logits of this row alone."""
    ids = torch.tensor([[*prompt, *response]])
    logits = copy.deepcopy(model)(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logps = logits.double().log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1).mean() / math.log(logits.shape[-1])
    return torch.stack([logps.gather(-1, torch.tensor(response)[:, None]).mean(), entropy])


@torch.no_grad()
def score(scorer: Scorer, groups: Sequence[PromptWithResponses], *, shared: bool) -> torch.Tensor:
    found = scorer(build_rows(groups, shared=shared, pad_id=0), entropy=True)
    assert found.entropy is not None
    return torch.stack([found.logps / found.lengths, found.entropy], dim=1).double()


def compare(name: str) -> Comparison:
    """Score rows alone, beside longer ones, and with shared prompts where that is allowed."""
    architecture, overrides = VARIANTS.get(name, (name, {}))
    model = build_tiny(architecture, **overrides)
    try:
        scorer = Scorer(copy.deepcopy(model))
    except ModelError as error:
        return Comparison("refused", message=str(error))
    limit = find_row_limit(model.config)
    groups = make_groups()
    if limit is not None:
        with pytest.raises(ModelError, match=re.escape(limit.reason)):
            score(scorer, groups, shared=False)
        groups = [g for g in groups if len(g.prompt) + max(map(len, g.responses)) <= limit.tokens]
    single = [PromptWithResponses(g.prompt, [r]) for g in groups for r in g.responses]
    expected = torch.stack([score_by_logits(model, g.prompt, g.responses[0]) for g in single])
    # Longest first: a model that keeps the frequencies of the longest row it saw gives others to the rest.
    alone = [score(scorer, [g], shared=False) for g in reversed(single)]
    found = {"alone": torch.cat(alone[::-1]), "beside others": score(scorer, groups, shared=False)}
    is_shared = scorer.prefix_sharing_unavailable_reason is None
    if is_shared:
        found["shared"] = score(scorer, groups, shared=True)
    worst = {path: (scores - expected).abs().max().item() for path, scores in found.items()}
    outcome = "shared and plain" if is_shared else "plain"
    return Comparison(outcome if limit is None else f"{outcome}, up to a limit", worst)


def read_table() -> dict[str, str]:
    """Return the outcome that docs/models.md states, by name."""
    text = TABLE.read_text(encoding="utf-8")
    lines = text[text.index(START) + len(START) : text.index(END)].splitlines()[2:]
    return {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in lines)}


@pytest.mark.parametrize("name", [*(n for n in NAMES if n not in NOT_BUILT), *VARIANTS])
def test_an_architecture_is_scored_as_its_logits_say_or_refused(name: str) -> None:
    comparison = compare(name)
    assert max(comparison.worst.values(), default=0.0) <= TOLERANCE
    assert comparison.outcome != "refused" or (
        comparison.message.count("\n") == 0 and "; use a causal language model" in comparison.message
    )
    assert read_table()[name] == comparison.outcome


@pytest.mark.parametrize("name", sorted(NOT_BUILT))
def test_architectures_that_are_not_compared_cannot_be_built(name: str) -> None:
    with pytest.raises(Exception):  # noqa: B017  (whatever transformers raises)
        build_tiny(name)(input_ids=torch.arange(4, 24)[None], use_cache=False)


def test_the_families_that_people_train_share_prompts() -> None:
    table = read_table()
    for name in (
        "llama",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "olmo2",
        "granite",
        "phi3",
        "glm4",
        "gemma",
    ):
        assert table[name] == "shared and plain", name
    for name in ("gemma2", "gemma3", "gemma4", "gpt_oss", "mistral", "llama4", "qwen3_5", "deepseek_v4"):
        assert table[name].startswith("plain"), name


def write_table() -> None:
    """Measure all architectures and write the table."""
    paths = ("alone", "beside others", "shared")
    lines = [f"| architecture | rows | {' | '.join(paths)} |\n", "|---|---|---|---|---|\n"]
    for name in [*(n for n in NAMES if n not in NOT_BUILT), *VARIANTS]:
        found = compare(name)
        worst = " | ".join(f"{found.worst[path]:.0e}" if path in found.worst else "" for path in paths)
        lines.append(f"| {name} | {found.outcome} | {worst} |\n")
    text = TABLE.read_text(encoding="utf-8")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    TABLE.write_text(before + "".join(lines) + after, encoding="utf-8")


if __name__ == "__main__":
    write_table()
