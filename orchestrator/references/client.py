"""The worker's side: ask all references for a batch early, collect the scores late, count the wait."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError

from orchestrator.references.messages import (
    Floats,
    Ids,
    PromptGroup,
    Score,
    ScoreRequest,
    Scores,
    ScoringError,
)
from orchestrator.references.pool import explain_actor_error
from orchestrator.references.store import digest_response

NAMESPACE = "polyref"


class TokenPairLike(Protocol):
    """Token ids of one row; `rejected` is None where the data has only completions."""

    @property
    def prompt(self) -> Ids: ...  # noqa: D102
    @property
    def chosen(self) -> Ids: ...  # noqa: D102
    @property
    def rejected(self) -> Ids | None: ...  # noqa: D102


class TokenTableLike(Protocol):
    """`preferences.tokenize.TokenTable`, as far as it is needed here."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> TokenPairLike: ...


@dataclass(frozen=True)
class ReferenceArrays:
    """One reference's scores of B pairs: (B,) float64 each, the caller's own to write.

    Log-probs are sums in nats, lengths are response tokens, entropies are means over log V. A row without a
    rejected response has zeros there. NaN log-probs mark what an in-process reference still has to score.
    """

    chosen: Floats
    rejected: Floats
    chosen_lengths: Floats
    rejected_lengths: Floats
    chosen_entropy: Floats
    rejected_entropy: Floats

    @property
    def missing(self) -> NDArray[np.bool_]:
        """(B,): rows not scored yet; never true for a reference that has replicas."""
        return np.isnan(self.chosen) | np.isnan(self.rejected)


@dataclass(frozen=True)
class _PendingRequest:
    """An open request of one reference, and where the scores of each pair's responses will be."""

    answer: Any
    chosen_at: NDArray[np.int64]
    rejected_at: NDArray[np.int64]  # -1: none


