import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preferences.batches import BatchPlan, split_over_ranks

modest = settings(deadline=None, max_examples=60)


@modest
@given(count=st.integers(1, 200), size=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 5))
def test_an_epoch_holds_every_pair_once(count, size, seed, epoch):
    plan = BatchPlan(count, size, seed)
    steps = [plan.get_step_indices(epoch, step) for step in range(plan.steps_per_epoch)]
    assert sorted(np.concatenate(steps).tolist()) == list(range(count))
    assert [len(step) for step in steps[:-1]] == [size] * (plan.steps_per_epoch - 1)
    assert 1 <= len(steps[-1]) <= size


def test_a_step_depends_on_seed_epoch_and_step_alone():
    plan, again = BatchPlan(50, 8, 3), BatchPlan(50, 8, 3)
    again.get_step_indices(4, 1)  # another place in the run: no state is carried
    assert plan.get_step_indices(2, 5).tolist() == again.get_step_indices(2, 5).tolist()
    assert plan.get_step_indices(0, 0).tolist() != plan.get_step_indices(1, 0).tolist()
    assert plan.get_step_indices(0, 0).tolist() != BatchPlan(50, 8, 4).get_step_indices(0, 0).tolist()


def test_the_order_stays_the_same_over_releases():
    """A run resumed under a newer numpy or a newer release must take the steps it would have taken."""
    order = BatchPlan(1000, 1000, 7).get_step_indices(3, 0)
    assert order[:8].tolist() == [838, 302, 63, 90, 105, 548, 639, 76]
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "160278cb88d645cb"


def test_a_plan_cannot_be_changed_through_what_it_returns():
    plan = BatchPlan(10, 4, 0)
    before = plan.get_step_indices(0, 0).tolist()
    plan.get_step_indices(0, 0)[:] = -1
    assert plan.get_step_indices(0, 0).tolist() == before


def test_a_step_outside_the_epoch_is_refused():
    with pytest.raises(IndexError, match="step must be from 0 to 2, got 3"):
        BatchPlan(10, 4, 0).get_step_indices(0, 3)
    with pytest.raises(ValueError, match="pairs_per_step must be >= 1, got 0"):
        BatchPlan(10, 0, 0)


@modest
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    world_size=st.integers(1, 6),
    budget=st.integers(1, 900),
)
def test_a_step_is_shared_out(lengths, world_size, budget):
    sizes = np.array(lengths)
    indices = np.random.default_rng(0).permutation(len(lengths))
    ranks = split_over_ranks(indices, sizes, world_size=world_size, tokens_per_microbatch=budget)

    assert len(ranks) == world_size
    assert len({len(rank) for rank in ranks}) == 1  # collectives in a forward pass need equal counts
    everything = np.concatenate([batch for rank in ranks for batch in rank])
    assert sorted(everything.tolist()) == sorted(indices.tolist())
    for batch in (batch for rank in ranks for batch in rank):
        assert len(batch) <= 1 or len(batch) * sizes[batch].max() <= budget
    places = sum(len(rank) for rank in ranks)
    empty = sum(not len(batch) for rank in ranks for batch in rank)
    assert empty == max(0, places - len(lengths))
    again = split_over_ranks(np.sort(indices), sizes, world_size=world_size, tokens_per_microbatch=budget)
    assert [[b.tolist() for b in r] for r in again] == [[b.tolist() for b in r] for r in ranks]


@modest
@given(lengths=st.lists(st.integers(50, 1000), min_size=16, max_size=64), world_size=st.integers(2, 4))
def test_ranks_carry_similar_sums(lengths, world_size):
    sizes = np.array(lengths)
    ranks = split_over_ranks(np.arange(len(sizes)), sizes, world_size=world_size, tokens_per_microbatch=4096)
    loads = [sum(len(batch) * int(sizes[batch].max()) for batch in rank) for rank in ranks]
    largest = max(len(batch) * int(sizes[batch].max()) for rank in ranks for batch in rank)
    assert max(loads) - min(loads) <= largest


def test_equal_pairs_are_dealt_evenly():
    ranks = split_over_ranks(np.arange(64), np.full(64, 10), world_size=3, tokens_per_microbatch=8000)
    assert sorted(len(batch) for rank in ranks for batch in rank) == [20, 22, 22]


def test_similar_lengths_go_together():
    lengths = np.array([100, 10, 99, 11, 98, 12])
    [batches] = split_over_ranks(np.arange(6), lengths, world_size=1, tokens_per_microbatch=300)
    assert [sorted(batch.tolist()) for batch in batches] == [[0, 2, 4], [1, 3, 5]]


def test_a_pair_over_the_budget_goes_alone():
    [batches] = split_over_ranks(
        np.arange(3), np.array([500, 10, 10]), world_size=1, tokens_per_microbatch=100
    )
    assert [batch.tolist() for batch in batches] == [[0], [1, 2]]


def test_fewer_pairs_than_ranks_leave_empty_micro_batches():
    ranks = split_over_ranks(np.array([7]), np.full(8, 5), world_size=3, tokens_per_microbatch=100)
    assert sorted(len(batch) for rank in ranks for batch in rank) == [0, 0, 1]
    assert all(batch.dtype == np.int64 for rank in ranks for batch in rank)


def test_lengths_are_looked_up_by_index():
    lengths = np.array([1, 1, 1, 90, 90])
    [batches] = split_over_ranks(np.array([3, 4, 0]), lengths, world_size=1, tokens_per_microbatch=100)
    assert [sorted(batch.tolist()) for batch in batches] == [[3], [4], [0]]
