import math
import pickle

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl import extract_prompt

from preferences.config import DataConfig
from preferences.pairs import BadRow, Pair, count_common_prefix, find_implicit_prompt_end
from preferences.reading.rows import build_pairs

CONFIG = DataConfig(train="train.jsonl")
TEXT = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
USER = {"role": "user", "content": "Why?"}


def turn(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


def read_pairs(row: dict, *, completions_only: bool = False, **config) -> list[Pair]:
    return build_pairs(
        row, "train.jsonl:17", CONFIG.model_copy(update=config), completions_only=completions_only
    )


def list_responses(pairs: list[Pair]) -> list[tuple]:
    return [(pair.chosen, pair.rejected) for pair in pairs]


# ---- prompts ----


def test_text_pair():
    assert read_pairs(TEXT) == [Pair("Q", "yes", "no", 1.0, "train.jsonl:17")]
    assert not read_pairs(TEXT)[0].is_chat


def test_context_is_another_name_for_prompt():
    assert read_pairs({"context": "Q", "chosen": "yes", "rejected": "no"})[0].prompt == "Q"


def test_message_pair_with_system_turns_and_tools():
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    prompt = [turn("Be brief.", "system"), USER, turn("Because."), turn("And?", "user")]
    row = {"prompt": prompt, "chosen": [turn("So.")], "rejected": [turn("No.")], "tools": tools}
    assert read_pairs(row) == [Pair(prompt, [turn("So.")], [turn("No.")], 1.0, "train.jsonl:17", tools)]
    assert read_pairs(row)[0].is_chat


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, turn("A")], "rejected": [USER, turn("B")]},
        {"prompt": [USER], "chosen": [USER, turn("A")], "rejected": [USER, turn("B")]},
        {"prompt": "Why?", "chosen": [USER, turn("A")], "rejected": [USER, turn("B")]},
        {"prompt": "Why?", "chosen": [turn("A")], "rejected": [turn("B")]},
        {"prompt": [USER], "chosen": "A", "rejected": "B"},
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
            "chosen": "A",
            "rejected": "B",
        },
        {"prompt": [{**USER, "tool_calls": None}], "chosen": "A", "rejected": "B"},
    ],
)
def test_a_conversation_is_the_same_however_it_is_written(row):
    assert read_pairs(row) == [Pair([USER], [turn("A")], [turn("B")], 1.0, "train.jsonl:17")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # no word is cut in two
        ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: No", "\n\nHuman: Hi\n\nAssistant:"),
        ("Q: x\nYes", "Q: x\nNo", "Q: x\n"),
        ("Say cat is", "Say cats are", "Say"),
        ("Say yes", "Say yes sir", "Say"),
    ],
)
def test_implicit_text_prompt(chosen, rejected, prompt):
    [pair] = read_pairs({"chosen": chosen, "rejected": rejected})
    assert pair.prompt == prompt
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (chosen, rejected)


