"""Turn the row indices of a step into the micro-batches of one rank, reference scores included."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import numpy as np
import torch

from losses.scores import ReferenceScores
from models.logprobs import SequenceScores
from models.rows import PromptWithResponses, Rows, build_rows
from orchestrator.references.client import ReferenceArrays, ReferenceClient
from orchestrator.worker.metrics import StepCost
from orchestrator.worker.step import MicroBatch
from preferences.batches import split_over_ranks
from preferences.split import TokenizedSplit

BatchId = tuple[str, int]
"""(split, step): identifies a batch between the request for its scores and their use."""


class BatchLoader:
    """Loads one rank's share of every batch of a split.

    Args:
        split: the rows.
        reference_names: of all references, the primary first.
        client: requests scores of all references; those scored in process answer from their store alone.
        score_initial_policy: rows -> scores of the initial policy, for rows that those stores lack.
        on_any_rank: returns whether a flag is set on any of the ranks that must run a forward pass when this
            one does.
        rank, world_size: which share of a batch is this rank's.
        tokens_per_microbatch: largest number of tokens in a micro-batch.
        shared_rows: whether the policy computes a prompt once for both responses.
        pad_id: token id that pads rows.
        device: the device that micro-batches are put on.
        count_flops: rows -> FLOPs of a training step over them.
    """

    def __init__(
        self,
        split: TokenizedSplit,
        *,
        reference_names: Sequence[str],
        client: ReferenceClient,
        score_initial_policy: Callable[[Rows], SequenceScores],
        on_any_rank: Callable[[bool], bool],
        rank: int,
        world_size: int,
        tokens_per_microbatch: int,
        shared_rows: bool,
        pad_id: int,
        device: torch.device,
        count_flops: Callable[[Rows], float],
    ) -> None:
        self.split = split
        self._reference_names = tuple(reference_names)
        self.client = client
        self._score_initial_policy, self._on_any_rank = score_initial_policy, on_any_rank
        self._rank, self._world_size = rank, world_size
        self._budget = tokens_per_microbatch
        self._shared_rows, self._pad_id, self._device = shared_rows, pad_id, device
        self._count_flops = count_flops
        # A pair's tokens: its prompt once with both responses after it, or two rows as long as the longer.
        has_two_rows = split.has_pairs and not shared_rows
        self._lengths = 2 * split.policy.sequence_lengths if has_two_rows else split.policy.pair_lengths

    def request_scores(self, batch_id: BatchId, indices: np.ndarray) -> None:
        """Request all references' scores of this rank's share of a global batch; does not block."""
        share = self._select_share(indices)
        rows = np.concatenate(share) if share else np.zeros(0, dtype=np.int64)
        self.client.request_scores(batch_id, rows)

    def collect_batches(
        self, batch_id: BatchId, indices: np.ndarray
    ) -> tuple[Iterator[MicroBatch], StepCost]:
        """Wait for the scores requested for a batch.

        Returns:
            This rank's micro-batches, each built only when it is iterated, so that a whole split is never on
            the device at once; and the seconds spent waiting as a cost.
        """
        stall_before = self.client.stall_seconds
        scores = self.client.collect_scores(batch_id)
        waiting_cost = StepCost(reference_stall=self.client.stall_seconds - stall_before)
        return self._iterate_microbatches(scores, indices), waiting_cost

    def close(self) -> None:
        """Wait until the scores computed in process are stored."""
        self.client.close()

    def _iterate_microbatches(
        self, scores: dict[str, ReferenceArrays], indices: np.ndarray
    ) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches; `scores` has their rows in the same order."""
        slot_of_row = {int(row): slot for slot, row in enumerate(indices)}
        weights = None if self.split.weights is None else _scale_to_mean_one(self.split.weights[indices])
        start = 0
        for rows in self._select_share(indices):
            stop = start + len(rows)
            slots = [slot_of_row[int(row)] for row in rows]
            yield self._build_microbatch(
                rows,
                torch.tensor(slots, dtype=torch.long, device=self._device),
                {name: _slice_arrays(arrays, start, stop) for name, arrays in scores.items()},
                weights=None if weights is None else torch.as_tensor(weights[slots], device=self._device),
            )
            start = stop

    def collect_primary_entropies(self, indices: np.ndarray) -> torch.Tensor:
        """Request and wait for the primary reference's mean entropy of both responses of each row.

        Args:
            indices: rows of the split, of this rank's share or not.

        Returns:
            (len(indices),) entropies.
        """
        batch_id, primary = ("sample", 0), self._reference_names[0]
        self.client.request_scores(batch_id, indices, names=[primary])
        arrays = self._fill_missing_scores(self.client.collect_scores(batch_id), indices)[primary]
        return torch.as_tensor((arrays.chosen_entropy + arrays.rejected_entropy) / 2)

    def _select_share(self, indices: np.ndarray) -> list[np.ndarray]:
        """Return this rank's rows of a global batch, one array per micro-batch."""
        return split_over_ranks(
            indices, self._lengths, world_size=self._world_size, tokens_per_microbatch=self._budget
        )[self._rank]

    def _build_microbatch(
        self,
        indices: np.ndarray,
        slots: torch.Tensor,
        scores: dict[str, ReferenceArrays],
        *,
        weights: torch.Tensor | None,
    ) -> MicroBatch:
        rows, complete = self._build_rows(indices), self._fill_missing_scores(scores, indices)
        return MicroBatch(
            rows=rows,
            slots=slots,
            soft_labels=torch.as_tensor(self.split.soft_labels[indices], device=self._device),
            references=tuple(_move_to_device(complete[name], self._device) for name in self._reference_names),
            paired=self.split.has_pairs,
            flops=self._count_flops(rows),
            weights=weights,
        )

    def _fill_missing_scores(
        self, scores: dict[str, ReferenceArrays], indices: np.ndarray
    ) -> dict[str, ReferenceArrays]:
        """Compute the scores that in-process references lack, store them for later, and return all scores."""
        position_of_row = {int(row): position for position, row in enumerate(indices)}
        for name in self._reference_names:
            if name not in scores or name not in self.client.scored_by_workers:
                continue
            arrays = scores[name]
            for rows in self._split_rows(indices):
                missing = np.array(
                    [row for row in rows if arrays.missing[position_of_row[int(row)]]], dtype=np.int64
                )
                if not self._on_any_rank(len(missing) > 0):
                    continue
                # A forward pass may be a collective: a rank that misses nothing runs one over no rows.
                sequence_scores = self._score_initial_policy(self._build_rows(missing))
                if not len(missing):
                    continue
                computed = _to_arrays(sequence_scores, paired=self.split.has_pairs)
                self.client.store_scores(name, missing, computed)
                positions = [position_of_row[int(row)] for row in missing]
                for column, values in zip(_list_columns(arrays), _list_columns(computed), strict=True):
                    column[positions] = values
        return scores

    def _split_rows(self, indices: np.ndarray) -> list[np.ndarray]:
        """Split rows into micro-batches; no rows give one empty micro-batch, so that ranks stay in step."""
        if not len(indices):
            return [indices]
        return split_over_ranks(indices, self._lengths, world_size=1, tokens_per_microbatch=self._budget)[0]

    def _build_rows(self, indices: np.ndarray) -> Rows:
        pairs = [self.split.policy[int(index)] for index in indices]
        groups = [
            PromptWithResponses(p.prompt, [p.chosen] if p.rejected is None else [p.chosen, p.rejected])
            for p in pairs
        ]
        return build_rows(groups, shared=self._shared_rows, pad_id=self._pad_id).to(self._device)


