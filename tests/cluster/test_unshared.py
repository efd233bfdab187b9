"""Two nodes with different disks behind one path: what lies there must not be split between them."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from orchestrator.cluster.shared_storage import refuse_unshared
from orchestrator.errors import UsageError
from tests.support.hosts import until

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
PORT = 6401


@pytest.fixture(scope="module")
def own_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two Ray nodes; the second one has another disk mounted at the folder that is yielded."""
    folder = tmp_path_factory.mktemp("own disk")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    start = "exec ray start --block --num-cpus=1"
    commands = (
        f"{start} --head --port={PORT} --include-dashboard=false",
        f"mount -t tmpfs tmpfs '{folder}' && {start} --address=127.0.0.1:{PORT}",
    )
    nodes = [
        subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", command],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for command in commands
    ]
    try:
        yield folder
    finally:
        for node in nodes:
            node.terminate()  # which ends all that it started
        for node in nodes:
            node.wait(60)


def test_a_folder_that_a_node_does_not_share_is_refused(own_disk, tmp_path):
    def joined() -> bool:
        try:
            ray.init(f"127.0.0.1:{PORT}", namespace="polyref", ignore_reinit_error=True, log_to_driver=False)
        except ConnectionError:
            return False
        return sum(node["Alive"] for node in ray.nodes()) == 2

    until(joined, ray.nodes)
    try:
        refuse_unshared(str(tmp_path / "runs"))
        why = r"is not shared: node \S+ does not see it \(no such folder there\); mount it on all nodes"
        with pytest.raises(UsageError, match=rf"storage_path {own_disk}/runs {why}"):
            refuse_unshared(str(own_disk / "runs"))
        assert list((own_disk / "runs").iterdir()) == []
    finally:
        ray.shutdown()
