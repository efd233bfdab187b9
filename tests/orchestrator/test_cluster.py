"""Which Ray a command connects to: decided within seconds, also where a cluster is gone."""

import json
import socket
import threading
from pathlib import Path

import pytest
import ray

from orchestrator.cluster import connection as cluster
from orchestrator.cluster.connection import connect_to_ray
from orchestrator.cluster.nodes import list_node_resources
from orchestrator.errors import UsageError


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_an_address_where_nothing_answers_is_refused(
    closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    with (
        pytest.raises(UsageError, match=rf"no Ray answers at 127.0.0.1:{closed_port}.*unset it"),
        connect_to_ray(),
    ):
        pass
    assert not ray.is_initialized()


def test_what_a_killed_cluster_left_behind_is_passed_over(
    closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "ray_current_cluster"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "get_ray_address_file", lambda _: str(left))
    assert cluster._find_address() == "local"
    left.write_text(f"127.0.0.1:{closed_port}\n")
    assert cluster._find_address() == "local"
    with socket.create_server(("127.0.0.1", 0)) as alive:
        settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # the frame that every HTTP/2 server begins with
        threading.Thread(target=lambda: alive.accept()[0].sendall(settings), daemon=True).start()
        left.write_text(f"127.0.0.1:{alive.getsockname()[1]}\n")
        assert cluster._find_address() == left.read_text().strip()


TYPES = {"trainers": {"max_workers": 3, "resources": {"CPU": 8, "GPU": 4, "polyref_trainer": 1}}}


def test_node_types_may_be_told_where_no_autoscaler_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    head = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}, "Labels": {"ray.io/node-group": "head"}}
    trainer = head | {
        "Resources": TYPES["trainers"]["resources"],
        "Labels": {"ray.io/node-group": "trainers"},
    }
    gone = trainer | {"Alive": False}
    monkeypatch.setattr(ray, "nodes", lambda: [head, trainer, gone])
    monkeypatch.setenv("POLYREF_NODE_TYPES", json.dumps(TYPES))
    assert [node.get("GPU", 0) for node in list_node_resources()] == [0, 4, 4, 4]


@pytest.mark.parametrize("told", ["trainers", '["trainers"]', '{"trainers": {"max_workers": 4}}'])
def test_node_types_told_wrongly_are_refused(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setenv("POLYREF_NODE_TYPES", told)
    with pytest.raises(UsageError, match=r"POLYREF_NODE_TYPES is not .* in JSON .*; write"):
        list_node_resources()
