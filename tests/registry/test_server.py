"""The same against a real MLflow server, started as the documentation says: files go through it and back."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from orchestrator.cli.models import app
from orchestrator.errors import UsageError
from orchestrator.registry.download import ResolvedModel, resolve_model
from orchestrator.registry.register import register_model
from orchestrator.tracking.mlflow import connect_to_mlflow
from orchestrator.tracking.tracker import Tracker
from tests.support.policies import Exported, lineage

ROOT = Path(__file__).parents[2]
PLAIN, WITH_PASSWORDS = re.findall(
    r"```bash\n((?:[^`]*\n)?mlflow server [^`]*)```", (ROOT / "docs" / "registry.md").read_text()
)
PASSWORD = "correct horse battery"

Machine = Callable[[str], None]


class Server:
    """A documented block, run with its folder and port replaced."""

    def __init__(self, documented: str, folder: Path, database: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        assert "/shared/polyref/mlflow" in documented
        assert "--port 5000" in documented
        commands = documented.replace("/shared/polyref/mlflow", str(folder))
        commands = commands.replace("--port 5000", f"--port {port}").replace("--workers 2", "--workers 1")
        folder.mkdir()
        (folder / "mlflow.db").write_bytes(database.read_bytes())
        settings = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        settings |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        settings["PATH"] = f"{Path(sys.executable).parent}:{settings['PATH']}"
        self.uri, self.folder, self._log = f"http://127.0.0.1:{port}", folder, folder / "server.log"
        with self._log.open("wb") as said:
            command = ["bash", "-euc", commands]
            self._process = subprocess.Popen(
                command, cwd=folder, env=settings, stdout=said, stderr=said, start_new_session=True
            )

    def answering(self) -> "Server":
        """Wait until it does."""
        while True:
            assert self._process.poll() is None, self._log.read_text()
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.2)

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait()


@pytest.fixture(scope="module")
def servers(
    store_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """Without and with passwords, started at the same time."""
    place = tmp_path_factory.mktemp("servers")
    guarded = WITH_PASSWORDS.replace("a-long-password", f"'{PASSWORD}'")
    assert PASSWORD in guarded
    pair = Server(PLAIN, place / "open", store_template), Server(guarded, place / "guarded", store_template)
    yield pair
    for one in pair:
        one.stop()


@pytest.fixture
def server(servers: tuple[Server, Server]) -> str:
    return servers[0].answering().uri


@pytest.fixture
def folder(servers: tuple[Server, Server]) -> Path:
    return servers[0].folder


@pytest.fixture
def on_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Be another machine from here on: nothing downloaded yet."""

    def switch(name: str) -> None:
        monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / name / "cache"))

    switch("trainer")
    return switch


