"""Which drawn fields a search's objective depended on: permutation importance of a random forest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.search.report.labels import ABSENT, find_varied_fields, is_number, spans_decades

MIN_POINTS = 8  # fewer say nothing about several fields
_FOLDS, _TREES, _SHUFFLES = 5, 100, 10
_MAX_SHOWN = 12  # fields


@dataclass(frozen=True)
class Importance:
    """How much of an objective's variance each field accounts for.

    Attributes:
        shares: by field, most important first; noise lies around 0. Half the rise of the squared error when
            the field is shuffled, over the variance: the total Sobol index of what the forest has learnt.
            What fields do together counts for each of them, so shares may add up to more than 1.
        errors: standard deviation of each share over folds.
        explained: share of the variance that the forest predicts in points it was not fitted to; at or below
            0 the shares say nothing.
    """

    shares: Mapping[str, float]
    errors: Mapping[str, float]
    explained: float

    @property
    def shown_fields(self) -> list[str]:
        """The most important fields, as many as a figure shows."""
        return list(self.shares)[:_MAX_SHOWN]

    @property
    def explanation(self) -> str:
        """A sentence on what the shares are and how far to trust them."""
        if self.explained <= 0:
            return "share of its variance; none of it is predicted in unseen points: chance, so far"
        return f"share of its variance; {100 * self.explained:.0f} % of it is predicted in unseen points"


def estimate_importance(drawn: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Importance | None:
    """Estimate importances from points and their values; None with fewer than eight, or if nothing varies.

    Shares are measured on points that the forest was not fitted to, fold by fold: a field that the forest
    merely memorises gets none. Where a point does not have a field, its absence is a value like any other.
    """
    # Slow to import, and only the end of a search needs them.
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import KFold

    fields = find_varied_fields(drawn)
    target = np.asarray(values, dtype=np.float64)
    if len(drawn) < MIN_POINTS or not fields or target.std() == 0:
        return None
    table = np.column_stack(
        [_encode_values([point.get(field, ABSENT) for point in drawn]) for field in fields]
    )
    rng = np.random.default_rng(0)
    rises, error = [], 0.0
    for fitted, unseen in KFold(_FOLDS, shuffle=True, random_state=0).split(table):
        forest = RandomForestRegressor(_TREES, random_state=0).fit(table[fitted], target[fitted])
        squared = (forest.predict(table[unseen]) - target[unseen]) ** 2
        error += float(squared.sum())
        predicted = forest.predict(_shuffle_columns(table, unseen, rng)).reshape(len(fields), _SHUFFLES, -1)
        rises.append(((predicted - target[unseen]) ** 2).mean((1, 2)) - squared.mean())
    shares = np.asarray(rises) / (2 * target.var())
    order = np.argsort(-shares.mean(0), kind="stable")
    return Importance(
        {fields[i]: float(shares[:, i].mean()) for i in order},
        {fields[i]: float(shares[:, i].std()) for i in order},
        1 - error / len(target) / float(target.var()),
    )


def _shuffle_columns(
    table: NDArray[np.float64], unseen: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Repeat the unseen rows for each column, with that column's values drawn anew from all points."""
    rows = np.tile(table[unseen], (table.shape[1], _SHUFFLES, 1))
    for column in range(table.shape[1]):
        rows[column, :, column] = rng.choice(table[:, column], rows.shape[1])
    return rows.reshape(-1, table.shape[1])


def _encode_values(values: Sequence[Any]) -> NDArray[np.float64]:
    """Encode numbers as they are, or as logarithms if they span decades, and other values below them all."""
    numbers = [float(value) for value in values if is_number(value)]
    log = bool(numbers) and spans_decades(numbers)
    scaled = [float(np.log10(value)) if log else value for value in numbers]
    low, spread = (min(scaled), max(scaled) - min(scaled)) if scaled else (0.0, 1.0)
    categories = sorted({repr(value) for value in values if not is_number(value)})
    below = {category: low - (i + 1) * (spread or 1.0) for i, category in enumerate(categories)}
    rest = iter(scaled)
    return np.array([next(rest) if is_number(value) else below[repr(value)] for value in values])
