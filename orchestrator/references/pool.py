"""The replicas of one reference: started on demand, the soonest free first, replaced if they die or hang."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from models.config import ModelError
from orchestrator.references.messages import ReferenceSpec, ScoringError

logger = logging.getLogger(__name__)

MAX_BATCHES_PER_REPLICA = 2
"""One batch in the model and one waiting at the replica, so that it never idles between calls."""
SPEED_WEIGHT = 0.2
"""Weight of the last batch in the mean of a replica's speed."""
HANG_FACTOR = 20
"""A batch that takes this many times its usual time, and the time allowed for any, has hung."""
UNKNOWN_SPEED_FACTOR = 4
"""How many times the time allowed for any batch the first ones get, when no speed is known yet."""
COPY_FACTOR, COPY_AFTER_S = 4, 5.0
"""An idle replica gets a copy of a batch that takes this many times its usual time, and these seconds."""


class PoolMember:
    """A live replica, its outstanding batches and tokens, and its speed.

    `speed` is in tokens per second, that of other replicas until this one has answered; None if none has.
    """

    def __init__(self, handle: Any, speed: float | None = None) -> None:
        self.handle = handle
        self.batches = 0
        self.tokens = 0
        self.speed = speed
        self._has_answered = False
        self._busy_since = 0.0

    def add_batch(self, tokens: int) -> None:
        """Count a batch that is sent to the replica."""
        if self.batches == 0:
            self._busy_since = time.monotonic()
        self.batches += 1
        self.tokens += tokens

    def remove_batch(self, tokens: int) -> None:
        """Stop counting a batch that the replica has answered, and measure its speed by it."""
        self.batches -= 1
        self.tokens -= tokens
        now = time.monotonic()
        seen = tokens / max(now - self._busy_since, 1e-6)
        weight = SPEED_WEIGHT if self._has_answered and self.speed is not None else 1.0
        self.speed = weight * seen + (1 - weight) * (self.speed or 0.0)
        self._has_answered, self._busy_since = True, now

    @property
    def outstanding_seconds(self) -> float | None:
        """How long its outstanding batches usually take; None if no speed is known."""
        return self.tokens / self.speed if self.speed else None


