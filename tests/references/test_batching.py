"""Cutting and grouping, without Ray or a model."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.references.batching import WaitingGroups, split_into_batches
from orchestrator.references.messages import PromptGroup, ScoreRequest


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
@settings(deadline=None, max_examples=100)
def test_cut_keeps_every_row_within_the_padded_budget(lengths, budget):
    batches = split_into_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    longest_first = [lengths[i] for batch in batches for i in batch]
    assert longest_first == sorted(lengths, reverse=True)


arrays = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(lambda ids: np.array(ids, np.int32))


@given(st.lists(st.tuples(arrays, st.lists(arrays, min_size=1, max_size=3)), max_size=5))
@settings(deadline=None, max_examples=100)
def test_requests_unpack_to_what_was_packed(content):
    groups = [
        PromptGroup(p, rs, [bytes([i, j]) * 8 for j in range(len(rs))]) for i, (p, rs) in enumerate(content)
    ]
    unpacked = ScoreRequest.pack(groups).unpack()
    assert len(unpacked) == len(groups)
    for before, after in zip(groups, unpacked, strict=True):
        assert before.prompt.tolist() == after.prompt.tolist()
        assert [r.tolist() for r in before.responses] == [r.tolist() for r in after.responses]
        assert before.keys == after.keys


def ids(count: int, value: int = 0) -> np.ndarray:
    return np.full(count, value, np.int32)


def test_responses_of_one_prompt_wait_together_whoever_asks():
    waiting = WaitingGroups(budget=100)
    waiting.add(ids(10, 1), ids(5), b"a")
    waiting.add(ids(10, 2), ids(5), b"b")
    waiting.add(ids(10, 1), ids(6), b"c")
    groups = waiting.drain(1000)
    assert [group.keys for group in groups] == [[b"a", b"c"], [b"b"]]
    assert [group.tokens for group in groups] == [21, 15]
    assert len(waiting) == 0


def test_a_group_does_not_outgrow_the_budget():
    waiting = WaitingGroups(budget=20)
    for name in (b"a", b"b", b"c"):
        waiting.add(ids(10), ids(5), name)
    assert [group.keys for group in waiting.drain(1000)] == [[b"a", b"b"], [b"c"]]


def test_drain_takes_the_oldest_and_at_least_one():
    waiting = WaitingGroups(budget=100)
    for number in range(3):
        waiting.add(ids(10, number), ids(5), bytes([number]))
    assert [group.keys for group in waiting.drain(1)] == [[b"\0"]]
    assert [group.keys for group in waiting.drain(16)] == [[b"\1"], [b"\2"]]
    waiting.add(ids(10, 2), ids(5), b"late")
    assert [group.keys for group in waiting.drain(1)] == [[b"late"]]
