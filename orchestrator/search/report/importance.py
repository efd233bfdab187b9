"""Which drawn fields a search's objective depended on: permutation importance of a random forest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.search.report.labels import ABSENT, find_varied_fields, is_number, spans_decades

MIN_POINTS = 8  # points; fewer say nothing about several fields
_FOLDS, _TREES, _SHUFFLES = 5, 100, 10
_SHOWN = 12


@dataclass(frozen=True)
class Importance:
    """How much of the objective's variance goes with each field.

    Attributes:
        shares: by field, most important first; noise lies around 0. Half the rise of the squared error when
            the field is shuffled, over the variance: the total Sobol index of what the forest has learnt.
            Fields that act together are counted in each of them, so that shares may add up to more than 1.
        errors: standard deviation of each share over folds.
        explained: share of the variance the forest predicts of points it has not seen; at or below 0 the
            shares say nothing.
    """

    shares: Mapping[str, float]
    errors: Mapping[str, float]
    explained: float

    @property
    def shown_fields(self) -> list[str]:
        """The most important fields, as many as are worth a picture."""
        return list(self.shares)[:_SHOWN]

    @property
    def explanation(self) -> str:
        """What the shares are, and how far to trust them."""
        if self.explained <= 0:
            return "share of its variance; none of it is predicted in unseen points: chance, so far"
        return f"share of its variance; {100 * self.explained:.0f} % of it is predicted in unseen points"


def estimate_importance(drawn: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Importance | None:
    """From points and what each was worth; None with fewer than eight, or where nothing varies.

    Shares are measured on points that the forest was not fitted to, fold by fold: a field that it merely
    remembers gets none. A field that a point was not asked for has a value of its own.
    """
    from sklearn.ensemble import (
        RandomForestRegressor,
    )  # slow to import, and only the end of a search needs it
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
        own = (forest.predict(table[unseen]) - target[unseen]) ** 2
        error += float(own.sum())
        predicted = forest.predict(_shuffle_columns(table, unseen, rng)).reshape(len(fields), _SHUFFLES, -1)
        rises.append(((predicted - target[unseen]) ** 2).mean((1, 2)) - own.mean())
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
    """The unseen rows again and again for each column, that column dealt anew from all points."""
    again = np.tile(table[unseen], (table.shape[1], _SHUFFLES, 1))
    for column in range(table.shape[1]):
        again[column, :, column] = rng.choice(table[:, column], again.shape[1])
    return again.reshape(-1, table.shape[1])


def _encode_values(values: Sequence[Any]) -> NDArray[np.float64]:
    """Numbers, their logarithms where they span decades; below all numbers one for every other kind."""
    present = [float(value) for value in values if is_number(value)]
    log = bool(present) and spans_decades(present)
    known = [float(np.log10(value)) if log else value for value in present]
    low, spread = (min(known), max(known) - min(known)) if known else (0.0, 1.0)
    kinds = sorted({repr(value) for value in values if not is_number(value)})
    below = {kind: low - (i + 1) * (spread or 1.0) for i, kind in enumerate(kinds)}
    left = iter(known)
    return np.array([next(left) if is_number(value) else below[repr(value)] for value in values])