def _scale_to_mean_one(weights: np.ndarray) -> np.ndarray:
    """Scale the weights (B,) of a global batch to a mean of 1; if all are 0 they stay 0."""
    total = weights.sum()
    return weights * (len(weights) / total) if total > 0 else np.zeros_like(weights)


def _slice_arrays(arrays: ReferenceArrays, start: int, stop: int) -> ReferenceArrays:
    return ReferenceArrays(*(column[start:stop] for column in _list_columns(arrays)))


def _move_to_device(arrays: ReferenceArrays, device: torch.device) -> ReferenceScores:
    return ReferenceScores(*(torch.as_tensor(column, device=device) for column in _list_columns(arrays)))


def _list_columns(arrays: ReferenceArrays) -> tuple[np.ndarray, ...]:
    return tuple(getattr(arrays, field.name) for field in fields(arrays))


def _to_arrays(scores: SequenceScores, *, paired: bool) -> ReferenceArrays:
    """Convert scores of sequences in row order to one row per pair; zeros where there is no rejected one."""
    assert scores.entropy is not None
    fields = torch.stack([f.double() for f in (scores.logps, scores.lengths, scores.entropy)])
    columns = list(fields.cpu().numpy())  # one wait for the device
    if not paired:
        return ReferenceArrays(*(half for column in columns for half in (column, np.zeros_like(column))))
    return ReferenceArrays(*(column[side::2].copy() for column in columns for side in (0, 1)))
