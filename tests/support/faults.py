"""What the fault tests share: a run that is quick and shows its ranks, and the promises that it must keep."""

import _thread
import contextlib
import csv
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from mlflow import MlflowClient
from ray.util import list_named_actors, placement_group_table
from safetensors.torch import load_file

from orchestrator.cluster.connection import NAMESPACE
from orchestrator.driver.record import RunRecord
from orchestrator.tracking.metrics_file import read_metrics

STEPS, SAVE_EVERY = 24, 4

LINK_MODULE = '''
"""DPO's link; it also writes down which process is which rank, and sets clock and pace by files."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

RANKS, CLOCK, PACE = (Path(__file__).with_name(name) for name in ("ranks", "clock", "pace"))
REAL_TIME = time.time


def logistic(h, *, beta):
    if Path("/proc/self/cmdline").read_bytes().startswith(b"ray::"):  # not the command, which checks it
        rank = dist.get_rank() if dist.is_initialized() else 0
        (RANKS / f"{rank} {os.getpid()}").touch()
        if CLOCK.exists():
            offset = float(CLOCK.read_text())
            time.time = lambda: REAL_TIME() + offset
        if PACE.exists():
            time.sleep(float(PACE.read_text()))
    return torch.nn.functional.softplus(-beta * h)
'''


@dataclass(frozen=True, kw_only=True)
class FaultReport:
    """A row of the table of faults."""

    fault: str
    survived: str
    weights: str
    repeated: str
    seconds: str
    message: str


class FaultLog:
    """The rows of all tests, appended to a CSV file as they come."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def add(self, report: FaultReport) -> None:
        """Append a row."""
        if self._path is None:
            return
        is_new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow([field.name for field in fields(FaultReport)])
            writer.writerow([getattr(report, field.name) for field in fields(FaultReport)])


class _Descendants:
    """This process's descendants; listing them takes long, so that it is done four times a second only."""

    def __init__(self) -> None:
        self._pids: list[int] = []
        self._listed_at = -1.0

    def list_titles(self) -> dict[int, str]:
        """Return the titles that processes have now, by process id."""
        if time.monotonic() - self._listed_at > 0.25:
            self._pids = sorted(p.pid for p in psutil.Process().children(recursive=True))
            self._listed_at = time.monotonic()
        titles = {}
        for pid in self._pids:
            with contextlib.suppress(OSError):
                titles[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", "")
        return titles


_DESCENDANTS = _Descendants()


def find_actor_processes(title: str) -> list[psutil.Process]:
    """Return this process's descendants whose title starts with `ray::` and this, such as "Replica.score"."""
    found = []
    for pid, shown in _DESCENDANTS.list_titles().items():
        if shown.startswith(f"ray::{title}"):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
    return found


def find_rank(folder: Path, rank: int) -> psutil.Process | None:
    """Return the living process of a rank of the runs that use the link module in this folder."""
    for mine in (folder / "ranks").glob(f"{rank} *"):
        pid = int(mine.name.split()[1])
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            return psutil.Process(pid)
    return None


@contextlib.contextmanager
def sabotage(*faults: Callable[[], bool]) -> Iterator[list[float]]:
    """Call each fault in turn, in a thread, until it says that it has happened; all must by the block's end.

    Yields the times at which they happened. A fault that raises interrupts the block.
    """
    happened: list[float] = []
    failures: list[BaseException] = []
    ended = threading.Event()

    def act() -> None:
        try:
            for fault in faults:
                while not fault():
                    if ended.wait(0.005):
                        return
                happened.append(time.time())
        except BaseException as error:
            failures.append(error)
            _thread.interrupt_main()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    try:
        yield happened
    finally:
        ended.set()
        thread.join()
        if failures:
            raise failures[0]
    assert len(happened) == len(faults), f"{len(happened)} of {len(faults)} faults happened"


def list_steps(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run's training steps."""
    return [line for line in read_metrics(folder) if "loss" in line]


def find_step(folder: Path) -> int:
    """Return the last step that a run has taken."""
    return max((line["step"] for line in list_steps(folder)), default=0)


def find_saved_step(folder: Path) -> int:
    """Return the step that a restart would go on from."""
    snapshot = folder / "checkpoints" / "checkpoint_manager_snapshot.json"
    try:
        found = json.loads(snapshot.read_text())["checkpoint_results"]
    except (OSError, ValueError):  # not yet, or being written
        return 0
    return max((checkpoint["metrics"]["step"] for checkpoint in found), default=0)


def read_computed_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return a run's metrics without those that measure time."""
    return [
        {k: v for k, v in line.items() if k != "time" and "perf/" not in k} for line in read_metrics(folder)
    ]


def assert_same_weights(folder: Path, whole: Path) -> None:
    """Assert that two runs exported the same weights, bit for bit."""
    for part in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        found, expected = load_file(folder / "export" / part), load_file(whole / "export" / part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def assert_close_weights(folder: Path, whole: Path) -> None:
    """Assert that two runs exported the same weights up to what a live batch's composition moves."""
    name = "export/model/model.safetensors"
    found, expected = load_file(folder / name), load_file(whole / name)
    assert found.keys() == expected.keys()
    assert max((found[key] - expected[key]).abs().max().item() for key in found) < 1e-6


def assert_same_outcome(folder: Path, whole: Path) -> None:
    """Assert equal weights and metrics, every step once, one MLflow run with all of them, and one version."""
    assert_same_weights(folder, whole)
    assert [line["step"] for line in list_steps(folder)] == list(range(1, STEPS + 1))
    assert read_computed_metrics(folder) == read_computed_metrics(whole)
    record = json.loads((folder / "run.json").read_text())
    assert record["registered"] == f"models:/{folder.name}/1"
    client = MlflowClient(record_uri(folder))
    experiment = client.get_experiment_by_name("polyref")
    assert experiment is not None
    runs = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == folder.name]
    assert [(run.info.run_id, run.info.status) for run in runs] == [(record["mlflow_run"], "FINISHED")]
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, STEPS + 1))
    assert [point.value for point in history] == [line["loss"] for line in list_steps(whole)]
    assert len(client.search_model_versions(f"name='{folder.name}'")) == 1


