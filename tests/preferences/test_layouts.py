"""Rows in the shape of public data sets are read as what they say, or leave one question open."""

import json
from pathlib import Path
from typing import Any

import pytest

from preferences.config import SourceConfig
from preferences.load import load_pairs
from preferences.pairs import DataError, Pair
from preferences.reading.recognition import understand_source


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [turn("user", "Why is the sky blue?")]
GOOD, BAD = "Blue light scatters most.", "Because."
TALKS = [[*ASKED, turn("assistant", text)] for text in (GOOD, BAD)]

DATA_SETS: dict[str, dict[str, Any]] = {
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": "Why is the sky blue?",
        "prompt_id": "a1",
        "chosen": TALKS[0],
        "rejected": TALKS[1],
        "messages": TALKS[0],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "openbmb/UltraFeedback": {
        "source": "made_up",
        "instruction": "Why is the sky blue?",
        "models": ["one", "two", "three"],
        "completions": [
            {
                "model": "one",
                "response": BAD,
                "overall_score": 2.5,
                "annotations": {"honesty": {"Rating": "2"}},
            },
            {"model": "two", "response": GOOD, "overall_score": 8.0, "annotations": None},
            {"model": "three", "response": "Nobody knows.", "overall_score": 2.5, "annotations": None},
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    },
    "argilla/ultrafeedback-binarized-preferences": {
        "source": "made_up",
        "instruction": "Why is the sky blue?",
        "chosen-rating": 5.0,
        "rejected-rating": 2.0,
        "chosen": GOOD,
        "rejected": BAD,
        "chosen-model": "one",
        "rejected-model": "two",
    },
    "argilla/ultrafeedback-binarized-preferences-cleaned": {
        "source": "made_up",
        "prompt": "Why is the sky blue?",
        "chosen": TALKS[0],
        "chosen-rating": 5.0,
        "chosen-model": "one",
        "rejected": TALKS[1],
        "rejected-rating": 2.0,
        "rejected-model": "two",
    },
    "trl-lib/ultrafeedback_binarized": {
        "chosen": TALKS[0],
        "rejected": TALKS[1],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "nvidia/HelpSteer2, preferences": {
        "split": "train",
        "prompt": "Why is the sky blue?",
        "response_1": BAD,
        "response_2": GOOD,
        "preference_strength": 3,
        "preference_statement": "The second explains.",
        "preference_elaboration": "It says what happens to the light.",
        "three_most_similar_preferences": [],
        "all_preferences_unprocessed": [],
    },
    "nvidia/HelpSteer3": {
        "domain": "general",
        "language": "english",
        "context": ASKED,
        "response1": BAD,
        "response2": GOOD,
        "overall_preference": 3,
        "individual_preference": [
            {"score": 3, "reasoning": "r", "feedback1": "f", "feedback2": "f"},
            {"score": -1, "reasoning": "r", "feedback1": "f", "feedback2": "f"},
        ],
    },
    "Anthropic/hh-rlhf": {
        "chosen": f"\n\nHuman: Why is the sky blue?\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: Why is the sky blue?\n\nAssistant: {BAD}",
    },
    "stanfordnlp/SHP": {
        "post_id": "p1",
        "domain": "asksomething",
        "upvote_ratio": 0.9,
        "history": "Why is the sky blue?",
        "c_root_id_A": "c1",
        "c_root_id_B": "c2",
        "created_at_utc_A": 1,
        "created_at_utc_B": 2,
        "score_A": 12,
        "score_B": 30,
        "human_ref_A": BAD,
        "human_ref_B": GOOD,
        "labels": 0,
        "seconds_difference": 1.0,
        "score_ratio": 2.5,
    },
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": {
        "id": "t1",
        "source": "made_up",
        "prompt": "Why is the sky blue?",
        "chosen": TALKS[0],
        "rejected": TALKS[1],
    },
    "lmsys/chatbot_arena_conversations": {
        "question_id": "q1",
        "model_a": "one",
        "model_b": "two",
        "winner": "model_b",
        "judge": "arena_user_1",
        "conversation_a": TALKS[1],
        "conversation_b": TALKS[0],
        "turn": 1,
        "anony": True,
        "language": "English",
        "tstamp": 1.0,
        "openai_moderation": {"flagged": False},
        "toxic_chat_tag": {"t5": {"flagged": False}},
    },
    "Intel/orca_dpo_pairs": {
        "system": "",
        "question": "Why is the sky blue?",
        "chosen": GOOD,
        "rejected": BAD,
    },
    "argilla/distilabel-intel-orca-dpo-pairs": {
        "system": "",
        "input": "Why is the sky blue?",
        "chosen": GOOD,
        "rejected": BAD,
        "generations": [GOOD, BAD],
        "order": ["chosen", "rejected"],
        "labelling_model": "one",
        "rating": [9.0, 1.0],
        "rationale": "It explains.",
        "status": "unchanged",
        "original_chosen": GOOD,
        "original_rejected": BAD,
        "chosen_score": 9.0,
        "in_gsm8k_train": False,
    },
    "argilla/dpo-mix-7k": {
        "dataset": "made_up",
        "chosen": TALKS[0],
        "rejected": TALKS[1],
        "chosen_rating": 5.0,
        "rejected_rating": 2.0,
    },
    "berkeley-nest/Nectar": {
        "prompt": "Why is the sky blue?",
        "answers": [
            {"answer": BAD, "model": "one", "rank": 2.0},
            {"answer": GOOD, "model": "two", "rank": 1.0},
        ],
        "turns": 1,
        "num_responses": 2,
        "source": ["made_up"],
        "good_natured": True,
    },
    "openai/summarize_from_feedback, comparisons": {
        "info": {"id": "i1", "post": "Why is the sky blue?", "title": "t", "subreddit": "s"},
        "summaries": [{"text": BAD, "policy": "one"}, {"text": GOOD, "policy": "two"}],
        "choice": 1,
        "worker": "w1",
        "batch": "b1",
        "split": "train",
        "extra": {},
    },
    "ShareGPT, as LLaMA-Factory has it": {
        "conversations": [{"from": "human", "value": "Why is the sky blue?"}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "Alpaca, as LLaMA-Factory has it": {
        "instruction": "Why is the sky",
        "input": "blue?",
        "chosen": GOOD,
        "rejected": BAD,
    },
    "openbmb/UltraInteract_pair": {
        "id": "u1",
        "parent_id": "u0",
        "task": "made_up",
        "trajectory": [{"from": "user", "value": "Why is the sky blue?"}],
        "chosen": GOOD,
        "rejected": BAD,
    },
}
SOFT = {"nvidia/HelpSteer2, preferences", "nvidia/HelpSteer3"}


def write(folder: Path, *rows: dict[str, Any]) -> SourceConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(source=str(path))


def read_text(text: str | list[dict[str, Any]] | None) -> str:
    return text if isinstance(text, str) else " ".join(message["content"] for message in text or ())


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_public_data_set_is_read_without_settings(name: str, tmp_path: Path) -> None:
    loaded = load_pairs(write(tmp_path, DATA_SETS[name]))
    pair = loaded.pairs[0]
    assert read_text(pair.chosen).strip() == GOOD
    assert read_text(pair.rejected).strip() in (BAD, "Nobody knows.")
    assert " ".join(read_text(pair.prompt).split()).removeprefix("Human: ").startswith("Why is the sky blue?")
    assert pair.soft_label == 1.0


@pytest.mark.parametrize("name", DATA_SETS)
def test_what_was_understood_can_be_written_down(name: str, tmp_path: Path) -> None:
    """The settings that are printed read the same pairs, without any recognition being needed."""
    import yaml

    source = write(tmp_path, DATA_SETS[name])
    understood = understand_source(source)
    settings = (yaml.safe_load(understood.text) or {}).get("data") if understood.text else None
    written = SourceConfig(source=source.source, **(settings or {}))
    assert written == understood.source
    again = understand_source(written)
    assert again.source == written
    assert not [line for line in again.text.splitlines()[1:] if not line.strip().startswith("#")]


def test_completions_with_scores_make_a_pair_of_every_two_that_differ(tmp_path: Path) -> None:
    pairs = load_pairs(write(tmp_path, DATA_SETS["openbmb/UltraFeedback"])).pairs
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(GOOD, BAD), (GOOD, "Nobody knows.")]


@pytest.mark.parametrize(
    ("name", "column", "value", "share"),
    [
        ("nvidia/HelpSteer2, preferences", "preference_strength", -3, 1.0),  # the first is much better
        ("nvidia/HelpSteer2, preferences", "preference_strength", 1, 1 / 3),
        ("nvidia/HelpSteer3", "overall_preference", -1, 2 / 3),
        ("nvidia/HelpSteer3", "overall_preference", 0, 0.5),
        ("stanfordnlp/SHP", "labels", 1, 1.0),
        ("lmsys/chatbot_arena_conversations", "winner", "model_a", 1.0),
        ("lmsys/chatbot_arena_conversations", "winner", "tie (bothbad)", 0.5),
        ("openai/summarize_from_feedback, comparisons", "choice", 0, 1.0),
    ],
)
def test_the_first_response_gets_its_share(
    name: str, column: str, value: Any, share: float, tmp_path: Path
) -> None:
    """BAD stands first in these rows."""
    (pair,) = load_pairs(write(tmp_path, {**DATA_SETS[name], column: value})).pairs
    of_first = pair.soft_label if read_text(pair.chosen) == BAD else 1 - pair.soft_label
    assert of_first == pytest.approx(share, abs=1e-12)


def test_a_system_text_goes_before_the_question(tmp_path: Path) -> None:
    (pair,) = load_pairs(write(tmp_path, {**DATA_SETS["Intel/orca_dpo_pairs"], "system": "Be brief."})).pairs
    assert pair.prompt == [turn("system", "Be brief."), *ASKED]
    assert pair.chosen == [turn("assistant", GOOD)]


# ---- questions ----

SAFE = {
    "prompt": "Why is the sky blue?",
    "response_0": GOOD,
    "response_1": BAD,
    "is_response_0_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}


def test_helpful_or_harmless_is_for_the_user_to_say(tmp_path: Path) -> None:
    source = write(tmp_path, SAFE)
    with pytest.raises(DataError) as asked:
        load_pairs(source)
    lines = str(asked.value).splitlines()
    assert "  label: {type: winner, column: better_response_id, first: 0, second: 1}" in lines
    assert "  label: {type: winner, column: safer_response_id, first: 0, second: 1}" in lines
    # What the message proposes works, word for word.
    (pair,) = load_pairs(copy_lines(source, lines[1:], "pair:", "column: safer")).pairs
    assert (pair.chosen, pair.swapped) == (BAD, True)
    one = {name: value for name, value in SAFE.items() if name != "safer_response_id"}
    assert load_pairs(write(tmp_path, one)).pairs[0].chosen == GOOD


def copy_lines(source: SourceConfig, lines: list[str], *wanted: str) -> SourceConfig:
    import yaml

    text = "\n".join(line.strip() for line in lines if any(word in line for word in wanted))
    return SourceConfig(source=source.source, **yaml.safe_load(text))


@pytest.mark.parametrize(
    ("columns", "proposed"),
    [
        (
            {"preference": [-2, 1, 2]},
            [
                "{type: strength, column: preference, range: [-2.0, 2.0], prefers: second}",
                "{type: strength, column: preference, range: [-2.0, 2.0], prefers: first}",
            ],
        ),
        (
            {"winner": ["left", "right", "tie"]},
            [
                "{type: winner, column: winner, first: left, second: right, tie: [tie]}",
                "{type: winner, column: winner, first: right, second: left, tie: [tie]}",
            ],
        ),
        (
            {"score_a": [1, 2, 3], "score_b": [3, 1, 2]},
            ["{type: scores, columns: [score_a, score_b], temperature: 1.0}"],
        ),
        ({"note": ["x", "y", "z"]}, ["{type: winner, column: ..., first: ..., second: ...}"]),
    ],
)
def test_a_guess_is_refused_with_the_candidates(
    columns: dict[str, list[Any]], proposed: list[str], tmp_path: Path
) -> None:
    rows = [
        {"prompt": "Q", "response_a": "one", "response_b": "two", **dict(zip(columns, values, strict=True))}
        for values in zip(*columns.values(), strict=True)
    ]
    with pytest.raises(DataError) as asked:
        load_pairs(write(tmp_path, *rows))
    lines = [line.strip() for line in str(asked.value).splitlines()]
    assert [line for line in lines if line.startswith("label:")][: len(proposed)] == [
        f"label: {label}" for label in proposed
    ]
    assert "pair: [response_a, response_b]" in lines


def test_responses_mapped_by_hand_are_not_taken_for_better_and_worse(tmp_path: Path) -> None:
    """The winner would be wrong wherever the second response won."""
    source = write(tmp_path, DATA_SETS["nvidia/HelpSteer3"])
    mapped = source.model_copy(update={"columns": {"chosen": "response1", "rejected": "response2"}})
    with pytest.raises(DataError, match=r"label: \{type: strength, column: overall_preference"):
        load_pairs(mapped)
    insisted = SourceConfig.model_validate({**mapped.model_dump(), "label": {"type": "first"}})
    assert load_pairs(insisted).pairs[0].chosen == [turn("assistant", BAD)]


def test_ratings_of_single_responses_are_no_pairs(tmp_path: Path) -> None:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    source = write(tmp_path, {"prompt": "Q", "response": GOOD, **dict.fromkeys(names, 3)})
    with pytest.raises(DataError, match=r"rate one response each, .* preference folder"):
        load_pairs(source)


def test_columns_with_a_fields_own_name_are_read_as_that_field(tmp_path: Path) -> None:
    """Though others are there by which a data set is known."""
    row = {
        **DATA_SETS["ShareGPT, as LLaMA-Factory has it"],
        "prompt": ASKED,
        "conversations": [{"from": "human", "value": "Something else?"}],
    }
    assert load_pairs(write(tmp_path, row)).pairs[0].prompt == ASKED
    both = {**DATA_SETS["nvidia/HelpSteer3"], "chosen": "the better one", "rejected": "the worse one"}
    pair = load_pairs(write(tmp_path, both)).pairs[0]
    assert read_text(pair.chosen) == "the better one"
    assert pair.soft_label == 1.0


def test_settings_of_the_user_are_never_changed(tmp_path: Path) -> None:
    row = DATA_SETS["nvidia/HelpSteer3"]
    raters = {
        "type": "raters",
        "column": "individual_preference",
        "field": "score",
        "range": [-3, 3],
        "prefers": "second",
    }
    source = SourceConfig.model_validate({"source": write(tmp_path, row).source, "label": raters})
    pair: Pair = load_pairs(source).pairs[0]
    assert pair.soft_label == 0.5  # one rater for each response
    assert understand_source(source).source.label == source.label
