"""Inputs and outputs of a preference loss: one number per pair, B pairs."""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from losses.settings import LossError


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities of a batch of pairs under one model.

    Attributes:
        chosen, rejected: (B,) sums over the response's tokens in nats, the end-of-turn token included,
            prompt and padding excluded. Dtypes below float32 are widened by the loss.
        chosen_lengths, rejected_lengths: (B,) numbers of response tokens in this model's own tokenizer.

    Raises:
        LossError: the shapes differ or are not (B,).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    def __post_init__(self) -> None:
        for name, value in self._collect_tensors().items():
            if value.ndim != 1 or value.shape != self.chosen.shape:
                raise LossError(
                    f"{type(self).__name__}.{name} must have one number per pair, shape ({len(self)},), "
                    f"got {tuple(value.shape)}; sum log-probs over the response's tokens first"
                )

    def __len__(self) -> int:
        return self.chosen.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that chosen and rejected log-probs promote to."""
        return torch.promote_types(self.chosen.dtype, self.rejected.dtype)

    def to(self, dtype: torch.dtype) -> Self:
        """Convert all scores to one floating dtype, lengths included."""
        return replace(self, **{name: value.to(dtype) for name, value in self._collect_tensors().items()})

    def detach(self) -> Self:
        """Return the same scores without gradient."""
        return replace(self, **{name: value.detach() for name, value in self._collect_tensors().items()})

    def to_per_token(self) -> Self:
        """Divide log-probs by response lengths; those of an absent response, of length 0, are unchanged."""
        return replace(
            self,
            chosen=self.chosen / self.chosen_lengths.clamp(min=1),
            rejected=self.rejected / self.rejected_lengths.clamp(min=1),
        )

    def _collect_tensors(self) -> dict[str, Tensor]:
        """Return the fields that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ReferenceScores(PairScores):
    """Log-probabilities and entropies of a batch of pairs under one frozen reference.

    Attributes:
        chosen_entropy, rejected_entropy: (B,) mean over the response's tokens of the full-vocabulary
            entropy, divided by the log of the vocabulary's size: in [0, 1]. A mean, not a sum. Only an
            entropy dispersion reads them.
    """

    chosen_entropy: Tensor | None = None
    rejected_entropy: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """Per-pair results of a preference loss; all but `losses` are detached.

    Attributes:
        losses: (B,) unreduced, with gradients to the policy's log-probs.
        chosen_rewards, rejected_rewards: (B,) implied rewards, beta times the log-ratio to the combined
            reference.
        scale: (B,) factor of h from the dispersion, or the neg-log-dispersion under link mallows_phi.
        weights: (B, K) weight of each reference passed in; zeros for references that the loss does not use.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    scale: Tensor
    weights: Tensor
