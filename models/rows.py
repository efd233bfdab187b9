"""Token ids -> the rectangular tensors of one forward pass.

Two layouts with equal log-probs:

plain   one row per (prompt, response), padded on the right:           P P P a a a .
shared  one row per prompt followed by its responses, each of which
        attends only to the prompt and itself, at positions that
        restart after the prompt:                                      P P P a a a b b

The last token of a response predicts nothing, so it is a target and never an input. A response may hold
tokens that are read and not scored, such as a tool's answer between two turns: they are complements (`~id`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ModelError

Ids = Sequence[int] | np.ndarray


class PromptWithResponses(NamedTuple):
    """One prompt and its 1..n responses to score; a response's ids below 0 are complements, not scored."""

    prompt: Ids
    responses: Sequence[Ids]


@dataclass(frozen=True)
class Rows:
    """R rows of width T that contain S response sequences with N scored response tokens in all.

    input_ids:      (R, T) int64.
    position_ids:   (R, T) int64; 0 on padding.
    segments:       (R, T) int32; 0 = prompt, j = j-th response of the row, -1 = padding.
    predictors:     (N,) int64; index into the flattened R * T positions of the state that predicts a token.
    targets:        (N,) int64; the predicted token.
    sequences:      (N,) int64; the sequence, 0..S-1, that the token belongs to.
    lengths:        (S,) int64; scored response tokens per sequence.
    row_lengths:    R numbers on the host, each row's input tokens.
    shared:         whether a row may contain several responses.
    tokens:         input tokens that are not padding.
    attended_pairs: (query, key) pairs that the attention mask allows, for counting operations.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    predictors: Tensor
    targets: Tensor
    sequences: Tensor
    lengths: Tensor
    row_lengths: tuple[int, ...]
    shared: bool
    tokens: int
    attended_pairs: int

    @property
    def padding(self) -> float:
        """Fraction of the computed positions that are padding."""
        return 1.0 - self.tokens / self.input_ids.numel()

    @property
    def response_tokens(self) -> int:
        """N, the number of scored tokens."""
        return self.targets.numel()

    def to(self, device: torch.device | str) -> "Rows":
        """Copy the rows to `device`."""
        names = ("input_ids", "position_ids", "segments", "predictors", "targets", "sequences", "lengths")
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in names})

    def round_width(self, multiple: int) -> "Rows":
        """Pad the rows on the right to a width that is a multiple of `multiple`."""
        width = self.input_ids.shape[1]
        extra = -width % multiple
        if not extra:
            return self
        row, column = self.predictors // width, self.predictors % width
        return replace(
            self,
            input_ids=F.pad(self.input_ids, (0, extra)),
            position_ids=F.pad(self.position_ids, (0, extra)),
            segments=F.pad(self.segments, (0, extra), value=-1),
            predictors=row * (width + extra) + column,
        )

    def build_mask(self) -> Tensor:
        """Build the (R, 1, T, T) bool mask on the rows' device, True where a query may attend to a key.

        Every position attends to itself, padding too, so that no softmax is over an empty set.
        """
        place = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        query, key = self.segments[:, None, :, None], self.segments[:, None, None, :]
        return (place[:, None] >= place[None, :]) & ((key == 0) | (key == query))


def build_rows(groups: Sequence[PromptWithResponses], *, shared: bool, pad_id: int) -> Rows:
    """Build the rows of `groups`; sequences are numbered group by group, response by response.

    Without groups the result is one row of padding and no sequence, so that a rank with nothing to do still
    takes part in collectives. Raises ModelError for an empty prompt (nothing would predict the first response
    token: the tokenizer must add BOS) and for a response without a token to score.
    """
    layouts = [
        _Row(np.asarray(group.prompt, dtype=np.int64), [np.asarray(r, dtype=np.int64) for r in part])
        for number, group in enumerate(groups)
        for part in _split_into_rows(number, group, shared)
    ]
    width = max((row.width for row in layouts), default=1)
    ids = np.full((max(len(layouts), 1), width), pad_id, dtype=np.int64)
    positions = np.zeros_like(ids)
    segments = np.full(ids.shape, -1, dtype=np.int32)
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for number, row in enumerate(layouts):
        for start, segment, tokens, first_position in row.split_segments():
            span = slice(start, start + len(tokens))
            ids[number, span], segments[number, span] = np.where(tokens < 0, ~tokens, tokens), segment
            positions[number, span] = np.arange(first_position, first_position + len(tokens))
        for columns, response in zip(row.find_predictors(), row.responses, strict=True):
            is_scored = response >= 0
            predictors.append(number * width + columns[is_scored])
            targets.append(response[is_scored])
    lengths = np.array([len(t) for t in targets], dtype=np.int64)
    return Rows(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        predictors=torch.from_numpy(_concatenate_ids(predictors)),
        targets=torch.from_numpy(_concatenate_ids(targets)),
        sequences=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        lengths=torch.from_numpy(lengths),
        row_lengths=tuple(row.width for row in layouts) or (0,),
        shared=shared,
        tokens=sum(row.width for row in layouts),
        attended_pairs=sum(row.count_attended_pairs() for row in layouts),
    )


@dataclass(frozen=True)
class _Row:
    prompt: np.ndarray
    responses: list[np.ndarray]

    @property
    def width(self) -> int:
        return len(self.prompt) + sum(len(r) - 1 for r in self.responses)

    def split_segments(self) -> list[tuple[int, int, np.ndarray, int]]:
        """Return (first column, segment, tokens, first position) of the prompt and of each response."""
        segments = [(0, 0, self.prompt, 0)]
        column = len(self.prompt)
        for number, response in enumerate(self.responses, start=1):
            segments.append((column, number, response[:-1], len(self.prompt)))
            column += len(response) - 1
        return segments

    def find_predictors(self) -> list[np.ndarray]:
        """Return per response the columns that predict its tokens: the prompt's last one, then its own."""
        last = len(self.prompt) - 1
        return [
            np.r_[last, start : start + len(tokens)]
            for start, segment, tokens, _ in self.split_segments()
            if segment
        ]

    def count_attended_pairs(self) -> int:
        prompt = len(self.prompt)
        pairs = prompt * (prompt + 1) // 2
        return pairs + sum((n := len(r) - 1) * prompt + n * (n + 1) // 2 for r in self.responses)


def _split_into_rows(number: int, group: PromptWithResponses, shared: bool) -> list[list[Ids]]:
    """Return the responses of each row of a group; refuse a group without tokens to score."""
    if len(group.prompt) == 0:
        raise ModelError(
            f"prompt {number} of the batch has no tokens, so nothing predicts its responses' first token; "
            "give it text, or use a tokenizer that puts a BOS token in front"
        )
    if not len(group.responses) or not all((np.asarray(r) >= 0).any() for r in group.responses):
        raise ModelError(
            f"prompt {number} of the batch has a response without a token to score; append the end-of-turn "
            "token or drop the row"
        )
    return [list(group.responses)] if shared else [[r] for r in group.responses]


def _concatenate_ids(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
