"""What labels look like: their spread, a judge's liking for a place, and agreement with judges and people."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.labels.verdicts import Probabilities, Verdicts
from preferences.pairs import Pair

LABEL_BINS = np.linspace(0, 1, 11)
CONFIDENCE_BINS = np.linspace(0.5, 1, 6)
Z_95 = 1.959964


@dataclass(frozen=True)
class OrderStatistics:
    """How much a judge's verdict depends on the order, over all pairs.

    mean_first: mean probability that the response shown first is better; 1/2 without a liking for a place.
    flips:      share of pairs of which it prefers another response in the other order.
    """

    mean_first: float
    flips: float


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs of similar confidence: how many, the mean confidence, and the mean share of people who agree."""

    pairs: int
    confidence: float
    agreement: float


@dataclass(frozen=True)
class HumanStatistics:
    """Labels compared with people's.

    accuracy:    share of pairs with a human majority of which the label prefers the same response (a label
                 of 1/2 counts half), with Wilson's interval.
    calibration_error: mean distance of confidence and human agreement over bins, weighted by pairs (expected
                 calibration error). Confidence is that in the preferred response, agreement the share of
                 people who preferred it, so that the source's order does not matter.
    reliability: the bins.
    correlation: Spearman's, with the interval of Bonett and Wright 2000; None for constant labels.
    """

    accuracy: Interval
    calibration_error: float
    reliability: Sequence[ReliabilityBin]
    correlation: Interval | None


@dataclass(frozen=True)
class LabelStatistics:
    """Everything that is reported of N labels.

    Attributes:
        pairs: N.
        histogram: pairs per bin of LABEL_BINS, for `label` and each judge.
        source_order: share of pairs whose label prefers the source's `chosen`.
        orders: by judge, of those that are asked in both orders.
        agreement: share of pairs with the same verdict, and Spearman's correlation, by pair of judges.
        human: of `label` and each judge; empty without human labels.
    """

    pairs: int
    histogram: Mapping[str, Sequence[int]]
    source_order: float
    orders: Mapping[str, OrderStatistics]
    agreement: Mapping[str, tuple[float, Interval | None]] = field(default_factory=dict)
    human: Mapping[str, HumanStatistics] = field(default_factory=dict)


def compute_statistics(
    pairs: Sequence[Pair],
    labels: Probabilities,
    verdicts: Mapping[str, Verdicts],
    human_labels: Probabilities | None,
) -> LabelStatistics:
    """Compute what is reported; `labels` and `human_labels` are (N,) shares that prefer `chosen`."""
    columns = {"label": labels} | {name: verdict.mean for name, verdict in verdicts.items()}
    if len(verdicts) == 1:
        del columns[next(iter(verdicts))]  # the label itself
    turned = _turn_at_random(pairs)
    return LabelStatistics(
        pairs=len(pairs),
        histogram={name: np.histogram(p, LABEL_BINS)[0].tolist() for name, p in columns.items()},
        source_order=float(_score_verdicts(labels, np.ones(len(labels))).mean()),
        orders={name: order for name, v in verdicts.items() if (order := compare_orders(v)) is not None},
        agreement={
            f"{one} and {other}": (
                float(((verdicts[one].mean > 0.5) == (verdicts[other].mean > 0.5)).mean()),
                correlate(turned(verdicts[one].mean), turned(verdicts[other].mean)),
            )
            for one, other in combinations(verdicts, 2)
        },
        human={}
        if human_labels is None
        else {name: compare_with_people(turned(p), turned(human_labels)) for name, p in columns.items()},
    )


def compare_orders(verdicts: Verdicts) -> OrderStatistics | None:
    """Compare the two orders in which a judge was asked; None if it was not."""
    first, second = verdicts.chosen_first, verdicts.chosen_second
    if first is None or second is None:
        return None
    return OrderStatistics(
        mean_first=float(np.mean([first, 1 - second])), flips=float(((first > 0.5) != (second > 0.5)).mean())
    )


def compare_with_people(labels: Probabilities, human: Probabilities) -> HumanStatistics:
    """Compare labels (N,) with the shares of people (N,) who preferred the same response."""
    decided = human != 0.5
    right = _score_verdicts(labels[decided], human[decided])
    confidence = np.maximum(labels, 1 - labels)
    agreement = np.where(labels >= 0.5, human, 1 - human)
    places = np.clip(np.digitize(confidence, CONFIDENCE_BINS) - 1, 0, len(CONFIDENCE_BINS) - 2)
    bins = [
        ReliabilityBin(int(inside.sum()), float(confidence[inside].mean()), float(agreement[inside].mean()))
        for number in range(len(CONFIDENCE_BINS) - 1)
        if (inside := places == number).any()
    ]
    error = sum(one.pairs * abs(one.confidence - one.agreement) for one in bins) / len(labels)
    return HumanStatistics(estimate_share(right), error, bins, correlate(labels, human))


def estimate_share(scores: npt.NDArray[np.float64]) -> Interval:
    """Return the mean of scores (N,) in [0, 1] with Wilson's interval; NaN without any."""
    count = len(scores)
    if not count:
        return Interval(float("nan"), float("nan"), float("nan"))
    share, z2 = float(scores.mean()), Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Interval(share, float(middle - half), float(middle + half))


def correlate(one: Probabilities, other: Probabilities) -> Interval | None:
    """Return Spearman's correlation of (N,) values; None if either is constant or there are fewer than 4.

    The interval is that of Bonett and Wright 2000 (Psychometrika 65): Fisher's z with standard error
    sqrt((1 + r^2 / 2) / (N - 3)).
    """
    from scipy.stats import spearmanr

    if len(one) < 4 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    r = float(spearmanr(one, other).statistic)
    z = np.arctanh(np.clip(r, -1 + 1e-15, 1 - 1e-15))
    half = Z_95 * np.sqrt((1 + r**2 / 2) / (len(one) - 3))
    return Interval(r, float(np.tanh(z - half)), float(np.tanh(z + half)))


def _score_verdicts(labels: Probabilities, human: Probabilities) -> npt.NDArray[np.float64]:
    """Return 1 where a label prefers the response of the human majority, 1/2 for a label of 1/2, else 0."""
    return np.where(labels == 0.5, 0.5, (labels > 0.5) == (human > 0.5))


def _turn_at_random(pairs: Sequence[Pair]) -> Any:
    """Return a function that turns about half of the values (N,), chosen by the texts.

    A source often names the better response `chosen`: its order must not enter a correlation.
    """
    turned = np.array(
        [
            hashlib.blake2b(repr((p.chosen, p.rejected)).encode(), digest_size=1).digest()[0] % 2
            for p in pairs
        ],
        dtype=bool,
    )
    return lambda values: np.where(turned, 1 - values, values)