words = st.lists(st.sampled_from(["oak", "ash", "elm", "fir", "yew"]), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(prompt=words, chosen=words, rejected=words)
def test_implicit_text_prompt_is_trls_where_words_differ_from_their_first_letter(prompt, chosen, rejected):
    """No two of the five words begin alike, so TRL, which may cut a word in two, cuts between words here."""
    assume(chosen[0] != rejected[0])
    row = {"chosen": " ".join(prompt + chosen), "rejected": " ".join(prompt + rejected)}
    theirs = extract_prompt(row)
    [pair] = read_pairs(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        theirs["prompt"],
        theirs["chosen"],
        theirs["rejected"],
    )


@settings(deadline=None, max_examples=100)
@given(st.text("ab ", max_size=12), st.text("ab ", max_size=12))
def test_an_implicit_prompt_ends_between_words(first, second):
    length = count_common_prefix(first, second)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or first == second
    cut = find_implicit_prompt_end(first, second)
    assert cut <= length
    inside = [text[cut - 1 : cut].strip() and text[cut : cut + 1].strip() for text in (first, second)]
    assert not any(inside)


# ---- labels ----


@pytest.mark.parametrize(
    ("label", "expected", "swapped"),
    [
        ({}, 1.0, False),
        ({"soft_label": None}, 1.0, False),
        ({"soft_label": 0.75}, 0.75, False),
        ({"soft_label": 1}, 1.0, False),
        ({"soft_label": "0.75"}, 0.75, False),
        ({"soft_label": 0.5}, 0.5, False),
        ({"soft_label": 0.25}, 0.75, True),
        ({"soft_label": 0}, 1.0, True),
        ({"votes_chosen": 3, "votes_rejected": 1}, 0.75, False),
        ({"votes_chosen": 1, "votes_rejected": 3}, 0.75, True),
        ({"votes_chosen": 2, "votes_rejected": 2}, 0.5, False),
        ({"votes_chosen": "4", "votes_rejected": 0.0}, 1.0, False),
    ],
)
def test_labels(label, expected, swapped):
    [pair] = read_pairs({**TEXT, **label})
    assert pair.soft_label == expected
    assert pair.swapped == swapped
    assert (pair.chosen, pair.rejected) == (("no", "yes") if swapped else ("yes", "no"))


# ---- ranked completions ----


def test_ranked_completions_make_every_pair():
    row = {"context": "Q", "completions": ["a", "b", "c"]}
    assert list_responses(read_pairs(row)) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert list_responses(read_pairs(row, ranked_pairs="adjacent")) == [("a", "b"), ("b", "c")]
    assert read_pairs(row)[1].source == "train.jsonl:17 (completions 1 and 3)"


def test_ranks_order_completions_and_equal_ranks_make_no_pair():
    row = {"prompt": "Q", "completions": ["a", "b", "c", "d", "e"], "ranks": [2, 1, 2, None, 3]}
    assert list_responses(read_pairs(row)) == [("b", "a"), ("b", "c"), ("b", "e"), ("a", "e"), ("c", "e")]
    adjacent = list_responses(read_pairs(row, ranked_pairs="adjacent"))
    assert adjacent == [("b", "a"), ("b", "c"), ("a", "e"), ("c", "e")]


def test_ranked_answers_to_a_conversation():
    row = {"prompt": [USER], "completions": [[turn("a")], [turn("b")]]}
    assert list_responses(read_pairs(row)) == [([turn("a")], [turn("b")])]


# ---- completions alone ----


def test_prompt_and_completion():
    row = {"prompt": "Q", "completion": "A"}
    assert read_pairs(row, completions_only=True) == [Pair("Q", "A", None, 1.0, "train.jsonl:17")]


def test_a_whole_conversation_is_trained_on_its_last_turn():
    row = {"completion": [USER, turn("A")]}
    assert read_pairs(row, completions_only=True) == [Pair([USER], [turn("A")], None, 1.0, "train.jsonl:17")]


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        (TEXT, ["yes"]),
        ({**TEXT, "soft_label": 0.1}, ["no"]),
        ({"prompt": "Q", "chosen": "yes"}, ["yes"]),
        ({"prompt": "Q", "completions": ["a", "b", "c"]}, ["a", "b"]),
    ],
)
def test_of_a_preference_the_preferred_response_is_trained_on(row, chosen):
    pairs = read_pairs(row, completions_only=True)
    assert [pair.chosen for pair in pairs] == chosen
    assert all(pair.rejected is None and pair.soft_label == 1.0 for pair in pairs)


