"""The router of one reference: answers from the store, coalesces equal requests, batches the rest, retries.

One async Ray actor, single-threaded on its event loop: between two `await`s nothing else changes its state.
All state that must survive is in the store, and a score depends on its key alone, so that repeating a request
is always safe: Ray restarts a dead router and sends the open requests again.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Coroutine
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError

from orchestrator.references.batching import Batch, WaitingGroups, split_into_batches
from orchestrator.references.messages import (
    Keys,
    ReferenceSpec,
    RouterStats,
    Score,
    ScoreRequest,
    Scores,
    ScoringError,
)
from orchestrator.references.pool import (
    PoolMember,
    ReplicaHung,
    ReplicaPool,
    explain_actor_error,
    explain_loss,
)
from orchestrator.references.replica import Replica
from orchestrator.references.store import ScoreStore

logger = logging.getLogger(__name__)

LINGER_S = 0.004
"""How long the first response of a batch waits for others: ranks reach a step within milliseconds."""
FLUSH_SCORES = 8192
FLUSH_INTERVAL_S = 20.0
WINDOW_BATCHES = 8
"""Batches formed from the waiting responses at once: enough to sort by length, few enough to be fair."""
MAX_OPEN_REQUESTS = 256
"""Requests processed at the same time; further ones wait."""
HEALTH_GROUP = "health"
"""The concurrency group of `ping`, which no number of open requests holds back."""


class Router:
    """The router actor, see the module. Methods are called through Ray; keys are (S, 16) uint8.

    Args:
        spec: the reference.
        storage_path: folder or pyarrow URI that the score store is under.
        replica_class: the actor that scores, `Replica` or one with its methods.
        linger_s: seconds that the first response of a batch waits for others.
        flush_scores: number of unsaved scores that are saved at once.
        flush_s: seconds after which fewer scores are saved too.
    """

    def __init__(
        self,
        spec: ReferenceSpec,
        storage_path: str,
        *,
        replica_class: type = Replica,
        linger_s: float = LINGER_S,
        flush_scores: int = FLUSH_SCORES,
        flush_s: float = FLUSH_INTERVAL_S,
    ) -> None:
        self._spec, self._storage_path = spec, storage_path
        self._linger_s, self._flush_scores, self._flush_s = linger_s, flush_scores, flush_s
        self._store: ScoreStore | None = None
        self._open_lock, self._flush_lock = asyncio.Lock(), asyncio.Lock()
        self._admission = asyncio.Semaphore(MAX_OPEN_REQUESTS)
        self._pool = ReplicaPool(spec, replica_class, on_ready=self._send_batches, on_failure=self._fail_all)
        self._waiting = WaitingGroups(spec.max_tokens_per_batch)
        self._ready_batches: deque[Batch] = deque()
        self._in_flight: dict[bytes, asyncio.Future[Score]] = {}
        self._keys_to_store: set[bytes] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._linger_timer: asyncio.TimerHandle | None = None
        self._flush_timer: asyncio.TimerHandle | None = None
        self._requested = self._from_store = self._coalesced = self._scored = 0
        self._sampled = self._audited = 0
        self._batches = self._forwards = self._retries = self._copies = 0

    @ray.method(concurrency_group=HEALTH_GROUP)
    async def ping(self) -> int:
        """Return the process id; an answer also shows that the event loop runs."""
        return os.getpid()

    async def score(self, request: ScoreRequest, *, keep: bool = True, as_batch: bool = False) -> Scores:
        """Return scores in the request's order; those that the store does not have are computed.

        With `keep=False` they are not stored: a response that a policy has just sampled does not recur. With
        `as_batch` a request of which the store lacks anything is one batch, as it is: its scores then depend
        on it alone, to the last bit.

        Raises:
            ScoringError: a replica cannot score, or gave a score that cannot be one.
            ModelError: the reference cannot be loaded.
        """
        store = await self._open_store()
        async with self._admission:
            scores = store.lookup(request.keys)
            missing = np.flatnonzero(scores.missing)
            if keep:
                self._requested += len(scores)
                self._from_store += len(scores) - len(missing)
            else:
                self._sampled += len(scores)
            if len(missing):
                await self._compute_missing(request, scores, keep=keep, as_batch=as_batch)
        return scores

    async def rescore(self, request: ScoreRequest) -> Scores:
        """Return scores that the replicas compute anew; the store is neither read nor changed.

        Raises:
            ScoringError, ModelError: as `score`.
        """
        await self._open_store()
        async with self._admission:
            self._audited += len(request)
            scores = Scores.unknown(len(request))
            await self._compute_missing(request, scores, keep=False)
        return scores

    async def lookup(self, keys: Keys) -> Scores:
        """Return the scores that the store has, without scoring anything; the others are unknown."""
        return (await self._open_store()).lookup(keys)

    async def put(self, keys: Keys, scores: Scores) -> None:
        """Store scores that a worker has computed."""
        store = await self._open_store()
        possible = scores.find_possible(self._spec.kind)
        for index in range(len(scores)):
            if not possible[index]:
                raise self._describe_impossible(keys[index].tobytes(), scores[index])
            store.put(keys[index].tobytes(), scores[index])
        self._scored += len(scores)
        self._schedule_flush(store)

    async def missing(self, keys: Keys) -> int:
        """Return how many different keys the store has no score for."""
        known = (await self._open_store()).find_known(keys)
        return len(np.unique(keys[~known], axis=0))

    async def start(self) -> None:
        """Start the replicas now, not at the first unknown score, and wait until they have their model."""
        self._pool.ensure_started()
        await self._pool.wait_until_ready()

    async def release(self) -> None:
        """Finish open requests, save, and free the replicas' devices; a later unknown score restarts them."""
        while self._in_flight:
            await asyncio.wait(set(self._in_flight.values()))
        try:
            await self.flush()
        finally:
            self._pool.stop()

    async def flush(self) -> int:
        """Save the scores that are in no file yet; return how many."""
        store = await self._open_store()
        async with self._flush_lock:
            saved = await asyncio.to_thread(store.flush)
        store.merge_recent()
        return saved

    async def close(self) -> None:
        """Save, kill the replicas, and fail the open requests."""
        try:
            await self.flush()
        finally:
            self._pool.stop()
            self._fail_all(ScoringError(f"reference {self._spec.name!r}: the service was shut down"))

    async def stats(self) -> RouterStats:
        """Return counts since this process began."""
        return RouterStats(
            requested=self._requested,
            from_store=self._from_store,
            coalesced=self._coalesced,
            scored=self._scored,
            sampled=self._sampled,
            audited=self._audited,
            batches=self._batches,
            forwards=self._forwards,
            retries=self._retries,
            copies=self._copies,
            replicas_started=self._pool.started,
        )

    async def replica_pids(self) -> list[int]:
        """Return the process ids of the live replicas, on all nodes."""
        return await self._pool.list_pids()

    async def _open_store(self) -> ScoreStore:
        async with self._open_lock:
            if self._store is None:
                if self._spec.secrets is not None:  # they include the storage's keys
                    await self._spec.secrets.export_from_event_loop()
                self._store = await asyncio.to_thread(
                    ScoreStore, self._storage_path, self._spec.fingerprint, kind=self._spec.kind
                )
            return self._store

    async def _compute_missing(
        self, request: ScoreRequest, scores: Scores, *, keep: bool, as_batch: bool = False
    ) -> None:
        """Have the replicas compute the unknown ones of a request's scores, and fill them in."""
        if not self._spec.replicas:
            raise ScoringError(f"reference {self._spec.name!r} is scored by the workers themselves")
        missing = np.flatnonzero(scores.missing)
        futures = self._enqueue_missing(request, set(missing.tolist()), keep=keep, as_batch=as_batch)
        # Not gather: if this request is cancelled, gather would cancel futures that others wait for.
        await asyncio.wait(set(futures.values()))
        for index, future in futures.items():
            scores[index] = future.result()

    def _enqueue_missing(
        self, request: ScoreRequest, missing: set[int], *, keep: bool, as_batch: bool
    ) -> dict[int, asyncio.Future[Score]]:
        """Return a future by index for every missing response; requests for the same response share one.

        A score is stored if any of its requests has `keep`.
        """
        futures: dict[int, asyncio.Future[Score]] = {}
        groups, index, is_new = request.unpack(), 0, False
        for group in groups:
            for response, key in zip(group.responses, group.keys, strict=True):
                if index in missing:
                    if keep:
                        self._keys_to_store.add(key)
                    if key in self._in_flight:
                        self._coalesced += keep
                    else:
                        self._in_flight[key] = asyncio.get_running_loop().create_future()
                        is_new = True
                        if not as_batch:
                            self._waiting.add(group.prompt, response, key)
                    futures[index] = self._in_flight[key]
                index += 1
        if as_batch and is_new:
            self._ready_batches.append(Batch(groups))
        self._pool.ensure_started()
        if self._linger_timer is None:
            self._linger_timer = asyncio.get_running_loop().call_later(self._linger_s, self._send_batches)
        return futures

    def _send_batches(self) -> None:
        """Send batches while there are batches, and replicas that can take one."""
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        while (self._ready_batches or len(self._waiting)) and (
            member := self._pool.find_free_member()
        ) is not None:
            if not self._ready_batches:
                self._ready_batches.extend(self._drain_window())
            self._send_batch(self._ready_batches.popleft(), member)
        if self._ready_batches or len(self._waiting):
            self._pool.ensure_started()

    def _drain_window(self) -> list[Batch]:
        budget = self._spec.max_tokens_per_batch
        groups = self._waiting.drain(WINDOW_BATCHES * budget)
        return [
            Batch([groups[i] for i in indices])
            for indices in split_into_batches([group.tokens for group in groups], budget)
        ]

    def _send_batch(self, batch: Batch, member: PoolMember) -> None:
        member.add_batch(batch.tokens)
        batch.copies += 1
        self._spawn_task(self._run_batch(batch, member))

    async def _run_batch(self, batch: Batch, member: PoolMember) -> None:
        """Have a replica score a batch; the first answer counts if several have it."""
        try:
            scores, forwards = await self._wait_for_scores(batch, member)
        except (RayActorError, ObjectLostError, ReplicaHung) as error:
            batch.copies -= 1
            self._retry_batch(batch, error)
            self._pool.replace_dead_member(member, error)
        except Exception as error:
            # The state of a process after a failed kernel is unknown: the next batch gets a new replica.
            batch.copies -= 1
            self._pool.drop_member(member)
            if not batch.is_done and batch.copies == 0:
                self._fail_keys(batch.keys, explain_actor_error(self._spec.name, error))
        else:
            batch.copies -= 1
            self._forwards += forwards
            self._pool.record_answer(member, batch.tokens)
            if not batch.is_done:
                self._batches += 1
                self._finish_batch(batch, member, scores)
        self._send_batches()

    async def _wait_for_scores(self, batch: Batch, member: PoolMember) -> tuple[Scores, int]:
        """Return a replica's answer; give the batch to an idle replica too if it takes unusually long.

        Raises:
            ReplicaHung: it did not answer in the time that its batches may take.
        """
        loop, copy_delay = asyncio.get_running_loop(), self._pool.compute_copy_delay(member)
        ends = loop.time() + self._pool.compute_deadline(member)
        request = ScoreRequest.pack(batch.groups)
        answer = asyncio.ensure_future(_await_scores(member.handle.score.remote(request)))
        while (remaining := ends - loop.time()) > 0:
            may_copy = copy_delay is not None and batch.copies == 1 and not batch.is_done
            done, _ = await asyncio.wait({answer}, timeout=min(remaining, copy_delay or remaining))
            if done:
                return await answer
            if may_copy and (idle := self._pool.find_idle_member()) is not None:
                self._copies += 1
                self._send_batch(batch, idle)
        answer.cancel()
        raise ReplicaHung(
            f"it did not answer a batch of {batch.tokens} tokens in time "
            "(references.answer_minutes allows more)"
        )

    def _finish_batch(self, batch: Batch, member: PoolMember, scores: Scores) -> None:
        store = self._store
        assert store is not None  # opened by the first request
        possible = scores.find_possible(self._spec.kind) & (scores.lengths == batch.scored_lengths)
        if not possible.all() and batch.attempts == 0:
            # A broken device gives such scores, and so does a broken model: another process tells which.
            bad = int(np.flatnonzero(~possible)[0])
            error = self._describe_impossible(batch.keys[bad], scores[bad])
            logger.warning("%s; the batch is scored by a new replica", error)
            self._pool.drop_member(member)
            self._retry_batch(batch, error)
            return
        batch.is_done = True
        for index, key in enumerate(batch.keys):
            score = scores[index]
            if not possible[index]:
                self._fail_keys([key], self._describe_impossible(key, score))
                continue
            if key in self._keys_to_store:
                self._keys_to_store.remove(key)
                store.put(key, score)
                self._scored += 1
            future = self._in_flight.pop(key, None)
            if future is not None:
                future.set_result(score)
        self._schedule_flush(store)

    def _describe_impossible(self, key: bytes, score: Score) -> ScoringError:
        finite = np.isfinite(score.logp) and np.isfinite(score.entropy)
        problem = "cannot be one" if finite else "is not finite"
        return ScoringError(
            f"reference {self._spec.name!r} gave a score that {problem} for the response with digest "
            f"{key.hex()}: {self._spec.kind} {score.logp}, entropy {score.entropy}, {score.length} tokens; "
            "try dtype float32 for it, and check that its weights are sound"
        )

    def _retry_batch(self, batch: Batch, error: Exception) -> None:
        """Put a batch that lost its replica first in line.

        Not if another replica has it or has answered, if it failed too often, or if no request needs it.
        """
        if batch.is_done or batch.copies:
            return
        batch.attempts += 1
        if batch.attempts > self._spec.max_retries:
            failure = ScoringError(
                f"reference {self._spec.name!r}: a batch of {batch.tokens} tokens lost its replica "
                f"{batch.attempts} times, {explain_loss(error)}"
            )
            self._fail_keys(batch.keys, failure)
        elif any(key in self._in_flight for key in batch.keys):
            self._retries += 1
            self._ready_batches.appendleft(batch)

    def _fail_keys(self, keys: list[bytes], error: Exception) -> None:
        for key in keys:
            self._keys_to_store.discard(key)
            future = self._in_flight.pop(key, None)
            if future is not None:
                future.set_exception(error)
                future.exception()  # marks it as retrieved: the requester may be gone

    def _fail_all(self, error: Exception) -> None:
        self._ready_batches.clear()
        self._waiting = WaitingGroups(self._spec.max_tokens_per_batch)
        self._fail_keys(list(self._in_flight), error)

    def _schedule_flush(self, store: ScoreStore) -> None:
        if store.unsaved >= self._flush_scores:
            self._spawn_task(self._flush_quietly())
        elif self._flush_timer is None and store.unsaved:
            loop = asyncio.get_running_loop()
            self._flush_timer = loop.call_later(
                self._flush_s, lambda: self._spawn_task(self._flush_quietly())
            )

    async def _flush_quietly(self) -> None:
        """Save scores; a failure is logged and retried at the next save. Only `flush` and `close` raise."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        try:
            await self.flush()
        except ScoringError as error:
            logger.warning("%s; the scores stay in memory and are saved later", error)

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop has weak references only
        task.add_done_callback(self._handle_task_end)

    def _handle_task_end(self, task: asyncio.Task[None]) -> None:
        """Fail open requests with a task's unexpected error, since nothing awaits the task itself."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("router of reference %r: unexpected error", self._spec.name, exc_info=error)
            self._fail_all(ScoringError(f"reference {self._spec.name!r}: {type(error).__name__}: {error}"))


async def _await_scores(answer: Any) -> tuple[Scores, int]:
    scores, forwards = await answer
    return scores, forwards
