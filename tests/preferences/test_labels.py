"""Labels from strengths, scores, winners and raters, by hand and by their properties."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import expit

from preferences.config import DataConfig, SourceConfig
from preferences.pairs import BadRow
from preferences.reading.rows import build_pairs

STRENGTH = {"type": "strength", "column": "s", "range": [-3, 3], "prefers": "second"}
SCORES = {"type": "scores", "columns": ["one", "two"], "temperature": 2.0}
WINNER = {"type": "winner", "column": "w", "first": "A", "second": ["B", "b"], "tie": ["tie", None]}
RATERS = {"type": "raters", "column": "r", "field": "score", "range": [1, 5], "prefers": "first"}


def read(label: dict[str, Any], weight: str | None = None, **row: Any) -> Any:
    source = SourceConfig.model_validate(
        {"source": "t", "pair": ["x", "y"], "label": label, "weight": weight}
    )
    (pair,) = build_pairs(
        {"prompt": "Q", "x": "first", "y": "second", **row}, "t:1", source, completions_only=False
    )
    return pair


def share_of_first(label: dict[str, Any], **row: Any) -> float:
    pair = read(label, **row)
    assert 0.5 <= pair.soft_label <= 1  # the majority's choice is chosen
    return float(pair.soft_label if pair.chosen == "first" else 1 - pair.soft_label)


@pytest.mark.parametrize(
    ("label", "row", "share"),
    [
        (STRENGTH, {"s": -3}, 1.0),
        (STRENGTH, {"s": 0}, 0.5),
        (STRENGTH, {"s": "2"}, 1 / 6),  # as a CSV file has it
        ({**STRENGTH, "prefers": "first"}, {"s": 2}, 5 / 6),
        (SCORES, {"one": 3.0, "two": 1.0}, 1 / (1 + math.exp(-1))),
        (SCORES, {"one": 1e6, "two": -1e6}, 1.0),
        ({**SCORES, "columns": ["x_info.score", "marks.1"]}, {"x_info": {"score": 4}, "marks": [0, 4]}, 0.5),
        (WINNER, {"w": "A"}, 1.0),
        (WINNER, {"w": "b"}, 0.0),
        (WINNER, {"w": None}, 0.5),
        ({**WINNER, "first": 0, "second": 1, "tie": []}, {"w": "1"}, 0.0),
        (RATERS, {"r": [{"score": 5}, {"score": 4}, {"score": 3}, {"score": 1}]}, 2.5 / 4),
        ({**RATERS, "field": None}, {"r": [1, 2, 5]}, 1 / 3),
        ({"type": "first"}, {}, 1.0),
    ],
)
def test_the_share_of_the_first(label: dict[str, Any], row: dict[str, Any], share: float) -> None:
    assert share_of_first(label, **row) == pytest.approx(share, abs=1e-12)


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_a_strength_is_linear_and_mirrors(one: float, other: float) -> None:
    shares = [share_of_first(STRENGTH, s=value) for value in (one, other)]
    assert shares[0] - shares[1] == pytest.approx((other - one) / 6, abs=1e-9)
    mirrored = share_of_first({**STRENGTH, "prefers": "first"}, s=one)
    assert mirrored + shares[0] == pytest.approx(1, abs=1e-12)


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(0.1, 10))
def test_scores_follow_bradley_and_terry(one: float, two: float, temperature: float) -> None:
    share = share_of_first({**SCORES, "temperature": temperature}, one=one, two=two)
    assert share == pytest.approx(expit((one - two) / temperature), abs=1e-12)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9))
def test_raters_are_counted(numbers: list[int]) -> None:
    wins = sum(number > 3 for number in numbers) + sum(number == 3 for number in numbers) / 2
    share = share_of_first({**RATERS, "field": None}, r=numbers)
    assert share == pytest.approx(wins / len(numbers), abs=1e-12)


@pytest.mark.parametrize(
    ("label", "row", "message"),
    [
        (STRENGTH, {"s": 4}, r"s must be a number from -3 to 3 \(data.label.range\), got 4"),
        (STRENGTH, {"s": True}, "s must be a number from -3 to 3"),
        (STRENGTH, {"t": 1}, "data.label reads 's', which the row does not have; its columns are"),
        (SCORES, {"one": 1, "two": "x"}, r"two \(data.label\) must be a number, got 'x'"),
        (WINNER, {"w": "C"}, "w is 'C', and data.label knows 'A', 'B', 'b', 'tie', None; add it to"),
        (RATERS, {"r": []}, r"r\.score must be a list with a number of each rater, got \[\]"),
        (RATERS, {"r": [{"mark": 1}]}, r"data.label reads 'r\.score', which the row does not have"),
        (RATERS, {"r": [{"score": "good"}]}, r"r\.score must be a number from 1 to 5 .*, got 'good'"),
        (STRENGTH, {"s": 1, "soft_label": 0.7}, "the row has soft_label beside what data.label reads"),
    ],
)
def test_a_bad_label_is_refused_with_the_row(
    label: dict[str, Any], row: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRow, match=f"t:1: {message}"):
        read(label, **row)


def test_a_pair_without_a_label_is_refused() -> None:
    source = SourceConfig(source="t", pair=("x", "y"))
    row = {"prompt": "Q", "x": "first", "y": "second"}
    with pytest.raises(BadRow, match="neither of x and y is the better one by name"):
        build_pairs(row, "t:1", source, completions_only=False)
    (pair,) = build_pairs({**row, "soft_label": 0.2}, "t:1", source, completions_only=False)
    assert (pair.chosen, pair.soft_label) == ("second", 0.8)


def test_weights() -> None:
    assert read(STRENGTH, s=1, weight="n", n="2.5").weight == 2.5
    assert read(STRENGTH, s=1).weight == 1.0
    for value in (-1, "many", None, float("nan")):
        with pytest.raises(BadRow, match=r"n \(data.weight\) must be a number >= 0"):
            read(STRENGTH, s=1, weight="n", n=value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": STRENGTH, "columns": {"soft_label": "p"}}, "label and columns.soft_label both give the"),
        ({"pair": ["x", "y"], "columns": {"chosen": "x"}}, "pair and columns.chosen both name a response"),
        ({"pair": ["x", "x"]}, "pair names 'x' twice"),
        ({"label": {**STRENGTH, "range": [3, -3]}}, "low below high"),
        ({"label": {**WINNER, "tie": "A"}}, "'A' stands twice among first, second and tie"),
        ({"label": {**SCORES, "temperature": 0}}, "greater than 0"),
        ({"label": {"type": "votes"}}, "does not match any of the expected tags"),
        ({"train": [{"source": "a", "share": 1}, "b"]}, "b has neither share nor count"),
        ({"train": [{"source": "a", "share": 1, "count": 2}]}, "a has a share and a count"),
        ({"train": [{"source": "a", "name": "x"}, {"source": "b", "name": "x"}]}, "two sources of name 'x'"),
        ({"eval": {"x": {"source": "a", "share": 1}}}, "eval.x has a share"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"train": "t.jsonl", **settings})


def test_sources_inherit_what_they_leave_out() -> None:
    config = DataConfig.model_validate(
        {
            "train": ["a/b.jsonl", {"source": "c/b.jsonl", "columns": {"prompt": "q"}, "split": "test"}],
            "eval": {"safety": "s.jsonl"},
            "columns": {"prompt": "question"},
            "weight": "w",
        }
    )
    first, second = config.train_sources
    assert (first.name, first.columns, first.split, first.weight) == (
        "b",
        {"prompt": "question"},
        "train",
        "w",
    )
    assert (second.name, second.columns, second.split, second.weight) == ("b-2", {"prompt": "q"}, "test", "w")
    assert [(s.name, s.source) for s in config.eval_sources] == [("safety", "s.jsonl")]
    assert config.list_sources() == {
        "data.train.0.source": "a/b.jsonl",
        "data.train.1.source": "c/b.jsonl",
        "data.eval.safety.source": "s.jsonl",
    }
