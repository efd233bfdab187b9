"""Nodes of a role appear because a run needs them, and go after it: Ray's autoscaler on a made-up cloud."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.support.cluster_runs import RUN
from tests.support.hosts import SHARED, Host, succeeds, until

pytestmark = pytest.mark.cluster

HEAD, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
"""The made-up cloud's first machine; it has these names for it."""
DEFAULTS = "autoscaler/_private/fake_multi_node/example.yaml"


def _cluster_file(address: str) -> dict[str, Any]:
    """Nodes for references and for trainers, none of them there at the start."""
    sections = ("auth", "docker", "file_mounts")
    commands = (
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
        "cluster_synced_files",
        "rsync_exclude",
        "rsync_filter",
    )
    roles = {"reference": 1, "trainer": 2}
    return {
        "cluster_name": "polyref",
        "max_workers": 3,
        "idle_timeout_minutes": 0.2,
        "upscaling_speed": 1,
        "file_mounts_sync_continuously": False,
        "provider": {
            "type": "fake_multinode",
            "head_node_id": HEAD,
            "gcs_address": f"{address}:6379",
            "launch_multiple": True,
        },
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            **{
                role: {
                    "resources": {"CPU": 1, f"polyref_{role}": 1},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": most,
                }
                for role, most in roles.items()
            },
        },
        **{section: {} for section in sections},
        **{command: [] for command in commands},
    }


TRACKING = {"uri": f"sqlite:///{RUN['storage_path']}/mlflow.db"}
"""All nodes are on one machine, so that a file does."""


@pytest.fixture(scope="module")
def machine(new_host: Callable[[int, str], Host]) -> Host:
    """The head of a cluster that grows, of which all nodes are on one machine."""
    machine = new_host(5, "cloud")
    # The made-up cloud's nodes find their address by the machine's name.
    succeeds(machine.run(f"echo '127.0.0.1 localhost\n{machine.address} cloud' > /etc/hosts"))
    # Ray's wheel lacks the file that this cloud takes its defaults from; a file on a host is nowhere else.
    machine.write(str(Path(ray.__file__).parent / DEFAULTS), "{}")
    machine.write("cluster.json", json.dumps(_cluster_file(machine.address)))
    machine.write("run.yaml", yaml.safe_dump(RUN | {"name": "grown", "tracking": TRACKING}))
    machine.environment |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    succeeds(machine.run("ray get-auth-token --generate"))
    names = f"RAY_CLOUD_INSTANCE_ID={HEAD} RAY_OVERRIDE_NODE_ID_FOR_TESTING={HEAD}"
    switches = "RAY_FAKE_CLUSTER=1 RAY_enable_autoscaler_v2=1 AUTOSCALER_UPDATE_INTERVAL_S=1"
    start = (
        f"ray start --head --node-ip-address={machine.address} --num-cpus=1 --autoscaling-config=cluster.json"
    )
    succeeds(machine.run(f"{names} {switches} {start}"))
    machine.environment["RAY_ADDRESS"] = "auto"
    return machine


def _alive(machine: Host) -> list[dict[str, float]]:
    """Resources of the nodes that are there."""
    listed = succeeds(machine.run("ray list nodes --format json --filter state=ALIVE 2> /dev/null"))
    return [node["resources_total"] for node in json.loads(listed)]


def _ran_on(machine: Host, shared: Path) -> dict[str, list[set[str]]]:
    """For each class of actors: the roles of the nodes that they were on."""
    for what in ("actors", "nodes"):
        list_all = f"ray list {what} --format json --detail --limit 1000 > {SHARED}/{what}.json"
        succeeds(machine.run(list_all))
    nodes = {n["node_id"]: n["resources_total"] for n in json.loads((shared / "nodes.json").read_text())}
    homes: dict[str, list[set[str]]] = {}
    for actor in json.loads((shared / "actors.json").read_text()):
        roles = {name for name in nodes[actor["node_id"]] if name.startswith("polyref_")}
        homes.setdefault(actor["class_name"], []).append(roles)
    return homes


def test_nodes_come_and_go_with_a_run(machine: Host, shared: Path) -> None:
    assert len(_alive(machine)) == 1
    log = succeeds(
        machine.run("polyref train run.yaml parallel.workers=2 parallel.resources.cpu=1", timeout=300)
    )
    assert "training: 4/4" in log
    homes = _ran_on(machine, shared)
    assert homes["RayTrainWorker"] == [{"polyref_trainer"}, {"polyref_trainer"}]
    assert homes["Replica"] == [{"polyref_reference"}]
    until(lambda: len(_alive(machine)) == 1, lambda: machine.run("ray status -v"))


def test_more_than_may_be_started_is_refused(machine: Host) -> None:
    code, output = machine.run(
        "polyref train run.yaml name=large parallel.workers=6 parallel.resources.cpu=1"
    )
    assert code == 2
    assert "needs 6.1 CPUs: 1 reference x 0.1 + 6 workers; the cluster has 4." in output
    assert len(_alive(machine)) == 1


def test_a_role_that_nobody_may_have_is_refused(machine: Host) -> None:
    """Cores would be enough, but those of the head and of the references' node are not for workers."""
    code, output = machine.run("polyref train run.yaml name=wide parallel.workers=3 parallel.resources.cpu=1")
    assert code == 2
    assert "worker needs 1 CPU, 0.001 polyref_trainer on one node, and no node has room" in output