class ReferenceClient:
    """Asks the routers of all references about rows of their token tables.

    Args:
        routers: a router's actor handle by reference name.
        tables: the same rows in each reference's own tokens, by reference name.
        in_process: references that this worker scores itself: their store is asked, their misses come back
            as NaN, and `record` saves what the worker made of them.
    """

    def __init__(
        self,
        routers: Mapping[str, Any],
        tables: Mapping[str, TokenTableLike],
        *,
        in_process: Collection[str] = (),
    ) -> None:
        if set(routers) != set(tables):
            raise ValueError(f"routers for {sorted(routers)}, but token tables for {sorted(tables)}")
        self.stall_seconds = 0.0
        """Time spent in `collect`, waiting, since the beginning."""
        self._routers, self._tables, self.in_process = dict(routers), dict(tables), frozenset(in_process)
        self._pending: dict[Any, dict[str, _PendingRequest]] = {}
        self._pending_samples: dict[Any, dict[str, Any]] = {}
        self._pending_stores: list[tuple[str, Any]] = []

    def request_scores(
        self,
        ticket: Any,
        indices: Sequence[int] | NDArray[np.integer],
        names: Collection[str] | None = None,
    ) -> None:
        """Send the requests for these rows and return at once; `ticket` names them for `collect`.

        All references are asked, or those in `names`.
        """
        if ticket in self._pending:
            raise ValueError(f"ticket {ticket!r} is still open: collect it first")
        asked = self._routers if names is None else names
        self._pending[ticket] = {name: self._send_request(name, indices) for name in asked}

    def collect_scores(self, ticket: Any) -> dict[str, ReferenceArrays]:
        """Wait for what was asked under `ticket`; rows in the order they were asked.

        Raises:
            ScoringError: a reference could not score.
            ModelError: a reference could not be loaded.
        """
        asked = self._pending.pop(ticket)
        began = time.perf_counter()
        try:
            answers = {name: wait_for_answer(name, one.answer) for name, one in asked.items()}
        finally:
            self.stall_seconds += time.perf_counter() - began
        return {name: _pick_arrays(answers[name], one) for name, one in asked.items()}

    def request_sample_scores(
        self, ticket: Any, groups: Sequence[PromptGroup], names: Collection[str]
    ) -> None:
        """Ask replicas for responses in no table, which are scored but not stored; returns at once."""
        if ticket in self._pending_samples:
            raise ValueError(f"samples {ticket!r} are still open: collect them first")
        request = ScoreRequest.pack(groups)
        self._pending_samples[ticket] = {
            name: self._routers[name].score.remote(request, keep=False) for name in names
        }

    def collect_sample_scores(self, ticket: Any) -> dict[str, Scores]:
        """Wait for what `ask_samples` asked under `ticket`: (S,) columns. Raises as `collect` does."""
        return {
            name: wait_for_answer(name, answer) for name, answer in self._pending_samples.pop(ticket).items()
        }

    def store_scores(
        self, name: str, indices: Sequence[int] | NDArray[np.integer], arrays: ReferenceArrays
    ) -> None:
        """Save an in-process reference's scores of these rows, without waiting.

        A failure to save is raised by a later call, or by `close`.
        """
        groups = group_pairs(self._tables[name], indices)
        scores = [
            score
            for group, row in zip(groups, zip(*astuple(arrays), strict=True), strict=True)
            for score in (Score(row[0], row[2], row[4]), Score(row[1], row[3], row[5]))[: len(group.keys)]
        ]
        columns = Scores(*(np.array(column) for column in zip(*scores, strict=True)))
        request = ScoreRequest.pack(groups)
        self._pending_stores.append((name, self._routers[name].put.remote(request.keys, columns)))
        self._wait_for_stores(timeout=0)

    def close(self) -> None:
        """Wait until everything recorded has arrived."""
        self._wait_for_stores(timeout=None)

    def _send_request(self, name: str, indices: Sequence[int] | NDArray[np.integer]) -> _PendingRequest:
        groups = group_pairs(self._tables[name], indices)
        request = ScoreRequest.pack(groups)
        router = self._routers[name]
        local = name in self.in_process
        answer = router.lookup.remote(request.keys) if local else router.score.remote(request)
        starts = request.group_offsets[:-1]
        paired = np.diff(request.group_offsets) == 2
        return _PendingRequest(answer, chosen_at=starts, rejected_at=np.where(paired, starts + 1, -1))

    def _wait_for_stores(self, timeout: float | None) -> None:
        waiting = [answer for _, answer in self._pending_stores]
        if not waiting:
            return
        done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=timeout)
        arrived = [(name, answer) for name, answer in self._pending_stores if answer in done]
        self._pending_stores = [(name, answer) for name, answer in self._pending_stores if answer not in done]
        for name, answer in arrived:
            wait_for_answer(name, answer)


def connect_to_routers(addresses: Mapping[str, str]) -> dict[str, Any]:
    """Router handles by reference name, from `ReferenceService.addresses`.

    Raises:
        ScoringError: a router is not there (any more).
    """
    handles = {}
    for name, address in addresses.items():
        try:
            handles[name] = ray.get_actor(address, namespace=NAMESPACE)
        except ValueError:
            raise ScoringError(f"reference {name!r}: its router {address} is not running") from None
    return handles


def group_pairs(table: TokenTableLike, indices: Sequence[int] | NDArray[np.integer]) -> list[PromptGroup]:
    """One group per row: its prompt, then the chosen and, where there is one, the rejected response."""
    groups = []
    for index in indices:
        pair = table[int(index)]
        responses = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
        keys = [digest_response(pair.prompt, response) for response in responses]
        groups.append(PromptGroup(pair.prompt, responses, keys))
    return groups


def _pick_arrays(scores: Scores, asked: _PendingRequest) -> ReferenceArrays:
    columns = (scores.logps, scores.lengths, scores.entropies)
    picked = []
    for column in columns:
        picked.append(column[asked.chosen_at].astype(np.float64))
        # With -1 the last score is read, then replaced.
        rejected = column[asked.rejected_at].astype(np.float64)
        picked.append(np.where(asked.rejected_at < 0, 0.0, rejected))
    return ReferenceArrays(*picked)


def wait_for_answer(name: str, answer: Any) -> Any:
    """A router's answer, or its error as one that says which reference and why."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        raise explain_actor_error(name, error) from error
    except RayActorError as error:
        raise ScoringError(
            f"reference {name!r}: its router died and could not be restarted, or was shut down: {error}"
        ) from error
