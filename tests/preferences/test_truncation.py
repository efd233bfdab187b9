import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from orchestrator.demo.assets import fetch_gpt2_tokenizer, fetch_smollm2
from preferences.config import DataConfig
from preferences.pairs import Pair
from preferences.tokens.rendering import Rendering
from tests.support import tiny
from tests.support.tokenized import tokenize

WORDS = ["user", "assistant", "system", "a", "b", "c", "d", "e", "f"]
PAD, BOS, EOS, START, END, UNK, USER, ASSISTANT, SYSTEM, A, B, C, D, E, F = range(15)


def make_config(max_length: int, max_prompt_length: int) -> DataConfig:
    return DataConfig(
        train="t", max_length=max_length, max_prompt_length=max_prompt_length, on_long_row="truncate"
    )


def tokenize_for_policy_and_bytes(pair, settings, *, chat=False):
    renderings = {
        "policy": Rendering(tiny.word_tokenizer(WORDS, chat=chat)),
        "bytes": Rendering(tiny.byte_tokenizer()),
        "twin": Rendering(tiny.word_tokenizer(WORDS, chat=chat)),
    }
    done = tokenize([pair], renderings, settings)
    row, other = done.tables["policy"][0], done.tables["bytes"][0]
    assert done.truncated == 1
    assert done.tables["twin"] is done.tables["policy"]  # the same tokens, not a retokenised text
    decode = renderings["bytes"].tokenizer.decode
    return (
        [part.tolist() for part in (row.prompt, row.chosen, row.rejected)],
        [decode(part) for part in (other.prompt, other.chosen, other.rejected)],
    )


def chat_pair(*texts: str, system: str | None = None, chosen="a", rejected="b") -> Pair:
    prompt = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    if system is not None:
        prompt.insert(0, {"role": "system", "content": system})
    return Pair(
        prompt, *([{"role": "assistant", "content": text}] for text in (chosen, rejected)), source="t:1"
    )


def test_a_prompt_is_cut_on_the_left_and_a_response_on_the_right():
    pair = Pair("a b c d e", "f e d c b", "f", source="t:1")
    tokens, text = tokenize_for_policy_and_bytes(pair, make_config(max_length=5, max_prompt_length=2))
    assert tokens == [[D, E], [F, E, D], [F, EOS]]
    assert text == ["d e", "f e d", "f<|im_end|>"]


def test_a_response_that_fits_but_for_its_end_loses_only_that():
    tokens, text = tokenize_for_policy_and_bytes(Pair("a", "b c", "d", source="t:1"), make_config(3, 1))
    assert tokens == [[A], [B, C], [D, EOS]]
    assert text == ["a", "b c", "d<|im_end|>"]


def test_the_policys_positions_bound_what_is_left():
    renderings = {"policy": Rendering(tiny.word_tokenizer(WORDS), max_positions=4)}
    pair = Pair("a b c d e", "f f f", "e", source="t:1")
    row = tokenize([pair], renderings, make_config(50, 40)).tables["policy"][0]
    assert (row.prompt.tolist(), row.chosen.tolist()) == ([C, D, E], [F])


