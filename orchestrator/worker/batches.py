"""From the plan of a step to the micro-batches of one rank, reference scores included."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import numpy as np
import torch

from losses.scores import ReferenceScores
from models.logprobs import SequenceScores
from models.rows import Prompted, Rows, build_rows
from orchestrator.references.client import ReferenceArrays, ReferenceClient
from orchestrator.worker.metrics import StepCost
from orchestrator.worker.step import MicroBatch
from preferences.batches import split_over_ranks
from preferences.split import TokenizedSplit

BatchTicket = tuple[str, int]
"""(split, step): names a batch between asking for its scores and using them."""


class BatchLoader:
    """One rank's share of every batch of a part.

    Args:
        part: the rows.
        order: all reference names, the primary first.
        client: asks all references; those scored in process answer from their store alone.
        score_start: rows -> scores of the policy's own start, for what those stores miss.
        on_any_rank: whether a flag is set on any rank that must run a forward pass when this one does.
        shared_rows: whether the policy computes a prompt once for both responses.
    """

    def __init__(
        self,
        split: TokenizedSplit,
        *,
        order: Sequence[str],
        client: ReferenceClient,
        score_start: Callable[[Rows], SequenceScores],
        on_any_rank: Callable[[bool], bool],
        rank: int,
        world_size: int,
        tokens_per_microbatch: int,
        shared_rows: bool,
        pad_id: int,
        device: torch.device,
        flops: Callable[[Rows], float],
    ) -> None:
        self.split = split
        self._order = tuple(order)
        self.client = client
        self._score_start, self._on_any_rank = score_start, on_any_rank
        self._rank, self._world_size = rank, world_size
        self._budget = tokens_per_microbatch
        self._shared_rows, self._pad_id, self._device = shared_rows, pad_id, device
        self._flops = flops
        # What a pair costs: its prompt once with both responses behind it, or two rows of its longer side.
        apart = split.has_pairs and not shared_rows
        self._lengths = 2 * split.policy.sequence_lengths if apart else split.policy.pair_lengths

    def request_scores(self, ticket: BatchTicket, indices: np.ndarray) -> None:
        """Ask every served reference for this rank's share of a global batch; does not block."""
        mine = self._select_share(indices)
        self.client.request_scores(ticket, np.concatenate(mine) if mine else np.zeros(0, dtype=np.int64))

    def collect_batches(
        self, ticket: BatchTicket, indices: np.ndarray
    ) -> tuple[Iterator[MicroBatch], StepCost]:
        """This rank's micro-batches of a batch asked for before, and what waiting for its scores cost.

        Each is laid out when it is taken, so that a whole split never lies on the device.
        """
        stalled = self.client.stall_seconds
        scores = self.client.collect_scores(ticket)
        waited = StepCost(reference_stall=self.client.stall_seconds - stalled)
        return self._iterate_microbatches(scores, indices), waited

    def close(self) -> None:
        """Wait until the scores made in process are stored."""
        self.client.close()

    def _iterate_microbatches(
        self, scores: dict[str, ReferenceArrays], indices: np.ndarray
    ) -> Iterator[MicroBatch]:
        place = {int(row): slot for slot, row in enumerate(indices)}
        start = 0
        for rows in self._select_share(indices):
            stop = start + len(rows)
            slots = torch.tensor([place[int(row)] for row in rows], dtype=torch.long, device=self._device)
            yield self._build_microbatch(
                rows, slots, {n: _slice_arrays(a, start, stop) for n, a in scores.items()}
            )
            start = stop

    def read_primary_entropies(self, indices: np.ndarray) -> torch.Tensor:
        """(len(indices),) mean entropy of both responses under the primary reference, of any rank's rows."""
        ticket = ("sample", 0)
        self.client.request_scores(ticket, indices, names=self._order[:1])
        arrays = self._fill_missing_scores(self.client.collect_scores(ticket), indices)[self._order[0]]
        return torch.as_tensor((arrays.chosen_entropy + arrays.rejected_entropy) / 2)

    def _select_share(self, indices: np.ndarray) -> list[np.ndarray]:
        return split_over_ranks(
            indices, self._lengths, world_size=self._world_size, tokens_per_microbatch=self._budget
        )[self._rank]

    def _build_microbatch(
        self, indices: np.ndarray, slots: torch.Tensor, scores: dict[str, ReferenceArrays]
    ) -> MicroBatch:
        rows, complete = self._build_rows(indices), self._fill_missing_scores(scores, indices)
        return MicroBatch(
            rows=rows,
            slots=slots,
            soft_labels=torch.as_tensor(self.split.soft_labels[indices], device=self._device),
            references=tuple(_move_to_device(complete[name], self._device) for name in self._order),
            paired=self.split.has_pairs,
            flops=self._flops(rows),
        )

    def _fill_missing_scores(
        self, scores: dict[str, ReferenceArrays], indices: np.ndarray
    ) -> dict[str, ReferenceArrays]:
        """The scores with what in-process references miss computed here, and saved for the next time."""
        place = {int(row): at for at, row in enumerate(indices)}
        for name in (name for name in self._order if name in scores and name in self.client.in_process):
            arrays = scores[name]
            for rows in self._split_rows(indices):
                part = np.array([row for row in rows if arrays.missing[place[int(row)]]], dtype=np.int64)
                if not self._on_any_rank(len(part) > 0):
                    continue
                found = self._score_start(self._build_rows(part))
                if not len(part):
                    continue
                computed = _to_arrays(found, paired=self.split.has_pairs)
                self.client.store_scores(name, part, computed)
                at = [place[int(row)] for row in part]
                for column, values in zip(_list_columns(arrays), _list_columns(computed), strict=True):
                    column[at] = values
        return scores

    def _split_rows(self, indices: np.ndarray) -> list[np.ndarray]:
        """Rows in micro-batches; one of no rows where there are none, so that ranks stay in step."""
        if not len(indices):
            return [indices]
        return split_over_ranks(indices, self._lengths, world_size=1, tokens_per_microbatch=self._budget)[0]

    def _build_rows(self, indices: np.ndarray) -> Rows:
        pairs = [self.split.policy[int(index)] for index in indices]
        groups = [
            Prompted(p.prompt, [p.chosen] if p.rejected is None else [p.chosen, p.rejected]) for p in pairs
        ]
        return build_rows(groups, shared=self._shared_rows, pad_id=self._pad_id).to(self._device)


def _slice_arrays(arrays: ReferenceArrays, start: int, stop: int) -> ReferenceArrays:
    return ReferenceArrays(*(column[start:stop] for column in _list_columns(arrays)))


def _move_to_device(arrays: ReferenceArrays, device: torch.device) -> ReferenceScores:
    return ReferenceScores(*(torch.as_tensor(column, device=device) for column in _list_columns(arrays)))


def _list_columns(arrays: ReferenceArrays) -> tuple[np.ndarray, ...]:
    return tuple(getattr(arrays, field.name) for field in fields(arrays))


def _to_arrays(scores: SequenceScores, *, paired: bool) -> ReferenceArrays:
    assert scores.entropy is not None
    columns = [field.double().cpu().numpy() for field in (scores.logps, scores.lengths, scores.entropy)]
    if not paired:
        return ReferenceArrays(*(half for column in columns for half in (column, np.zeros_like(column))))
    return ReferenceArrays(*(column[side::2].copy() for column in columns for side in (0, 1)))
