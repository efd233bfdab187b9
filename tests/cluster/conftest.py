"""Two machines and a laptop on a network of their own, with a folder that they share."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cluster.hosts import LOGS, Host, lay_bridge


class Site(NamedTuple):
    """The hosts, the key that opens them, and where the shared folder lies outside them."""

    head: Host
    worker: Host
    laptop: Host
    key: Path
    shared: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Machines with the locked environment on them, since there is no network to install it from."""
    LOGS.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("site")
    (shared := folder / "shared").mkdir()
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    lay_bridge()
    hosts: list[Host] = []
    try:
        for number, name in ((2, "head"), (3, "worker"), (4, "laptop")):
            hosts.append(Host(number, name, shared, key.with_suffix(".pub").read_text().strip()))
        yield Site(*hosts, key, shared)
    finally:
        for host in hosts:
            host.end()
