"""A million requests to references while their processes are killed and stopped at random.

    python -m tests.faults.soak [--requests 1000000]

64 clients ask 8 made-up references, of two replicas each, for scores that follow from the tokens. Meanwhile a
replica or a router is killed, or stopped like a process that hangs, after every 2,000 requests. Every answer
is compared. At the end every request must have been answered once, and the routers' memory must not have
grown after the first third of the requests. Prints a line every ten seconds and a summary. Takes an hour on
two cores.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import ray
import ray.cloudpickle
import xxhash

from models.config import ModelConfig
from orchestrator.cluster.connection import start_local_ray
from orchestrator.references import client as references_client
from orchestrator.references.client import ReferenceClient
from orchestrator.references.messages import ReferenceSpec, ScoreRequest, Scores
from orchestrator.references.replica import Replica
from orchestrator.references.service import ReferenceService, start_references
from tests.references.conftest import Table, TokenPair
from tests.support.faults import find_actor_processes

# Ray's workers cannot import test files.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

REFERENCES, PROCESSES, CLIENTS_PER_PROCESS, IN_FLIGHT = 8, 8, 8, 8
ROWS = 20_000
"""Rows of the table; each has two responses."""
REQUESTS_PER_FAULT = 2000
"""Requests that are answered between a fault and the next."""
PRINT_EVERY_S = 10.0


def compute_score(prompt: np.ndarray, response: np.ndarray) -> float:
    """Return the made-up log-prob of a response."""
    return -(1 + xxhash.xxh32_intdigest(prompt.tobytes() + b"|" + response.tobytes()) % 100_000) / 1000


class DigestReplica(Replica):
    """Scores that follow from the tokens; needs no model."""

    def setup(self) -> None:
        """Load nothing."""

    def score(self, request: ScoreRequest) -> tuple[Scores, int]:
        """Score at once."""
        scores, index = Scores.unknown(len(request)), 0
        for group in request.unpack():
            for response in group.responses:
                scores.logps[index] = compute_score(group.prompt, response)
                scores.lengths[index], scores.entropies[index] = len(response), 0.5
                index += 1
        return scores, 1


def make_table() -> Table:
    """Make the rows, which all clients know."""
    draw = np.random.default_rng(0)

    def ids(longest: int) -> np.ndarray:
        return draw.integers(0, 50_000, draw.integers(2, longest), dtype=np.int32)

    return Table(TokenPair(ids(8), ids(6), ids(6)) for _ in range(ROWS))


class Clients:
    """An actor with some clients, each in a thread with requests of one row in flight."""

    def __init__(self, routers: dict[str, Any], seed: int) -> None:
        references_client.PING_EVERY_S, references_client.PING_TIMEOUT_S = 2.0, 10.0
        references_client.MAX_HANGS = 100
        self._routers, self._table, self._seed = routers, make_table(), seed
        self._answered = [0] * CLIENTS_PER_PROCESS

    def ask(self, requests: int) -> dict[str, int]:
        """Ask and compare; return how many requests had a right answer, a wrong one and none."""
        with ThreadPoolExecutor(CLIENTS_PER_PROCESS) as pool:
            shares = [requests // CLIENTS_PER_PROCESS] * CLIENTS_PER_PROCESS
            counts = list(pool.map(self._run_client, range(CLIENTS_PER_PROCESS), shares))
        return dict(sum(counts, Counter[str]()))

    def count_answered(self) -> int:
        """Return how many requests have been answered so far."""
        return sum(self._answered)

    def _run_client(self, number: int, requests: int) -> Counter[str]:
        draw = random.Random(self._seed * CLIENTS_PER_PROCESS + number)
        client = ReferenceClient(self._routers, dict.fromkeys(self._routers, self._table))
        names, counts, waiting = list(self._routers), Counter[str](), dict[int, tuple[str, int]]()
        for ticket in range(requests + IN_FLIGHT):
            if ticket < requests:
                waiting[ticket] = draw.choice(names), draw.randrange(ROWS)
                client.request_scores(ticket, [waiting[ticket][1]], [waiting[ticket][0]])
            if ticket >= IN_FLIGHT:
                name, row = waiting.pop(ticket - IN_FLIGHT)
                answer, pair = client.collect_scores(ticket - IN_FLIGHT)[name], self._table[row]
                right = answer.chosen[0] == compute_score(pair.prompt, pair.chosen)
                right &= answer.rejected[0] == compute_score(pair.prompt, pair.rejected)
                counts["right" if right else "wrong"] += 1
                self._answered[number] += 1
        counts["lost"] += len(waiting)
        return counts


class Chaos:
    """Kills and stops replicas and routers at random, the next one when requests are answered again."""

    def __init__(self) -> None:
        self.done = Counter[str]()
        self._draw, self._answered = random.Random(1), 0

    def strike(self, answered: int) -> None:
        """Do something if enough requests have been answered since the last time."""
        if answered - self._answered < REQUESTS_PER_FAULT:
            return
        self._answered = answered
        kind = self._draw.choice(["DigestReplica"] * 3 + ["Router"])
        number, verb = self._draw.choice([(signal.SIGKILL, "killed"), (signal.SIGSTOP, "stopped")])
        processes = find_actor_processes(kind)
        if processes:
            self._draw.choice(processes).send_signal(number)
            self.done[f"{kind.removeprefix('Digest').lower()}s {verb}"] += 1


def start_made_up_references(storage: str) -> ReferenceService:
    """Start the references."""
    specs = [
        ReferenceSpec(
            name=f"reference-{number}",
            config=ModelConfig(model="made up"),
            fingerprint=f"{number:032d}",
            replicas=2,
            num_cpus=0.01,
            max_retries=20,
            answer_timeout_s=2.0,
        )
        for number in range(REFERENCES)
    ]
    return start_references(specs, storage, replica_class=DigestReplica)


def measure_routers() -> int:
    """Return the unshared memory of all routers, in MiB."""
    sizes = []
    for process in find_actor_processes("Router"):
        try:
            sizes.append(process.memory_full_info().uss)
        except psutil.Error:
            continue
    return sum(sizes) // max(len(sizes), 1) // 2**20


def main() -> int:
    """Run the soak and print what happened."""
    parser = argparse.ArgumentParser(description="A million requests while processes are killed and stopped.")
    parser.add_argument("--requests", type=int, default=1_000_000)
    requests = parser.parse_args().requests
    os.environ["RAY_DEDUP_LOGS"] = "0"
    with (
        tempfile.TemporaryDirectory() as storage,
        start_local_ray(num_cpus=8, log_to_driver=False),
        start_made_up_references(storage) as service,
    ):
        began = time.monotonic()
        actor = ray.remote(Clients).options(num_cpus=0, max_concurrency=2)
        groups = [actor.remote(service.routers, seed) for seed in range(PROCESSES)]
        share = requests // PROCESSES
        answers = [group.ask.remote(share) for group in groups]
        chaos, memory, printed = Chaos(), list[tuple[int, int]](), began
        while ray.wait(answers, num_returns=len(answers), timeout=0.5)[1]:
            answered = sum(ray.get([group.count_answered.remote() for group in groups]))
            chaos.strike(answered)
            if time.monotonic() - printed >= PRINT_EVERY_S:
                printed = time.monotonic()
                memory.append((answered, measure_routers()))
                print(f"{answered:,} answered, {memory[-1][1]} MiB a router, {dict(chaos.done)}", flush=True)
        counts = sum(map(Counter, ray.get(answers)), Counter[str]())
        asked = share // CLIENTS_PER_PROCESS * CLIENTS_PER_PROCESS * PROCESSES
    early = [size for answered, size in memory if asked / 3 <= answered < 2 * asked / 3]
    late = [size for answered, size in memory if answered >= 2 * asked / 3]
    seconds = time.monotonic() - began
    print(f"{asked:,} asked, {dict(counts)} in {seconds:.0f} s; {dict(chaos.done)}")
    if early and late:
        print(f"memory of a router: {max(early)} MiB at most in the second third, {max(late)} in the last")
    grown = bool(early and late) and max(late) > 1.2 * max(early) + 20
    return int(counts["right"] != asked or grown)


if __name__ == "__main__":
    sys.exit(main())
