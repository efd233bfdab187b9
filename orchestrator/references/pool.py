"""The replicas of one reference: started when needed, the least loaded first, replaced when they die."""

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from models.config import ModelError
from orchestrator.references.messages import ReferenceSpec, ScoringError

MAX_BATCHES_PER_REPLICA = 2
"""Batches per replica: one in the model, one waiting beside it, so that it never idles between calls."""


class PoolMember:
    """A live replica and what it has to do."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.batches = 0
        self.tokens = 0

    def add_batch(self, tokens: int) -> None:
        """Count a batch that is sent to it."""
        self.batches += 1
        self.tokens += tokens

    def remove_batch(self, tokens: int) -> None:
        """Count a batch that it answered."""
        self.batches -= 1
        self.tokens -= tokens


class ReplicaPool:
    """Holds up to `spec.replicas` actors. Everything runs on the router's event loop.

    A replica that dies is replaced; when more than `spec.max_retries` die without any answer between, or one
    cannot be started, the whole pool stops and `on_failure` gets the error. The next `ensure_started` begins
    anew.
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
        # A new actor, not Ray's max_restarts: a restarted one would come back without its model.
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
        """Start what is missing to `spec.replicas`, without waiting for it."""
        for _ in range(self._spec.replicas - len(self._members) - len(self._starting)):
            self._error = None
            task = asyncio.create_task(self._start_replica())
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def wait_until_ready(self) -> None:
        """Wait until every replica has its model, or raise what prevents it."""
        while self._starting:
            await asyncio.wait(self._starting)
            await asyncio.sleep(0)  # the done callbacks come first
        if self._error is not None:
            raise self._error

    def find_free_member(self) -> PoolMember | None:
        """The replica with the fewest outstanding tokens, if it can take another batch."""
        open_to_more = [member for member in self._members if member.batches < MAX_BATCHES_PER_REPLICA]
        return min(open_to_more, key=lambda member: member.tokens, default=None)

    def record_answer(self, member: PoolMember, tokens: int) -> None:
        """A replica answered: deaths before this are forgiven."""
        member.remove_batch(tokens)
        self._deaths_in_a_row = 0

    def drop_member(self, member: PoolMember) -> None:
        """End a replica whose state is not to be trusted any more."""
        if member in self._members:
            self._members.remove(member)
            ray.kill(member.handle)

    def replace_dead_member(self, member: PoolMember, error: Exception) -> None:
        """A replica was found dead; several batches may find that out, it counts once."""
        if member in self._members:
            self._members.remove(member)
            ray.kill(member.handle)  # "unavailable" is not dead yet
            self._count_death(error)

    def stop(self) -> None:
        """End all replicas; their devices are free a moment later."""
        for task in self._starting:
            task.cancel()
        self._starting.clear()
        for member in self._members:
            ray.kill(member.handle)
        self._members = []

    async def list_pids(self) -> list[int]:
        """Process ids of the live replicas."""
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
                f"{spec.start_timeout_s:g} s; free resources, ask for less, or lower its replicas"
            ) from None

    def _count_death(self, error: Exception) -> None:
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row <= self._spec.max_retries:
            self.ensure_started()
            return
        self._fail_pool(
            ScoringError(
                f"reference {self._spec.name!r}: its replicas died {self._deaths_in_a_row} times without an "
                f"answer between; most often memory ran out. Ray says: {_get_first_line(error)}"
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
    """The error of a replica as one for whoever asked: a wrong model stays the user's error."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ScoringError):
        return cause
    message = f"reference {name!r}: {cause}"
    if isinstance(cause, ModelError):
        return ModelError(message)
    return ScoringError(f"reference {name!r}: {type(cause).__name__}: {cause}")


def _get_first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
