"""A Ray actor that scores with one frozen model. The model's part (`FrozenModel`) is independent of Ray."""

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.references.batching import split_into_batches
from orchestrator.references.messages import PromptGroup, ReferenceSpec, ScoreRequest, Scores, ScoringError

if TYPE_CHECKING:  # the router imports this module to start replicas, and needs no torch for that
    import torch

    from models.logprobs import Scorer


FORWARDS_BEFORE_GROWTH = 64
"""Micro-batches that must fit before a budget that was halved is doubled: memory may be free again."""


class FrozenModel:
    """Scores responses with a frozen model in micro-batches of at most `budget` tokens, padding included.

    When memory runs out, the micro-batch is halved, and so is the budget of the next ones; it grows again
    once a number of them has fitted.

    Args:
        name: the reference's name, for messages.
        scorer: the model's scorer.
        device: the model's device.
        shared: whether the responses of one prompt share a row.
        budget: tokens of a micro-batch.
    """

    def __init__(
        self, name: str, scorer: "Scorer", *, device: "torch.device", shared: bool, budget: int
    ) -> None:
        self.forwards = 0
        self._name, self._scorer, self._device, self._shared = name, scorer, device, shared
        self._budget = self._full_budget = budget
        self._fitted_since_change = 0

    def score(self, request: ScoreRequest) -> Scores:
        """Score the request's responses, in its order."""
        scores = Scores.unknown(len(request))
        rows = _index_rows(request.unpack())
        if not self._shared:
            rows = [single for row in rows for single in _split_row(row)]
        waiting = [
            [rows[i] for i in batch]
            for batch in split_into_batches([row.tokens for row in rows], self._budget)
        ]
        while waiting:
            batch = waiting.pop(0)
            batch_scores = self._run_forward([row.group for row in batch])
            if batch_scores is None:
                waiting = self._halve_batch(batch) + waiting
                continue
            indices = np.concatenate([row.indices for row in batch])
            scores.logps[indices] = batch_scores.logps
            scores.lengths[indices] = batch_scores.lengths
            scores.entropies[indices] = batch_scores.entropies
        return scores

    def _run_forward(self, groups: list[PromptGroup]) -> Scores | None:
        """Score groups in one forward pass; return None if memory ran out."""
        import torch

        from models.rows import PromptWithResponses, build_rows

        prompted = [PromptWithResponses(group.prompt, group.responses) for group in groups]
        try:
            with torch.inference_mode():
                # Padding is masked by length, so any id in the vocabulary works.
                rows = build_rows(prompted, shared=self._shared, pad_id=0).to(self._device)
                out = self._scorer(rows, entropy=True)
                fields = torch.stack([f.double() for f in (out.logps, out.lengths, out.entropy)])
                logps, lengths, entropies = fields.cpu().numpy()  # one wait for the device
                scores = Scores(logps, lengths.astype(np.int64), entropies)
        except torch.OutOfMemoryError:
            return None
        self.forwards += 1
        self._fitted_since_change += 1
        if self._fitted_since_change >= FORWARDS_BEFORE_GROWTH:
            self._budget, self._fitted_since_change = min(self._full_budget, 2 * self._budget), 0
        return scores

    def _halve_batch(self, batch: "list[_Row]") -> "list[list[_Row]]":
        """Halve a batch that did not fit; a single row of several responses is split into one row each."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            batch = _split_row(batch[0])
        if len(batch) == 1:
            raise ScoringError(
                f"reference {self._name!r}: memory ran out on a single row of {batch[0].tokens} tokens; "
                "give its replicas a larger device, or lower data.max_length"
            )
        half = len(batch) // 2
        self._fitted_since_change = 0
        self._budget = len(batch[:half]) * max(row.tokens for row in batch)
        return [batch[:half], batch[half:]]


class _Row(NamedTuple):
    """A group, and the indices of its responses in the request."""

    group: PromptGroup
    indices: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return self.group.tokens


def _index_rows(groups: list[PromptGroup]) -> list[_Row]:
    starts = np.cumsum([0, *(len(group.keys) for group in groups)])
    return [_Row(group, np.arange(starts[g], starts[g + 1])) for g, group in enumerate(groups)]


def _split_row(row: _Row) -> list[_Row]:
    """Split a row into one row per response, each with its own copy of the prompt."""
    group = row.group
    singles = [PromptGroup(group.prompt, [r], [k]) for r, k in zip(group.responses, group.keys, strict=True)]
    return [_Row(single, row.indices[i : i + 1]) for i, single in enumerate(singles)]


class Replica:
    """The actor. Its constructor loads nothing, so that a failure to load reaches the caller of `setup`."""

    def __init__(self, spec: ReferenceSpec) -> None:
        self._spec = spec
        self._model: FrozenModel | None = None

    def pid(self) -> int:
        """Return the process id; an answer also means that the replica has its resources."""
        return os.getpid()

    def setup(self) -> None:
        """Load the model.

        Raises:
            ModelError: the model cannot be found or loaded.
            ScoringError: the replica has a GPU and torch finds none.
        """
        from models.locate import locate_model

        spec = self._spec
        if spec.secrets is not None:
            spec.secrets.export_to_environment()
        located = locate_model(spec.config)  # before the slow imports, so that a missing model fails early

        import torch

        from models.load import load_model
        from models.logprobs import Scorer

        device = torch.device("cuda" if spec.num_gpus else "cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            # Falling back to the CPU would store scores of another dtype under this fingerprint.
            raise ScoringError(
                f"reference {spec.name!r}: its replica was given {spec.num_gpus:g} GPU, but torch finds no "
                "CUDA device there; install torch for CUDA on that node, or request no GPU"
            )
        if device.type == "cpu":
            torch.set_num_threads(max(1, int(spec.num_cpus)))
        model = load_model(located, spec.config, device=device, trainable=False)
        scorer = Scorer(model)
        shared = spec.config.prefix_sharing == "auto" and scorer.prefix_sharing_unavailable_reason is None
        self._model = FrozenModel(
            spec.name, scorer, device=device, shared=shared, budget=spec.max_tokens_per_batch
        )

    def score(self, request: ScoreRequest) -> tuple[Scores, int]:
        """Return the scores in the request's order, and how many forward passes they took."""
        if self._model is None:
            raise ScoringError(f"reference {self._spec.name!r}: score was called before setup")
        before = self._model.forwards
        scores = self._model.score(request)
        return scores, self._model.forwards - before
