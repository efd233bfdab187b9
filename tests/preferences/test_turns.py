"""Responses of several messages: the loss is on the assistant's turns, and what its tools answer is read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.logprobs import Scorer
from orchestrator.driver.show_data import mark_scored_tokens
from orchestrator.references.messages import PromptGroup, ScoreRequest
from orchestrator.references.replica import FrozenModel
from orchestrator.references.store import digest_response
from preferences.config import DataConfig, SourceConfig
from preferences.load import load_pairs
from preferences.pairs import BadRow, Pair
from preferences.tokens.rendering import Rendering
from tests.support import tiny
from tests.support.tokenized import tokenize

CONFIG = DataConfig(train="t", max_length=900, max_prompt_length=400)
# Calls are shown as JSON; a tool's answers come in a turn of its own, or in one of the user's.
TURN = (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}" + TURN + "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}[{{ 'ipython' if m.role == 'tool' else m.role }}]{{ '\n\n' }}"
    + TURN
    + "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ '\n\n' }}{% endif %}"
)
# As Qwen3's: the last turn has an empty block where it has no reasoning, and tools answer in a user's turn.
THINKING = CHATML.replace(
    "{% generation %}",
    "{% generation %}{% if loop.last %}<think>{{ '\\n\\n' }}</think>{{ '\\n\\n' }}{% endif %}",
).replace("{{ m.role + '\\n' }}", "{{ 'user' if m.role == 'tool' else m.role }}{{ '\\n' }}")
STRICT = (
    "{% if messages[-1].tool_calls %}{{ raise_exception('a call needs its answer') }}{% endif %}" + CHATML
)
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last or m.role != 'assistant' }}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CALL = [{"name": "add", "arguments": {"a": 1, "b": 2}}]


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED = [turn("user", "What is 1 + 2?")]
WITH_TOOL = [
    turn("assistant", "Let me see.", tool_calls=CALL),
    turn("tool", "3"),
    turn("assistant", "It is 3."),
]
PAIR = Pair(ASKED, WITH_TOOL, [turn("assistant", "It is 4.")], source="t:1")


def make_rendering(template: str) -> Rendering:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = template
    return Rendering(tokenizer)


@pytest.mark.parametrize("template", [CHATML, LLAMA, THINKING], ids=["chatml", "llama", "thinking"])
def test_the_scored_tokens_are_the_assistants(template: str) -> None:
    """Compared with the mask that transformers makes of a template that marks the assistant's turns."""
    rendering = make_rendering(template)
    row = tokenize([PAIR], {"policy": rendering}, CONFIG).tables["policy"][0]
    whole = rendering.tokenizer.apply_chat_template(
        [*ASKED, *WITH_TOOL], return_assistant_tokens_mask=True, return_dict=True
    )
    mine = [*row.prompt, *np.where(row.chosen < 0, ~row.chosen, row.chosen)]
    assert mine == whole["input_ids"][: len(mine)]
    scored = [*np.zeros(len(row.prompt), bool), *(row.chosen >= 0)]
    assert scored == [bool(flag) for flag in whole["assistant_masks"]][: len(mine)]
    assert row.prompt.min() >= 0
    text = mark_scored_tokens(row.chosen, rendering.tokenizer)
    call = json.dumps(CALL[0])
    assert text.startswith(f"«Let me see.{call}<|im_end|>»")
    assert text.endswith("It is 3.<|im_end|>»")
    assert row.rejected is not None
    assert mark_scored_tokens(row.rejected, rendering.tokenizer).endswith("It is 4.<|im_end|>»")


def test_every_model_marks_the_turns_in_its_own_template() -> None:
    renderings = {"policy": make_rendering(CHATML), "other": make_rendering(LLAMA)}
    tables = tokenize([PAIR], renderings, CONFIG).tables
    texts = [mark_scored_tokens(tables[n][0].chosen, r.tokenizer) for n, r in renderings.items()]
    assert [text.count("«") for text in texts] == [2, 2]
    assert "»\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n«" in texts[0]
    assert "»[ipython]\n\n3<|im_end|>[assistant]\n\n«" in texts[1]


def test_what_is_scored_is_part_of_a_scores_key() -> None:
    row = tokenize([PAIR], {"policy": make_rendering(CHATML)}, CONFIG).tables["policy"][0]
    read = np.where(row.chosen < 0, ~row.chosen, row.chosen)
    assert digest_response(row.prompt, row.chosen) != digest_response(row.prompt, read)


def test_a_replica_scores_the_assistants_tokens_only() -> None:
    row = tokenize([PAIR], {"policy": make_rendering(CHATML)}, CONFIG).tables["policy"][0]
    model = tiny.llama().double()
    frozen = FrozenModel("r", Scorer(model), device=torch.device("cpu"), shared=True, budget=1000)
    read = np.where(row.chosen < 0, ~row.chosen, row.chosen)
    keys = [digest_response(row.prompt, ids) for ids in (row.chosen, read)]
    scores = frozen.score(ScoreRequest.pack([PromptGroup(row.prompt, [row.chosen, read], keys)]))
    ids = torch.tensor([*row.prompt, *read])
    logps = model(input_ids=ids[None]).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
    each = logps[range(len(read)), ids[len(row.prompt) :]].detach().numpy()
    np.testing.assert_allclose(scores.logps, [each[row.chosen >= 0].sum(), each.sum()], rtol=1e-9)
    assert scores.lengths.tolist() == [(row.chosen >= 0).sum(), len(read)]


def test_a_template_that_refuses_a_part_of_the_turns_is_a_bad_row() -> None:
    with pytest.raises(BadRow, match=r"refuses the messages \(a call needs its answer\)"):
        tokenize([PAIR], {"policy": make_rendering(STRICT)}, CONFIG)


def test_a_template_that_rewrites_turns_is_refused() -> None:
    with pytest.raises(BadRow, match="t:1: the chat template of the policy changes the assistant's turns"):
        tokenize([PAIR], {"policy": make_rendering(FORGETFUL)}, CONFIG)


def test_turns_that_are_too_long_are_left_out_and_not_cut() -> None:
    short = Pair(ASKED, [turn("assistant", "It is 3.")], [turn("assistant", "It is 4.")], source="t:2")
    settings = CONFIG.model_copy(
        update={"max_length": 90, "max_prompt_length": 60, "on_long_row": "truncate"}
    )
    done = tokenize([PAIR, short], {"policy": make_rendering(CHATML)}, settings)
    assert done.kept_indices.tolist() == [1]
    assert dict(done.skipped) == {"too long for the policy, and no use when cut": 1}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")], "3 messages after the prompt"),
        ([turn("tool", "3"), turn("assistant", "a")], "2 messages after the prompt"),
        ([turn("assistant", "a"), turn("tool", "3")], "must be from assistant, got 'tool'"),
        (
            [turn("assistant", " "), turn("tool", "3"), turn("assistant", "a")],
            "the assistant in chosen is empty",
        ),
    ],
)
def test_other_turns_are_refused(messages: list[Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": ASKED, "chosen": messages, "rejected": PAIR.rejected}))
    with pytest.raises(BadRow, match=message):
        load_pairs(SourceConfig(source=str(path)))


def test_rows_with_tools_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": ASKED, "chosen": WITH_TOOL, "rejected": PAIR.rejected}))
    (pair,) = load_pairs(SourceConfig(source=str(path))).pairs
    assert pair.chosen == WITH_TOOL
