"""Pairs carry the votes of their raters, share no text, and come out the same every time."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.demo.assets import fetch_human_ratings, load_lexicon
from orchestrator.demo.ratings import (
    LONGEST,
    MIN_SHARE,
    PROMPT,
    SHORTEST,
    DemoRows,
    RatedText,
    build_preference_rows,
    compute_vote_share,
    read_movie_reviews,
    write_rows,
)
from preferences.config import SourceConfig
from preferences.load import load_pairs

COUNTS = {"train": 400, "held_out": 320, "reviews": 384, "seed": 0}
votes = st.lists(st.integers(-4, 4), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def texts() -> list[RatedText]:
    return read_movie_reviews(fetch_human_ratings())


@pytest.fixture(scope="module")
def rows(texts: list[RatedText]) -> DemoRows:
    return build_preference_rows(texts)


def brute_force(one, other) -> float:
    votes = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(one, other)]
    return sum(votes) / len(votes)


def full_texts(row: dict) -> list[str]:
    opening = row["prompt"].removeprefix(PROMPT)
    return [opening + row[name] for name in ("chosen", "rejected", "completion") if name in row]


@settings(deadline=None, max_examples=100)
@given(votes, votes)
def test_vote_share_is_the_share_of_all_pairings(one, other) -> None:
    assert compute_vote_share(one, other) == pytest.approx(brute_force(one, other), abs=1e-12)
    assert compute_vote_share(one, other) + compute_vote_share(other, one) == pytest.approx(1.0)


def test_every_review_is_read_with_its_raters(texts) -> None:
    assert len(texts) == 10_603  # 10,605 lines, two of them twice
    assert {len(text.ratings) for text in texts} <= set(range(13, 31))
    assert {rating for text in texts for rating in text.ratings} == set(range(-4, 5))
    assert texts[2] == RatedText(
        "Effective but too tepid biopic", (-1, 0, -1, 0, -1, -1, -1, -1, 0, -2, 1, 1, -1, -1, -1)
    )


def test_no_text_stands_in_two_rows(rows) -> None:
    count = Counter(
        text.casefold() for row in rows.train + rows.eval + rows.reviews for text in full_texts(row)
    )
    assert len(count) == 2 * (COUNTS["train"] + COUNTS["held_out"]) + COUNTS["reviews"]
    assert max(count.values()) == 1


def test_soft_labels_are_the_raters_votes_and_at_least_the_stated_share(texts, rows) -> None:
    raters = {text.text: text.ratings for text in texts}
    for row in rows.train + rows.eval:
        chosen, rejected = (raters[text] for text in full_texts(row))
        assert row["soft_label"] == pytest.approx(brute_force(chosen, rejected), abs=1e-6)
        assert row["soft_label"] >= MIN_SHARE
        assert row["meta"]["chosen_rating"] == pytest.approx(sum(chosen) / len(chosen), abs=1e-4)
        assert row["meta"]["disagreement"] >= 0


def test_labels_spread_over_the_whole_range(rows) -> None:
    soft = [row["soft_label"] for row in rows.eval]
    assert sum(share < 0.8 for share in soft) > 80
    assert sum(share > 0.95 for share in soft) > 80


def test_texts_are_short_and_responses_continue_the_prompt(rows) -> None:
    for row in rows.train + rows.eval:
        for text, name in zip(full_texts(row), ("chosen", "rejected"), strict=True):
            assert SHORTEST <= len(text.split()) <= LONGEST
            assert row[name].startswith(" ")
        assert row["chosen"] != row["rejected"]


def test_prompt_is_the_longest_shared_opening() -> None:
    one = RatedText("This film is a joy", (3, 4))
    other = RatedText("This film is a bore", (-3, 3))
    built = build_preference_rows([one, other], train=1, held_out=0, reviews=0, seed=0)
    assert built.train == [
        {
            "prompt": "Movie review: This film is a",
            "chosen": " joy",
            "rejected": " bore",
            "soft_label": 0.875,
            "meta": {"chosen_rating": 3.5, "rejected_rating": 0.0, "disagreement": 1.75},
        }
    ]


def test_built_the_same_from_the_same_seed_only(texts, rows) -> None:
    assert build_preference_rows(texts, **COUNTS) == rows
    assert build_preference_rows(texts, **{**COUNTS, "seed": 1}) != rows


def test_held_out_pairs_do_not_depend_on_how_many_are_trained_on(texts, rows) -> None:
    fewer = build_preference_rows(texts, **{**COUNTS, "train": 8})
    assert fewer.eval == rows.eval
    assert fewer.train == rows.train[:8]


def test_more_than_there_is_is_refused(texts) -> None:
    with pytest.raises(ValueError, match="ask for fewer"):
        build_preference_rows(texts, train=5_000, held_out=0, reviews=0, seed=0)


def test_files_are_read_back_by_the_data_floor(rows, tmp_path: Path) -> None:
    paths = write_rows(rows, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.jsonl", "reviews.jsonl", "train.jsonl"]
    assert [
        json.loads(line) for line in paths["train"].read_text(encoding="utf-8").splitlines()
    ] == rows.train
    loaded = load_pairs(SourceConfig(source=str(paths["train"])))
    assert (loaded.swapped, sum(loaded.skipped.values())) == (0, 0)
    for pair, row in zip(loaded.pairs, rows.train, strict=True):
        assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt"], row["chosen"], row["rejected"])
        assert pair.soft_label == row["soft_label"]
    reviews = load_pairs(SourceConfig(source=str(paths["reviews"])), completions_only=True)
    assert [pair.chosen for pair in reviews.pairs] == [row["completion"] for row in rows.reviews]


def test_a_simple_lexicon_mostly_agrees_with_the_held_out_majority(rows) -> None:
    score = load_lexicon()
    margins = [score(chosen) - score(rejected) for chosen, rejected in map(full_texts, rows.eval)]
    agreement = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / len(margins)
    assert 0.6 < agreement < 0.8