def _models(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def _register(
    uri: str, name: str, policy: Exported, folder: Path, accuracy: float, alias: str | None = None
) -> ResolvedModel:
    tracker = Tracker.resume_or_start(
        None, name=f"run-{accuracy}", uri=uri, folder=folder / f"{accuracy}", params={"accuracy": accuracy}
    )
    tracker.finish()
    return register_model(
        uri,
        name=name,
        folder=policy.merged,
        adapter=policy.adapter,
        run_id=tracker.run_id,
        lineage=lineage(accuracy=accuracy),
        probe=policy.probe,
        alias=alias,
    )


def test_metrics_reach_the_server(server: str, tmp_path: Path) -> None:
    tracker = Tracker.resume_or_start(
        None, name="a-run", uri=server, folder=tmp_path / "run", params={"loss": {"beta": 0.1}}
    )
    for step in range(1, 51):
        tracker.log(step, {"loss": 1 / step})
    tracker.finish()
    history = connect_to_mlflow(server).get_metric_history(tracker.run_id, "loss")
    assert [m.step for m in history] == list(range(1, 51))


def test_a_team_shares_models_without_sharing_a_disk(
    server: str, policy: Exported, tmp_path: Path, on_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    first = _register(server, "sentiment", policy, tmp_path, 0.75, alias="champion")
    second = _register(server, "sentiment", policy, tmp_path, 0.7, alias="champion")
    assert first.folder.is_relative_to(tmp_path / "trainer")  # downloaded, not found lying about
    assert (
        connect_to_mlflow(server).get_model_version("sentiment", "1").source.startswith("mlflow-artifacts:/")
    )
    assert second.version == 2

    on_machine("a colleague's")
    versions = json.loads(_models("list", "--json").stdout)
    shown = [(v["version"], v["aliases"], v["eval/accuracy"]) for v in versions if v["name"] == "sentiment"]
    assert shown == [(2, [], 0.7), (1, ["champion"], 0.75)]
    assert "reference.base\t" + "f" * 40 in _models("show", "sentiment@champion").stdout
    compared = json.loads(_models("compare", "sentiment/1", "sentiment/2", "--json").stdout)
    assert compared["params"] == {"accuracy": ["0.75", "0.7"]}
    refused = _models("promote", "sentiment/2")
    assert isinstance(refused.exception, UsageError)
    assert "eval/accuracy of version 2 is 0.7000, that of version 1" in str(refused.exception)
    assert _models("promote", "sentiment/2", "--force").exit_code == 0

    got = _models("get", "sentiment@champion", "--to", str(tmp_path / "copy"))
    assert "models:/sentiment/2 is in" in got.stdout
    assert "checked against its digest" in got.stdout
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")(input_ids=policy.probe.rows).logits
    torch.testing.assert_close(logits, policy.probe.logits, rtol=0, atol=1e-5)


def test_what_is_got_has_what_engines_ask_for(
    server: str, policy: Exported, tmp_path: Path, on_machine: Machine
) -> None:
    """An engine reads the architecture, every weight its index names, and the tokenizer from one folder."""
    AutoModelForCausalLM.from_pretrained(policy.merged).save_pretrained(policy.merged, max_shard_size="40KB")
    (policy.merged / "model.safetensors").unlink()
    registered = _register(server, "sharded", policy, tmp_path, 0.75)
    on_machine("an inference server")
    got = _models(
        "get", registered.uri_pinned, "--to", str(tmp_path / "m"), "--merge", "--tracking-uri", server
    )
    assert got.exit_code == 0
    folder = tmp_path / "m"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    held = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            held |= {(name, file.name) for name in weights.keys()}  # noqa: SIM118  (no mapping)
    assert held == set(index.items())
    assert len(set(index.values())) > 1
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (folder / name).is_file()
    assert not list(folder.rglob("adapter*"))


def test_the_adapter_comes_alone(server: str, policy: Exported, tmp_path: Path, on_machine: Machine) -> None:
    registered = _register(server, "lora", policy, tmp_path, 0.75)
    on_machine("a laptop")
    got = _models(
        "get", registered.uri_pinned, "--to", str(tmp_path / "a"), "--adapter", "--tracking-uri", server
    )
    assert "checked against its digest" in got.stdout
    downloaded = {p.name for p in (tmp_path / "a laptop").rglob("*") if p.is_file()}
    assert "adapter_model.safetensors" in downloaded
    assert "model.safetensors" not in downloaded
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (tmp_path / "a").iterdir()
    }


def test_the_adapter_is_pushed_without_the_model(
    server: str, policy: Exported, tmp_path: Path, on_machine: Machine
) -> None:
    registered = _register(server, "sentiment", policy, tmp_path, 0.75)
    on_machine("a colleague's")
    to = tmp_path / "pushed"
    pushed = _models(
        "push", registered.uri_pinned, "me/lora", "--adapter", "--to", str(to), "--tracking-uri", server
    )
    assert pushed.exit_code == 0, pushed.exception
    weights = (to / "adapter_model.safetensors").read_bytes()
    assert weights == (policy.adapter / "adapter_model.safetensors").read_bytes()
    downloaded = (tmp_path / "a colleague's").rglob("*.safetensors")
    assert {path.name for path in downloaded} == {"adapter_model.safetensors"}


@pytest.mark.parametrize("flags", [(), ("--merge",), ("--adapter",)])
def test_one_flipped_bit_in_the_store_is_refused(
    server: str, folder: Path, policy: Exported, tmp_path: Path, on_machine: Machine, flags: tuple[str, ...]
) -> None:
    name = f"flipped{''.join(flags)}"
    registered = _register(server, name, policy, tmp_path, 0.75)
    file = "adapter_model.safetensors" if flags == ("--adapter",) else "model/model.safetensors"
    source = connect_to_mlflow(server).get_model_version(name, "1").source.removeprefix("mlflow-artifacts:/")
    (stored,) = (p for p in (folder / "artifacts" / source).rglob("*.safetensors") if str(p).endswith(file))
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 1
    stored.write_bytes(data)

    on_machine("an unlucky one")
    got = _models("get", registered.uri_pinned, "--to", str(tmp_path / "m"), "--tracking-uri", server, *flags)
    assert isinstance(got.exception, UsageError)
    assert "are not those that were registered" in str(got.exception)
    assert "register the model again" in str(got.exception)
    assert not list(tmp_path.glob("*m*"))
    assert not [p for p in (tmp_path / "an unlucky one").rglob("*") if p.is_file()]
    on_machine("trainer")  # which still has what it registered
    assert resolve_model(registered.uri_pinned, server) == registered


def test_a_damaged_download_says_which_copy(
    server: str, policy: Exported, tmp_path: Path, on_machine: Machine
) -> None:
    registered = _register(server, "local-damage", policy, tmp_path, 0.75)
    (registered.folder / "config.json").write_text("{}")
    got = _models("get", registered.uri_pinned, "--to", str(tmp_path / "m"), "--tracking-uri", server)
    assert f"remove {registered.folder} and get it again" in str(got.exception)
    assert not (tmp_path / "m").exists()


def test_names_and_passwords_come_from_the_environment(
    servers: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = servers[1].answering()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    for password in (None, "wrong"):
        if password:
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        refused = _models("list")
        assert isinstance(refused.exception, UsageError)
        assert "knows no such user: set MLFLOW_TRACKING_USERNAME and" in str(refused.exception)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    tracker = Tracker.resume_or_start(None, name="a-run", uri=guarded.uri, folder=tmp_path / "run")
    (tmp_path / "loss.png").write_bytes(b"png")
    tracker.log_files([tmp_path / "loss.png"], "plots")
    (uploaded,) = (guarded.folder / "artifacts").rglob("loss.png")
    assert uploaded.read_bytes() == b"png"
    assert "no models are registered yet" in _models("list").stderr


def test_a_name_that_the_server_does_not_know(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.rsplit(":", 1)[1]
    whole = socket.getaddrinfo

    def here(host: str, *rest: object, **more: object) -> object:
        return whole("127.0.0.1" if host == "mlflow.example" else host, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", here)
    with pytest.raises(UsageError, match="does not answer to this name: start it with --allowed-hosts"):
        connect_to_mlflow(f"http://mlflow.example:{port}")
