"""The worker's client: requests a batch's scores early, collects them late, and counts the time waited."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from orchestrator.cluster.connection import NAMESPACE
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

PING_EVERY_S, PING_TIMEOUT_S = 60.0, 60.0
"""How often a router that one waits for is pinged, and how long it may take to answer that."""
MAX_HANGS = 3
"""How often a router that has hung is restarted for one request."""


class TokenPairLike(Protocol):
    """Token ids of one row; `rejected` is None where the data has only completions."""

    @property
    def prompt(self) -> Ids: ...  # noqa: D102
    @property
    def chosen(self) -> Ids: ...  # noqa: D102
    @property
    def rejected(self) -> Ids | None: ...  # noqa: D102


class TokenTableLike(Protocol):
    """The part of `preferences.tokens.tokenize.TokenTable` that is needed here."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> TokenPairLike: ...


@dataclass(frozen=True)
class ReferenceArrays:
    """One reference's scores of B pairs: (B,) float64 arrays, which the caller may write to.

    Log-probs are sums in nats, lengths are response tokens, entropies are means over log V. A row without a
    rejected response has zeros there. NaN log-probs mark rows that an in-process reference must still score.
    """

    chosen: Floats
    rejected: Floats
    chosen_lengths: Floats
    rejected_lengths: Floats
    chosen_entropy: Floats
    rejected_entropy: Floats

    @property
    def missing(self) -> NDArray[np.bool_]:
        """(B,): whether each row is not scored yet; never true for a reference that has replicas."""
        return np.isnan(self.chosen) | np.isnan(self.rejected)


@dataclass(frozen=True)
class _PendingRequest:
    """An open request to one reference, and the indices of each pair's responses in its answer."""

    answer: Any
    chosen_at: NDArray[np.int64]
    rejected_at: NDArray[np.int64]  # -1: no rejected response


