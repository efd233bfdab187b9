"""Servers that are away or slow while a run goes on: it ends well, and nothing that it said is lost."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.config.run import RunConfig
from orchestrator.driver.train import train_run
from orchestrator.errors import RunFailed, UsageError
from orchestrator.files import replace_text
from tests.support.bucket import Bucket, object_store
from tests.support.driver import Driver
from tests.support.faults import (
    assert_nothing_left,
    assert_same_outcome,
    find_step,
    list_steps,
    sabotage,
)

MakeRun = Callable[..., RunConfig]
Report = Callable[..., None]


class MlflowServer:
    """An MLflow server on a port of its own, which can be away for a while."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._folder, self.uri = folder, f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
        settings = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=settings, stdout=log, stderr=log, start_new_session=True
            )
        while True:
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)

    def send_signal(self, number: int) -> None:
        """Send a signal to the server and its workers."""
        os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.stop()


@pytest.mark.usefixtures("whole_cluster")
def test_mlflow_is_away_for_30_seconds(
    make_run: MakeRun, whole: Path, server: MlflowServer, report: Report
) -> None:
    config = make_run("mlflow-pause", tracking={"uri": server.uri})
    began = []

    def pause() -> bool:
        if find_step(config.folder) > 4:
            server.send_signal(signal.SIGSTOP)
            began.append(time.monotonic())
        return bool(began)

    def go_on() -> bool:
        if time.monotonic() - began[0] < 30:
            return False
        server.send_signal(signal.SIGCONT)
        return True

    with sabotage(pause, go_on):
        train_run(config)
    assert_same_outcome(config.folder, whole)
    report("MLflow does not answer for 30 s")


@pytest.mark.usefixtures("whole_cluster")
def test_mlflow_goes_away_and_stays_away(
    make_run: MakeRun, whole: Path, server: MlflowServer, report: Report
) -> None:
    config = make_run("mlflow-away", tracking={"uri": server.uri})

    def stop() -> bool:
        if find_step(config.folder) > 4:
            server.stop()
            return True
        return False

    with sabotage(stop), pytest.raises(RunFailed, match="the same command sends what is missing") as refusal:
        train_run(config)
    assert (config.folder / "export" / "model" / "model.safetensors").exists()
    with pytest.raises(UsageError, match="does not answer"):
        train_run(make_run("mlflow-never", tracking={"uri": server.uri}))
    assert not (config.folder.parent / "mlflow-never").exists()
    server.start()
    train_run(config)
    assert_same_outcome(config.folder, whole)
    assert_nothing_left(config.folder)
    report(
        "MLflow away from the middle to the end; the same command later",
        survived="same command",
        message=str(refusal.value).replace(str(config.folder), "…").replace(server.uri, "http://…"),
    )
    report(
        "MLflow away at the start", survived="refused (exit 2)", weights="none", message="… does not answer"
    )


@pytest.mark.usefixtures("whole_cluster")
def test_the_clock_jumps(
    make_run: MakeRun, whole: Path, place: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test cannot set the machine's clock: the command and the worker are shown another one."""
    config, real, clock = make_run("clock"), time.time, place / "clock"

    def jump(step: int, days: int) -> Callable[[], bool]:
        def set_clock() -> bool:
            if find_step(config.folder) < step:
                return False
            replace_text(clock, str(days * 86400))
            monkeypatch.setattr(time, "time", lambda: real() + days * 86400)
            return True

        return set_clock

    try:
        with sabotage(jump(2, 1), jump(8, -2)):
            train_run(config)
    finally:
        clock.unlink()
    monkeypatch.undo()
    assert_same_outcome(config.folder, whole)
    times = [line["time"] for line in list_steps(config.folder)]
    assert max(times) - min(times) > 2 * 86400, "the clock has jumped forth and back"
    report("the clock jumps a day ahead, then three back")


def test_storage_answers_slowly(
    whole: Path, start_command: Callable[..., Driver], report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object store sleeps nine tenths of the time."""
    with object_store() as environment:
        (store,) = [p for p in psutil.Process().children() if "moto" in " ".join(p.cmdline())]
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        bucket = Bucket()
        driver = start_command("slow-storage", storage_path=f"{bucket.uri}/runs")
        while driver.is_running():
            store.suspend()
            time.sleep(0.45)
            store.resume()
            time.sleep(0.05)
        assert driver.end() == 0, driver.log.read_text()
        exported = bucket.get("runs/slow-storage/export/model/model.safetensors")
    assert exported == (whole / "export" / "model" / "model.safetensors").read_bytes()
    report("storage that answers slowly (an object store that sleeps nine tenths of the time)")