class ReplicaPool:
    """Up to `spec.replicas` replica actors. Everything runs on the router's event loop.

    A replica that dies or hangs is replaced. When more than `spec.max_retries` do without an answer in
    between, or one cannot be started, the whole pool stops and `on_failure` gets the error. The next
    `ensure_started` starts the pool again.

    Args:
        spec: the reference.
        replica_class: the actor that scores, `Replica` or one with its methods.
        on_ready: called when a replica has loaded its model.
        on_failure: called with the error that stopped the pool.
    """

    def __init__(
        self,
        spec: ReferenceSpec,
        replica_class: type,
        *,
        on_ready: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self.started = 0
        self._spec = spec
        # A new actor replaces a dead one, not Ray's max_restarts: a restarted one would not have its model.
        self._actor = ray.remote(replica_class).options(
            num_cpus=spec.num_cpus,
            num_gpus=spec.num_gpus,
            resources=dict(spec.resources) or None,
            max_restarts=0,
            max_task_retries=0,
        )
        self._on_ready, self._on_failure = on_ready, on_failure
        self._members: list[PoolMember] = []
        self._starting: set[asyncio.Task[None]] = set()
        self._deaths_in_a_row = 0
        self._error: Exception | None = None

    def ensure_started(self) -> None:
        """Start the replicas missing from `spec.replicas`, without waiting for them."""
        for _ in range(self._spec.replicas - len(self._members) - len(self._starting)):
            self._error = None
            task = asyncio.create_task(self._start_replica())
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def wait_until_ready(self) -> None:
        """Wait until every replica has loaded its model; raise the error that prevents it."""
        while self._starting:
            await asyncio.wait(self._starting)
            await asyncio.sleep(0)  # lets the done callbacks run first
        if self._error is not None:
            raise self._error

    def find_free_member(self) -> PoolMember | None:
        """Return the replica that can take another batch and is free the soonest, or None."""
        available = [member for member in self._members if member.batches < MAX_BATCHES_PER_REPLICA]
        return min(available, key=lambda member: member.tokens / (member.speed or 1.0), default=None)

    def find_idle_member(self) -> PoolMember | None:
        """Return the fastest replica that has no batch, or None."""
        idle = [member for member in self._members if member.batches == 0]
        return max(idle, key=lambda member: member.speed or 0.0, default=None)

    def compute_deadline(self, member: PoolMember) -> float:
        """Return the seconds after which a replica has hung that does not answer the last batch it got."""
        usual, floor = member.outstanding_seconds, self._spec.answer_timeout_s
        return UNKNOWN_SPEED_FACTOR * floor if usual is None else max(floor, HANG_FACTOR * usual)

    def compute_copy_delay(self, member: PoolMember) -> float | None:
        """Return the seconds after which an idle replica gets a copy of the batch; None if it never does."""
        usual = member.outstanding_seconds
        return None if usual is None else max(COPY_AFTER_S, COPY_FACTOR * usual)

    def record_answer(self, member: PoolMember, tokens: int) -> None:
        """Record that a replica answered a batch, and reset the count of deaths in a row."""
        member.remove_batch(tokens)
        self._deaths_in_a_row = 0

    def drop_member(self, member: PoolMember) -> None:
        """Kill a replica whose state is unknown, without counting a death."""
        if member in self._members:
            self._members.remove(member)
            ray.kill(member.handle)

    def replace_dead_member(self, member: PoolMember, error: Exception) -> None:
        """Replace a dead or hung replica; it counts once, although several batches may report it."""
        if member in self._members:
            self._members.remove(member)
            ray.kill(member.handle)  # Ray may report an actor as unavailable that is still alive
            self._count_death(error)

    def stop(self) -> None:
        """Kill all replicas; their devices are free a moment later."""
        for task in self._starting:
            task.cancel()
        self._starting.clear()
        for member in self._members:
            ray.kill(member.handle)
        self._members = []

    async def list_pids(self) -> list[int]:
        """Return the process ids of the live replicas."""
        return [await member.handle.pid.remote() for member in self._members]

    async def _start_replica(self) -> None:
        handle = self._actor.remote(self._spec)
        self.started += 1
        try:
            await self._wait_for_placement(handle)
            await self._wait_for_model(handle)
        except (RayActorError, ReplicaHung) as error:
            ray.kill(handle)
            self._starting.discard(_get_current_task())
            self._count_death(error)
        except Exception as error:
            ray.kill(handle)
            self._fail_pool(explain_actor_error(self._spec.name, error))
        except asyncio.CancelledError:
            ray.kill(handle)
            raise
        else:
            speeds = [member.speed for member in self._members if member.speed is not None]
            self._members.append(PoolMember(handle, min(speeds, default=None)))
            self._on_ready()

    async def _wait_for_placement(self, handle: Any) -> None:
        """Wait until the replica runs on some node."""
        spec = self._spec
        try:
            await asyncio.wait_for(_await_answer(handle.pid.remote()), spec.start_timeout_s)
        except TimeoutError:
            needs = f"{spec.num_cpus:g} CPU, {spec.num_gpus:g} GPU"
            needs += "".join(f", {amount:g} {resource}" for resource, amount in spec.resources.items())
            raise ScoringError(
                f"reference {spec.name!r}: no node had room for a replica ({needs}) within "
                f"{spec.start_timeout_s:g} s; free resources, request less, or lower its replicas"
            ) from None

    async def _wait_for_model(self, handle: Any) -> None:
        """Wait until the replica has loaded its model; raise `ReplicaHung` if that takes too long."""
        loading = asyncio.ensure_future(_await_answer(handle.setup.remote()))
        done, _ = await asyncio.wait({loading}, timeout=self._spec.load_timeout_s)
        if not done:
            loading.cancel()
            raise ReplicaHung(
                f"it did not load its model within {self._spec.load_timeout_s:g} s "
                "(references.load_minutes allows more)"
            )
        await loading

    def _count_death(self, error: Exception) -> None:
        logger.warning("reference %r: a replica is replaced: %s", self._spec.name, _get_first_line(error))
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row <= self._spec.max_retries:
            self.ensure_started()
            return
        self._fail_pool(
            ScoringError(
                f"reference {self._spec.name!r}: its replicas failed {self._deaths_in_a_row} times without "
                f"an answer in between, {explain_loss(error)}"
            )
        )

    def _fail_pool(self, error: Exception) -> None:
        self._deaths_in_a_row = 0
        self._error = error
        self._starting.discard(_get_current_task())
        self.stop()
        self._on_failure(error)


class ReplicaHung(Exception):
    """A replica did not answer in time."""


def explain_loss(error: Exception) -> str:
    """Say why a replica was lost: a clause for the end of a message."""
    if isinstance(error, ReplicaHung):
        return f"the last because {error}"
    return f"most often because memory ran out. Ray says: {_get_first_line(error)}"


def _get_current_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def _await_answer(reference: Any) -> Any:
    return await reference


def explain_actor_error(name: str, error: Exception) -> Exception:
    """Return an actor's error as one that names the reference; a ModelError stays the user's error."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ScoringError):
        return cause
    message = f"reference {name!r}: {cause}"
    if isinstance(cause, ModelError):
        return ModelError(message)
    return ScoringError(f"reference {name!r}: {type(cause).__name__}: {cause}")


def _get_first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
