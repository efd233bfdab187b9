"""Micro-batches of a small split with weights, from a loader whose reference needs no model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.references.client import ReferenceArrays
from orchestrator.worker.batches import BatchLoader
from orchestrator.worker.step import MicroBatch
from preferences.split import TokenizedSplit
from preferences.tokens.tables import RaggedArray, TokenTable

PAIRS = 7
WEIGHTS = np.array([2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 2.0])


def build_split(weights: np.ndarray | None = None) -> TokenizedSplit:
    """`PAIRS` pairs of random tokens, most with a soft label."""
    draw = np.random.default_rng(0)

    def column(low: int, high: int) -> RaggedArray:
        return RaggedArray.from_rows(
            [draw.integers(0, 256, size=draw.integers(low, high)).tolist() for _ in range(PAIRS)]
        )

    table = TokenTable(column(3, 9), column(2, 8), column(2, 8))
    places = tuple(f"f:{i}" for i in range(PAIRS))
    labels = np.array([0.9, 0.6, 0.8, 1.0, 0.5, 0.7, 0.55])
    return TokenizedSplit(table, {}, labels, places, True, True, weights=weights)


def take_rows(split: TokenizedSplit, rows: np.ndarray) -> TokenizedSplit:
    """The split of these rows alone."""
    weights = None if split.weights is None else split.weights[rows]
    return replace(
        split, policy=split.policy.take(rows), soft_labels=split.soft_labels[rows], weights=weights
    )


class Client:
    """A reference whose scores follow from the texts."""

    stall_seconds, scored_by_workers = 0.0, ()

    def __init__(self, split: TokenizedSplit) -> None:
        self._split, self._rows = split, np.zeros(0, dtype=np.int64)

    def request_scores(self, batch_id: Any, rows: np.ndarray) -> None:
        self._rows = rows

    def collect_scores(self, batch_id: Any) -> dict[str, ReferenceArrays]:
        pairs = [self._split.policy[int(row)] for row in self._rows]
        sides = [[p.chosen for p in pairs], [p.rejected for p in pairs]]
        columns = [np.array([-float(np.sum(ids)) / 40 for ids in side]) for side in sides]
        columns += [np.array([float(len(ids)) for ids in side]) for side in sides]
        columns += [np.full(len(pairs), 0.5) for _ in sides]
        return {"base": ReferenceArrays(*columns)}


def load_batches(
    split: TokenizedSplit, indices: np.ndarray, *, rank: int = 0, ranks: int = 1, budget: int = 4096
) -> list[MicroBatch]:
    """A rank's micro-batches of the rows, as workers load them, with scores of one reference, `base`."""
    loader = BatchLoader(
        split,
        reference_names=["base"],
        client=Client(split),  # type: ignore[arg-type]
        score_initial_policy=lambda rows: pytest.fail("nothing is missing"),
        on_any_rank=bool,
        rank=rank,
        world_size=ranks,
        tokens_per_microbatch=budget,
        shared_rows=True,
        pad_id=0,
        device=torch.device("cpu"),
        count_flops=lambda rows: 0.0,
    )
    loader.request_scores(("train", 0), indices)
    return list(loader.collect_batches(("train", 0), indices)[0])