# ---- refusals ----


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "Q", "chosen": "yes"},
            "rejected is missing or empty; if another column holds it, set data.columns",
        ),
        ({**TEXT, "chosen": ""}, "chosen is missing or empty"),
        ({**TEXT, "chosen": "  \n"}, "chosen is missing or empty"),
        ({**TEXT, "rejected": []}, "rejected is an empty list of messages"),
        ({**TEXT, "prompt": " "}, "prompt is missing or empty"),
        ({**TEXT, "chosen": 5}, "chosen must be text or a list of messages, got int '5'"),
        ({**TEXT, "chosen": {"role": "x"}}, "chosen must have a text as content, got NoneType"),
        ({**TEXT, "chosen": "no"}, "chosen and rejected are the same, so there is no preference"),
        ({**TEXT, "chosen": [turn("no")]}, "must both be text or both message lists"),
        ({"chosen": "yes", "rejected": "no"}, "begin with no words in common; give a prompt"),
        ({**TEXT, "context": "Q"}, "give prompt or context, not both"),
        (
            {**TEXT, "tools": [{}]},
            "tools reach the model through the chat template, so prompt must be messages",
        ),
        ({**TEXT, "tools": "{"}, "tools must be a list, or JSON text of one"),
        ({**TEXT, "tools": ["look"]}, "tools must be a list of JSON schemas"),
        (
            {"prompt": "Q", "completion": "A"},
            "trains? the preset sft only; a preference needs chosen and rejected",
        ),
        # labels
        ({**TEXT, "soft_label": 1.2}, r"soft_label must be a number from 0 to 1 .*, got 1.2"),
        ({**TEXT, "soft_label": -0.1}, "soft_label must be a number from 0 to 1"),
        ({**TEXT, "soft_label": math.nan}, "soft_label must be a number from 0 to 1 .*, got nan"),
        ({**TEXT, "soft_label": "often"}, "soft_label must be a number from 0 to 1 .*, got 'often'"),
        ({**TEXT, "soft_label": True}, "soft_label must be a number from 0 to 1 .*, got True"),
        (
            {**TEXT, "soft_label": 0.5, "votes_chosen": 1, "votes_rejected": 1},
            "give soft_label or votes, not both",
        ),
        ({**TEXT, "votes_chosen": 1}, "votes_chosen is given alone"),
        ({**TEXT, "votes_chosen": 0, "votes_rejected": 0}, "both 0: nobody preferred either"),
        (
            {**TEXT, "votes_chosen": -1, "votes_rejected": 2},
            "votes_chosen must be a whole number >= 0, got -1",
        ),
        (
            {**TEXT, "votes_chosen": 1, "votes_rejected": 2.5},
            "votes_rejected must be a whole number >= 0, got 2.5",
        ),
        # messages
        (
            {"chosen": [turn("A")], "rejected": [turn("B")]},
            "there is no message before the response; give a prompt",
        ),
        (
            {"prompt": [USER], "chosen": [turn("A", "user")], "rejected": [turn("B")]},
            "must be from assistant, got 'user'",
        ),
        (
            {"prompt": [USER, turn("x")], "chosen": "A", "rejected": "B"},
            "the prompt ends with an assistant message",
        ),
        (
            {"prompt": [turn(" ", "user")], "chosen": "A", "rejected": "B"},
            "the last message of the prompt is empty",
        ),
        (
            {"prompt": [USER], "chosen": [turn("")], "rejected": "B"},
            "must both be text or both message lists",
        ),
        (
            {"prompt": [USER], "chosen": [turn("")], "rejected": [turn("B")]},
            "a message of the assistant in chosen is empty",
        ),
        (
            {"prompt": [USER], "chosen": [turn("A"), USER, turn("C")], "rejected": [turn("B")]},
            "chosen has 3 messages after the prompt; the loss is on the turns of the assistant and its tools",
        ),
        ({"prompt": ["Why?"], "chosen": "A", "rejected": "B"}, r"prompt\[0\] must be a message"),
        (
            {"prompt": [{"by": "human", "value": "x"}], "chosen": "A", "rejected": "B"},
            r"prompt\[0\] has no role",
        ),
        (
            {"prompt": [{"role": "user"}], "chosen": "A", "rejected": "B"},
            r"prompt\[0\] must have a text as content",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "A", "rejected": "B"},
            r"prompt\[0\] has content of type image, and polyref reads text only",
        ),
        (
            {"prompt": "Other?", "chosen": [USER, turn("A")], "rejected": [USER, turn("B")]},
            "prompt is not among the messages that chosen and rejected share; data.columns: {prompt: null}",
        ),
        # ranked completions
        ({"prompt": "Q", "completions": "a"}, "completions must be a list, or JSON text of one"),
        ({"prompt": "Q", "completions": ["a"]}, "completions must hold at least two of different rank"),
        ({"prompt": "Q", "completions": ["a", "a"]}, "chosen and rejected are the same"),
        ({"prompt": "Q", "completions": ["a", "b"], "ranks": [1]}, "ranks has 1 entries for 2 completions"),
        ({"prompt": "Q", "completions": ["a", "b"], "ranks": [1, "x"]}, "ranks must be numbers"),
        ({"prompt": "Q", "completions": ["a", "b"], "soft_label": 1}, "cannot also have soft_label"),
    ],
)
def test_refused(row, message):
    with pytest.raises(BadRow, match=message) as refused:
        read_pairs(row)
    shown = str(refused.value)
    assert shown.startswith("train.jsonl:17")
    assert "set data.on_bad_row: skip" in shown


def test_a_mapped_column_must_be_there():
    with pytest.raises(BadRow, match=r"for soft_label reads 'agree', .*\(did you mean 'agreed'\?\)"):
        read_pairs({**TEXT, "agreed": 0.3}, columns={"soft_label": "agree"})


def test_a_field_can_be_switched_off():
    [pair] = read_pairs({**TEXT, "soft_label": 0.6}, columns={"soft_label": None})
    assert pair.soft_label == 1.0


def test_a_bad_row_survives_the_way_to_another_process():
    bad = BadRow("train.jsonl:3", "empty text", "chosen is empty")
    again = pickle.loads(pickle.dumps(bad))
    assert (str(again), again.reason) == (str(bad), "empty text")
