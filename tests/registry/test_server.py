"""The same against a real MLflow server: artifacts go through it and come back through it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.config import UsageError
from orchestrator.getting import fetch
from orchestrator.mlflow_client import connect
from orchestrator.register import register
from orchestrator.registry import resolve
from orchestrator.tracking import Tracker
from tests.registry.policies import Exported, lineage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(store_template: Path, folder: Path) -> Iterator[str]:
    (folder / "mlflow.db").write_bytes(store_template.read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    settings = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as said:
        process = subprocess.Popen(
            command, cwd=folder, env=settings, stdout=said, stderr=said, start_new_session=True
        )
        try:
            uri = f"http://127.0.0.1:{port}"
            _wait_for(uri, process, folder / "server.log")
            yield uri
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _wait_for(uri: str, process: subprocess.Popen[bytes], said: Path) -> None:
    while True:
        assert process.poll() is None, said.read_text()
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)


def test_a_run_and_its_model_through_a_server(
    server: str, folder: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "cache"))
    tracker = Tracker.resume_or_start(
        None, name="a-run", uri=server, folder=tmp_path / "run", params={"loss": {"beta": 0.1}}
    )
    for step in range(1, 51):
        tracker.log(step, {"loss": 1 / step})
    tracker.finish()
    history = connect(server).get_metric_history(tracker.run_id, "loss")
    assert [m.step for m in history] == list(range(1, 51))

    registered = register(
        server,
        name="sentiment",
        folder=exported.merged,
        adapter=exported.adapter,
        run_id=tracker.run_id,
        lineage=lineage(),
        probe=exported.probe,
        alias="champion",
    )
    assert registered.folder.is_relative_to(tmp_path / "cache")  # downloaded, not found lying about
    assert resolve("models:/sentiment@champion", server) == registered
    fetch(registered, tmp_path / "copy")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")(input_ids=exported.probe.rows).logits
    torch.testing.assert_close(logits, exported.probe.logits, rtol=0, atol=1e-5)

    other = resolve("models:/sentiment/1", server, cache=tmp_path / "another machine")
    assert other.digest == registered.digest
    (stored,) = (folder / "artifacts").rglob("model/config.json")
    with stored.open("a") as file:
        file.write("\n")
    with pytest.raises(UsageError, match="are not those that were registered"):
        resolve("models:/sentiment/1", server, cache=tmp_path / "a third machine")
    assert not list((tmp_path / "a third machine").iterdir())
