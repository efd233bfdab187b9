"""Nodes that vanish or are taken away with notice, on a cluster of several nodes on this machine."""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from orchestrator.cluster.connection import NAMESPACE
from orchestrator.cluster.worker_environment import build_worker_environment
from orchestrator.config.run import RunConfig
from orchestrator.driver.train import train_run
from tests.support.faults import (
    assert_close_weights,
    assert_nothing_left,
    assert_same_outcome,
    find_saved_step,
    find_step,
    sabotage,
)

MakeRun = Callable[..., RunConfig]
Report = Callable[..., None]
ON_SPARE = {"cpu": 0.1, "custom": {"spare": 0.1}}
"""Resources that only the nodes have that a test takes away."""


@pytest.fixture(scope="module")
def nodes(place: Path, whole: Path) -> Iterator[Cluster]:
    """A head; the nodes that hold workers and replicas are added by tests."""
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
        "PYTHONPATH": f"{place}:{os.environ.get('PYTHONPATH', '')}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20}
        )
        ray.init(
            address=cluster.address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": build_worker_environment(os.environ)},
        )
        yield cluster
        ray.shutdown()
        cluster.shutdown()


class SpareNode:
    """A node that a test takes away; one machine may have several."""

    def __init__(self, address: str, log: Path) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--address", address]
        self._mark = f"spare-{uuid.uuid4().hex}"
        resources = json.dumps({"spare": 1, self._mark: 1})
        command += ["--num-cpus", "2", "--resources", resources, "--object-store-memory", "100000000"]
        with log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)

    def wait(self) -> str:
        """Wait until Ray knows it; return its id."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for node in ray.nodes():
                if node["Alive"] and node["Resources"].get(self._mark):
                    return str(node["NodeID"])
            time.sleep(0.1)
        raise TimeoutError("the node did not come")

    def kill(self) -> None:
        """SIGKILL to all its processes, its workers and replicas too."""
        family = [psutil.Process(self._process.pid)]
        family += family[0].children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()


@pytest.fixture
def add_spare(nodes: Cluster, tmp_path: Path) -> Iterator[Callable[[], SpareNode]]:
    """`add_spare()`: a new node, which ends with the test."""
    added: list[SpareNode] = []

    def add() -> SpareNode:
        added.append(SpareNode(nodes.address, tmp_path / "node.log"))
        return added[-1]

    yield add
    for node in added:
        with contextlib.suppress(psutil.NoSuchProcess):
            node.kill()


def test_a_node_with_the_workers_and_the_replicas_vanishes(
    add_spare: Callable[[], SpareNode],
    make_run: MakeRun,
    whole: Path,
    place: Path,
    report: Report,
    describe_run: Callable[..., dict[str, Any]],
) -> None:
    models = describe_run("x")["references"]["models"]
    config = make_run(
        "node",
        references={
            "mode": "live",
            "models": {name: m | {"resources": ON_SPARE} for name, m in models.items()},
        },
        parallel={"resources": ON_SPARE},
        storage_path=str(place / "node"),
    )
    node = add_spare()
    node.wait()

    def remove() -> bool:
        if not 0 < find_saved_step(config.folder) < find_step(config.folder):
            return False
        node.kill()
        add_spare()
        return True

    with sabotage(remove):
        train_run(config)
    assert_close_weights(config.folder, whole)
    assert_nothing_left(config.folder)
    report("SIGKILL of a node with the worker and the replicas", weights="within 1e-6 (live)")


def test_a_node_is_taken_away_with_notice(
    nodes: Cluster,
    add_spare: Callable[[], SpareNode],
    make_run: MakeRun,
    whole: Path,
    report: Report,
) -> None:
    """Ray's own command tells its workers, as an autoscaler does when a spot machine is reclaimed."""
    config = make_run("preempted", parallel={"resources": ON_SPARE}, training={"save_every": 100})
    node = add_spare()
    node_id = node.wait()
    noticed_at: list[int] = []

    def give_notice() -> bool:
        if find_step(config.folder) < 2:
            return False
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", nodes.address]
        command += ["--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot machine", "--deadline-remaining-seconds", "15"]
        subprocess.run(command, check=True, capture_output=True)
        return True

    def take_away() -> bool:
        if not find_saved_step(config.folder):
            return False
        noticed_at.append(find_step(config.folder))
        assert find_saved_step(config.folder) == noticed_at[0], "no step is lost"
        node.kill()
        add_spare()
        return True

    with sabotage(give_notice, take_away):
        train_run(config)
    assert_same_outcome(config.folder, whole)
    assert_nothing_left(config.folder)
    report("a preemption notice for the node of the worker", message="a checkpoint is saved, …")
