"""The mean over the global batch is the same however the pairs are split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.config import LossError
from losses.reduction import reduce_to_global_mean


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=12), data=st.data())
def test_any_split_over_ranks_and_micro_batches_gives_the_global_mean(
    values: list[float], data: st.DataObject
) -> None:
    ranks = data.draw(st.integers(1, 4))
    parts = ranks * data.draw(st.integers(1, 3))
    owner = torch.tensor([data.draw(st.integers(0, parts - 1)) for _ in values])
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    losses = weight * torch.tensor(values, dtype=torch.float64)

    per_rank = [torch.zeros((), dtype=torch.float64) for _ in range(ranks)]
    for part in range(parts):
        share = losses[owner == part]
        per_rank[part % ranks] = per_rank[part % ranks] + reduce_to_global_mean(
            share, global_count=len(values), world_size=ranks
        )
    averaged_over_ranks = torch.stack(per_rank).mean()

    torch.testing.assert_close(averaged_over_ranks, losses.mean(), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(averaged_over_ranks, weight)
    expected = torch.tensor(sum(values) / len(values), dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("count", "world"), [(0, 1), (4, 0), (-1, 2)])
def test_counts_must_be_positive(count: int, world: int) -> None:
    with pytest.raises(LossError, match="count the pairs of all ranks"):
        reduce_to_global_mean(torch.zeros(0), global_count=count, world_size=world)