def test_a_conversation_loses_its_oldest_turns_and_keeps_its_system_message():
    pair = chat_pair("a", "b", "c d", system="e", chosen="f f f")
    tokens, text = tokenize_for_policy_and_bytes(
        pair, make_config(max_length=14, max_prompt_length=12), chat=True
    )
    assert tokens[0] == [START, SYSTEM, E, END, START, USER, C, D, END, START, ASSISTANT]
    assert tokens[1] == [F, F, F]
    assert (
        text[0] == "<|im_start|>system\ne<|im_end|>\n<|im_start|>user\nc d<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text[1:] == ["f f f", "b<|im_end|>"]


def test_a_last_question_loses_its_beginning_not_its_markup():
    tokens, text = tokenize_for_policy_and_bytes(
        chat_pair("a", "b", "c d e f"), make_config(12, 7), chat=True
    )
    assert tokens[0] == [START, USER, E, F, END, START, ASSISTANT]
    assert text[0] == "<|im_start|>user\ne f<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("pair", "settings"),
    [
        (Pair("a", "b c d", "b c e", source="t:1"), make_config(3, 1)),  # both are left the same
        (chat_pair("a b"), make_config(20, 4)),  # the markup alone is too long
    ],
)
def test_a_row_that_no_cut_can_help_is_counted(pair, settings):
    renderings = {"policy": Rendering(tiny.word_tokenizer(WORDS, chat=True))}
    done = tokenize([pair, Pair("a", "b", "c")], renderings, settings)
    assert done.kept_indices.tolist() == [1]
    assert dict(done.skipped) == {"too long for the policy, and no use when cut": 1}
    assert done.truncated == 0


def test_a_completion_alone_is_cut_too():
    pair = Pair("a b c", "d e f", None, source="t:1")
    row = tokenize([pair], {"p": Rendering(tiny.word_tokenizer(WORDS))}, make_config(3, 1)).tables["p"][0]
    assert (row.prompt.tolist(), row.chosen.tolist(), row.rejected) == ([C], [D, E], None)


letters = st.text("ab \u00e9\u4e2d\U0001f642", min_size=1, max_size=30).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(prompt=letters, chosen=letters, rejected=letters, limit=st.integers(4, 20), room=st.integers(4, 12))
def test_cut_tokens_spell_the_cut_text(prompt, chosen, rejected, limit, room):
    """A byte tokenizer would cut inside characters; the other model reads what is left."""
    renderings = {
        "policy": Rendering(tiny.byte_tokenizer()),
        "other": Rendering(tiny.byte_tokenizer(chat=False)),
    }
    pairs = [Pair(prompt, "x" + chosen, "y" + rejected, source="t:1"), Pair("a", "b", "c")]
    done = tokenize(pairs, renderings, make_config(limit + room, limit))
    if done.kept_indices.tolist() == [1]:
        assert done.skipped.total() == 1
        return
    policy, other = (done.tables[name][0] for name in ("policy", "other"))
    decode = renderings["policy"].tokenizer.decode
    assert len(policy.prompt) <= limit
    assert prompt.endswith(decode(policy.prompt))
    for name, whole in (("chosen", "x" + chosen), ("rejected", "y" + rejected)):
        mine, theirs = getattr(policy, name).tolist(), getattr(other, name).tolist()
        assert len(policy.prompt) + len(mine) <= limit + room
        ended = mine[-1] == renderings["policy"].end_id
        text = decode(mine[:-1] if ended else mine)
        assert text == whole if ended else whole.startswith(text)
        assert decode(theirs[:-1] if ended else theirs) == text
    assert decode(other.prompt) == decode(policy.prompt)


@pytest.mark.smollm2
def test_two_real_tokenizers_score_the_same_cut_text():
    policy, other = (
        AutoTokenizer.from_pretrained(folder()) for folder in (fetch_smollm2, fetch_gpt2_tokenizer)
    )
    renderings = {"policy": Rendering(policy), "gpt2": Rendering(other)}
    story = "Once upon a time, \U0001f642\U0001f642 in  a small caf\u00e9, people disagreed about films. " * 4
    pair = Pair(story, story[5:], story[9:], source="t:1")
    for limit in range(20, 60, 3):
        done = tokenize([pair], renderings, make_config(limit, limit // 2))
        mine, theirs = done.tables["policy"][0], done.tables["gpt2"][0]
        for name in ("prompt", "chosen", "rejected"):
            text = policy.decode(getattr(mine, name))
            assert text == other.decode(getattr(theirs, name))
            assert story.endswith(text) if name == "prompt" else text in story
        assert limit // 2 - 4 < len(mine.prompt) <= limit // 2  # a character is four tokens at most
