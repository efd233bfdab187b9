"""Who may use the Ray that a command starts for itself, and what a command needs to use another's."""

import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import requests
from ray._private import worker

from orchestrator.cluster.connection import connect_to_ray
from orchestrator.cluster.ray_token import protect_local_ray

SETTINGS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home without a token of Ray's, and nothing in the environment that says how Ray authenticates."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (*SETTINGS, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def listen_addresses(process: psutil.Process) -> list[str]:
    return [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def join(address: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Join a Ray from another process and compute there."""
    program = f"import ray; ray.init('{address}', log_to_driver=False); print(ray.get(ray.put(6)) + 1)"
    fast = {"RAY_NUM_REDIS_GET_RETRIES": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment | fast, capture_output=True, text=True, timeout=120
    )


def connect(home: Path, token: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Connect as a command does where the machine has a token, and a Ray that asks for it."""
    (home / ".ray").mkdir(exist_ok=True)
    (home / ".ray/auth_token").write_text(token)
    (home / "ray").mkdir(exist_ok=True)
    (home / "ray/ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
    program = (
        "import os, ray; from orchestrator.cluster.connection import connect_to_ray\n"
        "with connect_to_ray(): print(ray.get_runtime_context().gcs_address, os.environ['RAY_AUTH_MODE'])"
    )
    environment = environment | {"RAY_TMPDIR": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_ray_of_our_own_is_for_this_process_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with connect_to_ray():
        token = os.environ["RAY_AUTH_TOKEN"]
        in_worker = ray.get(ray.remote(lambda: dict(os.environ)).remote())
        assert in_worker["RAY_AUTH_TOKEN"] == token
        assert len(token) == 64

        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = {process.name(): listen_addresses(process) for process in processes}
        assert listening["gcs_server"]
        assert listening["raylet"]
        assert all(is_loopback(address) for addresses in listening.values() for address in addresses)

        assert not any(token in " ".join(process.cmdline()) for process in processes)
        session = Path(worker._global_node.get_session_dir_path())
        written = [path for path in session.rglob("*") if path.is_file()]
        assert any(path.name.startswith("gcs_server") for path in written)
        assert not any(token.encode() in path.read_bytes() for path in written)

        assert not (home / ".ray").exists()
        address = ray.get_runtime_context().gcs_address
        others = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        del others["RAY_ADDRESS"]
        assert join(address, others | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}).stdout == "7\n"
        for stranger in (others, others | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}):
            refused = join(address, stranger)
            assert refused.returncode != 0
            assert "InvalidAuthToken" in refused.stderr
        dashboard = f"http://{worker._global_node.webui_url}/api/jobs/"
        assert requests.get(dashboard, timeout=30).status_code == 401

        found = connect(home, token, others)
        assert (found.returncode, found.stdout) == (0, f"{address} token\n"), found.stderr
        named = connect(home, token, others | {"RAY_ADDRESS": address})
        assert "UsageError: the Ray at" in named.stderr
        assert "set RAY_AUTH_MODE=token" in named.stderr
    assert not any(name in os.environ for name in SETTINGS)


def test_the_users_own_token_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "e" * 64)
    with protect_local_ray():
        assert os.environ["RAY_AUTH_TOKEN"] == "e" * 64
        assert "RAY_AUTH_MODE" not in os.environ
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with protect_local_ray():
        assert "RAY_AUTH_TOKEN" not in os.environ
