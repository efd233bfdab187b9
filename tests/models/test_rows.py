"""Layout of rows, by hand and against a brute-force mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import ModelError
from models.rows import PromptWithResponses, build_rows

GROUPS = [
    PromptWithResponses([1, 2, 3], [[4, 5, 6], [7, 8]]),
    PromptWithResponses([9], [[10], [11, 12, 13, 14]]),
]
ids = st.lists(st.integers(1, 50), min_size=1, max_size=6)
groups = st.lists(
    st.builds(PromptWithResponses, ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=4
)


def test_plain_rows_by_hand() -> None:
    rows = build_rows(GROUPS, shared=False, pad_id=0)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 7, 0], [9, 0, 0, 0, 0], [9, 11, 12, 13, 0]]
    assert rows.targets.tolist() == [4, 5, 6, 7, 8, 10, 11, 12, 13, 14]
    assert rows.predictors.tolist() == [2, 3, 4, 7, 8, 10, 15, 16, 17, 18]
    assert rows.sequences.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]
    assert rows.lengths.tolist() == [3, 2, 1, 4]
    assert rows.tokens == 14
    assert rows.padding == pytest.approx(6 / 20)


def test_shared_rows_by_hand() -> None:
    rows = build_rows(GROUPS, shared=True, pad_id=0)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 7], [9, 11, 12, 13, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 0, 0]]
    assert rows.segments.tolist() == [[0, 0, 0, 1, 1, 2], [0, 2, 2, 2, -1, -1]]
    assert rows.predictors.tolist() == [2, 3, 4, 2, 5, 6, 6, 7, 8, 9]
    assert rows.lengths.tolist() == [3, 2, 1, 4]
    assert rows.tokens == 10


@pytest.mark.parametrize("shared", [True, False])
def test_complements_are_read_and_not_scored(shared: bool) -> None:
    groups = [PromptWithResponses([1, 2], [[3, ~4, ~0, 5, ~6], [7]])]
    rows = build_rows(groups, shared=shared, pad_id=9)
    assert rows.input_ids[0, :6].tolist() == [1, 2, 3, 4, 0, 5]  # the last token is no input
    assert rows.targets.tolist() == [3, 5, 7]
    assert rows.input_ids.flatten()[rows.predictors].tolist() == [2, 0, 2]
    assert rows.lengths.tolist() == [2, 1]


@settings(max_examples=30, deadline=None)
@given(groups)
def test_both_layouts_score_the_same_tokens(some: list[PromptWithResponses]) -> None:
    shared, plain = (build_rows(some, shared=s, pad_id=0) for s in (True, False))
    for name in ("targets", "sequences", "lengths"):
        assert torch.equal(getattr(shared, name), getattr(plain, name))
    # A token is predicted by the token before it, at the position before it, in either layout.
    for rows in (shared, plain):
        places = rows.position_ids.flatten()[rows.predictors]
        expected = [len(g.prompt) - 1 + i for g in some for r in g.responses for i in range(len(r))]
        assert places.tolist() == expected
        before = rows.input_ids.flatten()[rows.predictors].tolist()
        assert before == [
            t for g in some for r in g.responses for t in [*g.prompt, *r][len(g.prompt) - 1 : -1]
        ]


@settings(max_examples=30, deadline=None)
@given(groups, st.booleans())
def test_the_mask_shows_a_response_the_prompt_and_itself(
    some: list[PromptWithResponses], shared: bool
) -> None:
    rows = build_rows(some, shared=shared, pad_id=0)
    mask, width = rows.build_mask()[:, 0], rows.input_ids.shape[1]
    real = 0
    for row, segments in enumerate(rows.segments.tolist()):
        for query in range(width):
            visible = [k for k in range(query + 1) if segments[k] in (0, segments[query])]
            assert mask[row, query].nonzero().flatten().tolist() == visible
            real += len(visible) if segments[query] >= 0 else 0
    assert rows.attended_pairs == real


def test_no_groups_give_one_row_of_padding() -> None:
    rows = build_rows([], shared=True, pad_id=7)
    assert rows.input_ids.tolist() == [[7]]
    assert rows.response_tokens == len(rows.lengths) == rows.tokens == 0
    assert rows.padding == 1.0


@pytest.mark.parametrize("shared", [True, False])
def test_rows_that_cannot_be_scored_are_refused(shared: bool) -> None:
    with pytest.raises(ModelError, match=r"prompt 1 .* no tokens.*BOS"):
        build_rows([GROUPS[0], PromptWithResponses([], [[1]])], shared=shared, pad_id=0)
    with pytest.raises(ModelError, match=r"prompt 0 .* without a token to score.*end-of-turn"):
        build_rows([PromptWithResponses([1], [[2], []])], shared=shared, pad_id=0)
    with pytest.raises(ModelError, match=r"prompt 0 .* without a token to score"):
        build_rows([PromptWithResponses([1], [[2], [~3, ~4]])], shared=shared, pad_id=0)