def record_uri(folder: Path) -> str:
    """Return the MLflow server that a run's record names."""
    config = json.loads((folder / "run.json").read_text())["config"]
    uri: str | None = config["tracking"]["uri"]
    return uri or f"sqlite:///{folder.parent / 'mlflow.db'}"


def assert_nothing_left(folder: Path) -> None:
    """Assert that Ray has no actor or placement group of ours any more, and the run no unfinished file."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (left := _list_left()):
        time.sleep(0.1)
    assert left == []
    unfinished = [path.name for path in folder.rglob("*") if path.name.endswith((".unfinished", ".part"))]
    assert unfinished == []


def _list_left() -> list[str]:
    if not ray.is_initialized():
        return []
    actors = [a["name"] for a in list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    groups = [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    processes = [" ".join(p.cmdline()) for p in find_actor_processes("R") if p.is_running()]
    workers = [
        title for title in processes if title.startswith(("ray::Re", "ray::Ro", "ray::RayTrainWorker"))
    ]
    return actors + groups + workers


def count_repeated(record: RunRecord, whole: RunRecord) -> int:
    """Count the forward passes of references beyond those of the run that nothing disturbed."""
    return sum(
        counts["forwards"] - whole.reference_counts[name]["forwards"]
        for name, counts in record.reference_counts.items()
    )


def write_link_module(folder: Path) -> str:
    """Write the link that shows ranks into a folder; return its name for `loss.link.function`."""
    (folder / "ranks").mkdir(exist_ok=True)
    (folder / "rank_shower.py").write_text(LINK_MODULE)
    return "rank_shower:logistic"


def is_set(name: str) -> Path | None:
    """Return the path that an environment variable names, if it is set."""
    return Path(os.environ[name]) if os.environ.get(name) else None
