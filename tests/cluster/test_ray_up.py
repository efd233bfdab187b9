"""From a laptop to machines of one's own, by the commands of docs/cluster.md: up, jobs, registry, down."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.support.cluster_runs import RUN
from tests.support.hosts import LOGS, NETWORK, ROOT, SHARED, VENV, Host, succeeds, until

pytestmark = pytest.mark.cluster

PAGE = ROOT / "docs" / "cluster.md"
ON_PREMISES = ROOT / "configs" / "clusters" / "on-premises.yaml"
JOBS = "http://127.0.0.1:8265"
RUN_FILE = RUN | {"parallel": {"workers": 2, "resources": {"cpu": 1.5}}}
"""Machines have two cores, so that each has room for one worker."""
SWEEP = {
    "name": "search",
    "run": RUN,
    "space": {"loss.beta": {"loguniform": [0.05, 0.5]}},
    "search": {"algorithm": "random", "trials": 2},
    "objective": "eval/accuracy",
}


class Page:
    """The commands that docs/cluster.md tells to type, behind those for the laptop alone."""

    def __init__(self) -> None:
        text = PAGE.read_text().partition("## A cluster\n")[2]
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        self.unused = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]

    def command(self, start: str, site: "Site") -> str:
        """The one that begins so, for this cluster."""
        (found,) = (line for line in self.unused if line.startswith(start))
        self.unused.remove(found)
        return found.replace("cluster.yaml", "~/cluster.yaml").replace("192.168.1.10", site.head.address)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page()


class Site(NamedTuple):
    """Two machines and a laptop."""

    head: Host
    worker: Host
    laptop: Host


def _cluster_file(site: Site) -> str:
    """The one that ships, with what it says to fill in filled in."""
    text = ON_PREMISES.read_text()
    for placeholder, here in (
        ("192.168.1.10", site.head.address),
        ("192.168.1.11, 192.168.1.12", site.worker.address),
        ("192.168.1.0/24", f"{NETWORK}.0/24"),
        ("ssh_user: ubuntu", "ssh_user: root"),
    ):
        assert placeholder in text
        text = text.replace(placeholder, here)
    return text


@pytest.fixture(scope="module")
def site(new_host: Callable[[int, str], Host], key: Path) -> Site:
    """As they are before `ray up`: files on the laptop, an environment on the machines, a role for one."""
    site = Site(new_host(2, "head"), new_host(3, "worker"), new_host(4, "laptop"))
    files = {
        ".ssh/id_ed25519": key.read_text(),
        "cluster.yaml": _cluster_file(site),
        "work/run.yaml": yaml.safe_dump(RUN_FILE),
        "work/bad.yaml": yaml.safe_dump(RUN | {"loss": {"preset": "mallow_theta"}}),
        "work/sweep.yaml": yaml.safe_dump(SWEEP),
    }
    for name, content in files.items():
        site.laptop.write(name, content)
    for host in (site.head, site.worker):
        # What the cluster file's setup would install, had they a network.
        stamp = f"(cd {ROOT} && sha256sum pyproject.toml constraints.txt) > ~/polyref/.venv/installed"
        succeeds(host.run(f"mkdir ~/polyref && ln -s {VENV} ~/polyref/.venv && {stamp}"))
    site.worker.write("polyref-roles", '{"polyref_trainer": 1}')
    return site


def _kept(name: str, done: tuple[int, str]) -> tuple[int, str]:
    """The same, with what was printed kept in a file."""
    (LOGS / f"{name}.log").write_text(done[1])
    return done


@pytest.fixture(scope="module")
def up(site: Site, page: Page) -> Host:
    """The laptop after `ray up`, when all machines are there."""
    laptop = site.laptop
    succeeds(laptop.run(page.command("ray get-auth-token", site)))
    # In a checkout, whose folders the cluster file names.
    succeeds(_kept("ray-up", laptop.run(f"cd {ROOT} && {page.command('ray up', site)}", timeout=180)))
    until(lambda: _nodes(laptop) == 2, lambda: laptop.run("ray exec cluster.yaml 'ray status -v'"))
    return laptop


@pytest.fixture(scope="module")
def tunnel(up: Host, site: Site, page: Page) -> subprocess.Popen[bytes]:
    """To where jobs are submitted, in a second terminal of the laptop's."""
    process = up.start(page.command("ray dashboard", site))
    until(lambda: up.run(f"curl --silent {JOBS}")[0] == 0, lambda: process.poll())
    return process


@pytest.fixture
def laptop(up: Host, tunnel: subprocess.Popen[bytes]) -> Host:
    """With a cluster that takes jobs."""
    return up


