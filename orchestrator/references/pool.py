"""The replicas of one reference: started on demand, used least loaded first, replaced when they die."""

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from models.config import ModelError
from orchestrator.references.messages import ReferenceSpec, ScoringError

MAX_BATCHES_PER_REPLICA = 2
"""One batch in the model and one waiting at the replica, so that it never idles between calls."""


class PoolMember:
    """A live replica and its outstanding batches and tokens."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.batches = 0
        self.tokens = 0

    def add_batch(self, tokens: int) -> None:
        """Count a batch that is sent to the replica."""
        self.batches += 1
        self.tokens += tokens

    def remove_batch(self, tokens: int) -> None:
        """Stop counting a batch that the replica has answered."""
        self.batches -= 1
        self.tokens -= tokens


class ReplicaPool:
    """Up to `spec.replicas` replica actors. Everything runs on the router's event loop.

    A replica that dies is replaced. When more than `spec.max_retries` die without an answer in between, or
    one cannot be started, the whole pool stops and `on_failure` gets the error. The next `ensure_started`
    starts the pool again.

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
        """Return the replica with the fewest outstanding tokens that can take another batch, or None."""
        available = [member for member in self._members if member.batches < MAX_BATCHES_PER_REPLICA]
        return min(available, key=lambda member: member.tokens, default=None)

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
        """Replace a dead replica; its death counts once, although several batches may report it."""
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
            await handle.setup.remote()
        except RayActorError as error:
            self._starting.discard(_get_current_task())
            self._count_death(error)
        except Exception as error:
            ray.kill(handle)
            self._fail_pool(explain_actor_error(self._spec.name, error))
        except asyncio.CancelledError:
            ray.kill(handle)
            raise
        else:
            self._members.append(PoolMember(handle))
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

    def _count_death(self, error: Exception) -> None:
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row <= self._spec.max_retries:
            self.ensure_started()
            return
        self._fail_pool(
            ScoringError(
                f"reference {self._spec.name!r}: its replicas died {self._deaths_in_a_row} times without an "
                f"answer in between; most often memory ran out. Ray says: {_get_first_line(error)}"
            )
        )

    def _fail_pool(self, error: Exception) -> None:
        self._deaths_in_a_row = 0
        self._error = error
        self._starting.discard(_get_current_task())
        self.stop()
        self._on_failure(error)


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
