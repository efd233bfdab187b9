"""What judges said about pairs, and the soft labels that follow from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Probabilities = npt.NDArray[np.float64]
ORDERS = 2
"""Questions per pair: `chosen` shown first, then `chosen` shown second."""


@dataclass(frozen=True)
class Verdicts:
    """One judge's probabilities that `chosen` is better, (N,) each; NaN where it gave none.

    Attributes:
        chosen_first: asked with `chosen` shown first; None for a judge that sees one response at a time.
        chosen_second: asked with `chosen` shown second.
        mean: the mean of both orders, which cancels a preference for either place to first order.
    """

    mean: Probabilities
    chosen_first: Probabilities | None = None
    chosen_second: Probabilities | None = None

    @classmethod
    def from_first_answers(cls, first: Probabilities) -> "Verdicts":
        """Make verdicts of the probabilities (N * ORDERS,) that the response shown first is better."""
        orders = first.reshape(-1, ORDERS)
        chosen_first, chosen_second = orders[:, 0], 1 - orders[:, 1]
        return cls((chosen_first + chosen_second) / 2, chosen_first, chosen_second)

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> "Verdicts":
        """Return the verdicts on the pairs at `rows`."""
        orders = (self.chosen_first, self.chosen_second)
        return Verdicts(self.mean[rows], *(None if column is None else column[rows] for column in orders))


def compare_scores(better: npt.ArrayLike, worse: npt.ArrayLike, temperature: float) -> Probabilities:
    """Return sigma((better - worse) / T): the softmax over two log-probs, or Bradley-Terry of two rewards.

    That is how Furuta et al. 2024 (arXiv:2409.06691) make soft labels of a judge's answers.
    """
    difference = (np.asarray(better, np.float64) - np.asarray(worse, np.float64)) / temperature
    with np.errstate(invalid="ignore"):  # NaN where there is no answer
        return np.exp(-np.logaddexp(0.0, -difference))


def combine_verdicts(verdicts: Mapping[str, Verdicts], weights: Mapping[str, float]) -> Probabilities:
    """Return the judges' weighted mean for each pair: (N,), NaN where a judge gave no answer."""
    total = sum(weights[name] for name in verdicts)
    return np.asarray(sum(weights[name] / total * verdict.mean for name, verdict in verdicts.items()))