def _nodes(laptop: Host) -> int:
    _, status = laptop.run("ray exec cluster.yaml 'ray status'")
    found = re.search(r"^ (\d+) local\.cluster\.node", status, re.MULTILINE)
    return int(found[1]) if found else 0


def _job(laptop: Host, name: str, command: str) -> tuple[int, str]:
    """A job as Ray's own command submits it, followed to its end."""
    submit = f"RAY_AUTH_MODE=token ray job submit --address {JOBS} --working-dir . -- {command}"
    return _kept(name, laptop.run(f"cd work && {submit}", timeout=300))


def _listed(laptop: Host, shared: Path, what: str) -> list[dict[str, Any]]:
    """What Ray knows of its actors or nodes, those that have ended included."""
    out = f"{what}.json"
    succeeds(laptop.run(f"ray exec cluster.yaml 'ray list {what} --format json --detail > {SHARED}/{out}'"))
    listed: list[dict[str, Any]] = json.loads((shared / out).read_text())
    return listed


def _documented(laptop: Host, name: str, command: str) -> str:
    """What a command of the page prints, which does what it should."""
    return succeeds(_kept(name, laptop.run(f"cd work && {command}", timeout=300)))


def test_a_check_runs_there(laptop: Host, site: Site, page: Page) -> None:
    log = _documented(laptop, "check", page.command("polyref submit -- check", site))
    assert "sentiment: nothing to refuse" in log


def test_a_job_trains_on_both_machines(laptop: Host, site: Site, page: Page, shared: Path) -> None:
    log = _documented(laptop, "train", page.command("polyref submit -- train", site))
    assert "training: 4/4" in log
    assert "registered as models:/sentiment/1" in log
    where = {node["node_id"]: node["node_ip"] for node in _listed(laptop, shared, "nodes")}
    homes: dict[str, set[str]] = {}
    for actor in _listed(laptop, shared, "actors"):
        homes.setdefault(actor["class_name"], set()).add(where[actor["node_id"]])
    assert homes["RayTrainWorker"] == {site.head.address, site.worker.address}
    assert homes["Replica"] == {site.head.address}  # the only one with the references' role
    assert (shared / "runs" / "sentiment" / "metrics.jsonl").exists()


def test_a_bad_run_file_is_told_in_the_log(laptop: Host) -> None:
    code, log = _job(laptop, "bad", "polyref train bad.yaml")
    assert code != 0
    assert "polyref: bad.yaml: loss: unknown preset 'mallow_theta'; did you mean 'mallows_theta'?" in log
    assert "exit code 2" in log
    assert "Traceback" not in log


def test_without_the_token_nobody_submits(laptop: Host) -> None:
    command = f"RAY_AUTH_MODE=disabled ray job submit --address {JOBS} -- touch /tmp/intruded"
    code, log = laptop.run(command)
    assert code != 0
    assert "401" in log or "authentication" in log.lower()


def test_a_search_is_a_second_job(laptop: Host, site: Site, page: Page) -> None:
    log = _documented(laptop, "tune", page.command("polyref submit -- tune", site))
    assert "trial 1 finished" in log
    assert "trial 2 finished" in log
    assert "registered as models:/sentiment/2, alias best" in log


def _versions(table: str) -> list[list[str]]:
    return sorted(line.split("\t")[:3] for line in table.splitlines() if line.startswith("sentiment"))


def test_the_registry_is_the_laptops_too(laptop: Host, site: Site, page: Page) -> None:
    there = "; ".join(page.command(f"export MLFLOW_TRACKING_{name}", site) for name in ("USERNAME", "URI"))
    versions = [["sentiment", "1", ""], ["sentiment", "2", "best"]]
    job = _documented(laptop, "models", page.command("polyref submit -- models list", site))
    assert _versions(job) == versions
    assert (
        _versions(_documented(laptop, "list", f"{there}; {page.command('polyref models list', site)}"))
        == versions
    )
    _documented(laptop, "get", f"{there}; {page.command('polyref models get', site)}")
    succeeds(laptop.run("cd work && test -s best/model.safetensors -a -s best/tokenizer.json"))


def test_down_leaves_nothing(laptop: Host, site: Site, page: Page, tunnel: subprocess.Popen[bytes]) -> None:
    os.killpg(tunnel.pid, signal.SIGINT)
    tunnel.wait(30)
    succeeds(_kept("ray-down", laptop.run(page.command("ray down", site), timeout=120)))
    assert page.unused == [], "the page tells to type more than was tried"
    for host in (site.head, site.worker):
        # The other machines' Ray ends by itself once its head has been away for a minute.
        until(lambda host=host: not host.processes(), host.processes)
