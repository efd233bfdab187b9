"""Hosts on a network of their own, with a folder that they share."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster_runs import furnish
from tests.support.hosts import LOGS, Host, lay_bridge


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared folder as it is seen outside the hosts, with what runs read."""
    folder = tmp_path_factory.mktemp("shared")
    furnish(folder)
    return folder


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's key, which opens every host; its public half lies beside it."""
    path = tmp_path_factory.mktemp("key") / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@pytest.fixture(scope="session")
def bridge() -> None:
    """What hosts are plugged into; it goes with the world that run.sh makes."""
    LOGS.mkdir(parents=True, exist_ok=True)
    lay_bridge()


@pytest.fixture(scope="module")
def new_host(bridge: None, shared: Path, key: Path) -> Iterator[Callable[[int, str], Host]]:
    """`new_host(number, name)`, ended with its test module."""
    hosts: list[Host] = []

    def start(number: int, name: str) -> Host:
        hosts.append(Host(number, name, shared, key.with_suffix(".pub").read_text().strip()))
        return hosts[-1]

    yield start
    for host in hosts:
        host.end()