class ReferenceClient:
    """Requests scores of token table rows from the routers of all references.

    Args:
        routers: a router's actor handle by reference name.
        tables: the same rows in each reference's own tokens, by reference name.
        scored_by_workers: references that this worker scores itself: scores that are not in their store are
            returned as NaN, and `store_scores` saves those that the worker computes.
    """

    def __init__(
        self,
        routers: Mapping[str, Any],
        tables: Mapping[str, TokenTableLike],
        *,
        scored_by_workers: Collection[str] = (),
    ) -> None:
        if set(routers) != set(tables):
            raise ValueError(f"routers for {sorted(routers)}, but token tables for {sorted(tables)}")
        self.stall_seconds = 0.0
        """Total time spent waiting in `collect_scores`."""
        self._routers, self._tables, self.scored_by_workers = (
            dict(routers),
            dict(tables),
            frozenset(scored_by_workers),
        )
        self._pending: dict[Any, dict[str, _PendingRequest]] = {}
        self._pending_samples: dict[Any, dict[str, Any]] = {}
        self._pending_stores: list[tuple[str, Any]] = []

    def request_scores(
        self,
        ticket: Any,
        indices: Sequence[int] | NDArray[np.integer],
        names: Collection[str] | None = None,
    ) -> None:
        """Request these rows' scores and return at once.

        Args:
            ticket: identifies the request for `collect_scores`.
            indices: the rows.
            names: the references to score them; all by default.
        """
        if ticket in self._pending:
            raise ValueError(f"ticket {ticket!r} is still open: collect it first")
        references = self._routers if names is None else names
        self._pending[ticket] = {name: self._send_request(name, indices) for name in references}

    def collect_scores(self, ticket: Any) -> dict[str, ReferenceArrays]:
        """Wait for the scores requested under `ticket`; rows are in the order of the request.

        Raises:
            ScoringError: a reference could not score.
            ModelError: a reference could not be loaded.
        """
        requests = self._pending.pop(ticket)
        began = time.perf_counter()
        try:
            answers = {
                name: wait_for_answer(name, self._routers[name], request.answer)
                for name, request in requests.items()
            }
        finally:
            self.stall_seconds += time.perf_counter() - began
        return {name: _pick_arrays(answers[name], request) for name, request in requests.items()}

    def request_sample_scores(
        self, ticket: Any, groups: Sequence[PromptGroup], names: Collection[str]
    ) -> None:
        """Request scores of responses in no table, which are not stored, and return at once.

        Args:
            ticket: identifies the request for `collect_sample_scores`.
            groups: prompts and the responses to score, S in all.
            names: the references to score them, which must have replicas.
        """
        if ticket in self._pending_samples:
            raise ValueError(f"samples {ticket!r} are still open: collect them first")
        request = ScoreRequest.pack(groups)
        self._pending_samples[ticket] = {
            name: self._routers[name].score.remote(request, keep=False) for name in names
        }

    def collect_sample_scores(self, ticket: Any) -> dict[str, Scores]:
        """Wait for the scores that `request_sample_scores` requested: (S,) columns by reference name.

        Raises:
            ScoringError: a reference could not score.
            ModelError: a reference could not be loaded.
        """
        return {
            name: wait_for_answer(name, self._routers[name], answer)
            for name, answer in self._pending_samples.pop(ticket).items()
        }

    def store_scores(
        self, name: str, indices: Sequence[int] | NDArray[np.integer], arrays: ReferenceArrays
    ) -> None:
        """Store an in-process reference's scores of these rows, without waiting.

        A failure is raised by a later call, or by `close`.
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
        self._check_stores()

    def close(self) -> None:
        """Wait until the routers have all scores from `store_scores`."""
        for name, answer in self._pending_stores:
            wait_for_answer(name, self._routers[name], answer)
        self._pending_stores = []

    def _send_request(self, name: str, indices: Sequence[int] | NDArray[np.integer]) -> _PendingRequest:
        groups = group_pairs(self._tables[name], indices)
        request = ScoreRequest.pack(groups)
        router = self._routers[name]
        scored_by_workers = name in self.scored_by_workers
        answer = router.lookup.remote(request.keys) if scored_by_workers else router.score.remote(request)
        starts = request.group_offsets[:-1]
        paired = np.diff(request.group_offsets) == 2
        return _PendingRequest(answer, chosen_at=starts, rejected_at=np.where(paired, starts + 1, -1))

    def _check_stores(self) -> None:
        """Raise the error of a store that failed; forget those that are done."""
        waiting = [answer for _, answer in self._pending_stores]
        done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        arrived = [(name, answer) for name, answer in self._pending_stores if answer in done]
        self._pending_stores = [(name, answer) for name, answer in self._pending_stores if answer not in done]
        for name, answer in arrived:
            wait_for_answer(name, self._routers[name], answer)


def connect_to_routers(addresses: Mapping[str, str]) -> dict[str, Any]:
    """Return router handles by reference name, from `ReferenceService.addresses`.

    Raises:
        ScoringError: a router is not running (any more).
    """
    handles = {}
    for name, address in addresses.items():
        try:
            handles[name] = ray.get_actor(address, namespace=NAMESPACE)
        except ValueError:
            raise ScoringError(f"reference {name!r}: its router {address} is not running") from None
    return handles


def group_pairs(table: TokenTableLike, indices: Sequence[int] | NDArray[np.integer]) -> list[PromptGroup]:
    """Build one group per row: its prompt, the chosen and, where there is one, the rejected response."""
    groups = []
    for index in indices:
        pair = table[int(index)]
        responses = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
        keys = [digest_response(pair.prompt, response) for response in responses]
        groups.append(PromptGroup(pair.prompt, responses, keys))
    return groups


def _pick_arrays(scores: Scores, request: _PendingRequest) -> ReferenceArrays:
    columns = (scores.logps, scores.lengths, scores.entropies)
    picked = []
    for column in columns:
        picked.append(column[request.chosen_at].astype(np.float64))
        # Index -1 reads the last score, which is then replaced.
        rejected = column[request.rejected_at].astype(np.float64)
        picked.append(np.where(request.rejected_at < 0, 0.0, rejected))
    return ReferenceArrays(*picked)


def wait_for_answer(name: str, router: Any, answer: Any) -> Any:
    """Return a router's answer, or raise its error with a message that names the reference and the reason.

    A router that does not answer a ping meanwhile has hung: it is restarted, and its open requests with it.

    Raises:
        ScoringError: the reference cannot score, or its router died or hung too often.
        ModelError: the reference cannot be loaded.
    """
    hangs = 0
    try:
        while True:
            try:
                return ray.get(answer, timeout=PING_EVERY_S)
            except GetTimeoutError:
                hangs += _restart_if_hung(router)
            if hangs > MAX_HANGS:
                raise ScoringError(
                    f"reference {name!r}: its router hung {hangs} times, {PING_TIMEOUT_S:g} s each"
                )
    except RayTaskError as error:
        raise explain_actor_error(name, error) from error
    except RayActorError as error:
        raise ScoringError(
            f"reference {name!r}: its router died and could not be restarted, or was shut down: {error}"
        ) from error


def _restart_if_hung(router: Any) -> bool:
    """Restart a router that answers no ping; return whether it did not."""
    try:
        ray.get(router.ping.remote(), timeout=PING_TIMEOUT_S)
    except GetTimeoutError:
        ray.kill(router, no_restart=False)
        return True
    return False
