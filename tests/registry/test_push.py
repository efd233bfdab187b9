"""`polyref models push` against a hub on this machine, which keeps what it receives."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.utils._http as hub_http
import pytest
import torch
from click.testing import Result
from huggingface_hub import ModelCard, close_session, constants, metadata_load
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from orchestrator.cli.models import app
from orchestrator.errors import RunFailed, UsageError
from orchestrator.files import digest_folder
from orchestrator.registry import hub as hub_module
from orchestrator.registry.register import register_model
from orchestrator.tracking.mlflow import connect_to_mlflow
from tests.support.hub import FakeHub, Repository, running_hub
from tests.support.policies import Exported, lineage

TOKEN = "hf_tokenofsomeone0000"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """The hub of the environment, with a token for `someone` and `their-lab`."""
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # what forgets the variable fails
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_http.time, "sleep", lambda _: None)
        close_session()
        yield hub
        close_session()


@pytest.fixture
def registered(uri: str, run_id: str, policy: Exported) -> Path:
    """Version 1 of `films`, a LoRA policy; its folder in the registry."""
    files = {"folder": policy.merged, "adapter": policy.adapter, "probe": policy.probe}
    version = register_model(
        uri, name="films", run_id=run_id, lineage=lineage(str(policy.base)), alias="best", **files
    )
    return version.folder


def push(uri: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["push", *arguments, "--tracking-uri", uri])


def refusal(result: Result, kind: type[Exception] = UsageError) -> str:
    assert isinstance(result.exception, kind), (result.output, result.exception)
    assert TOKEN not in f"{result.exception}{result.output}"
    return str(result.exception)


def read_files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_version_is_one_private_commit_with_a_tag(
    uri: str, registered: Path, hub: FakeHub, policy: Exported, tmp_path: Path
) -> None:
    result = push(uri, "films@best", "someone/films")
    assert result.exit_code == 0, result.exception
    repository = hub.repositories["someone/films"]
    assert repository.private
    assert [message for message, _ in repository.commits] == ["initial commit", "Upload films, version 1"]
    assert repository.tags == {"films-1": repository.head}
    assert f"{hub.url}/someone/films/commit/{repository.head}" in result.stdout
    assert "Upload films, version 1" in result.stdout
    assert 'revision="films-1"' in result.stdout
    assert TOKEN not in result.output

    kept = read_files(registered)
    changed = {"README.md", "adapter/adapter_config.json"}  # for the hub; the base's folder
    assert set(repository.files) == set(kept)
    assert {n for n, content in repository.files.items() if content != kept[n]} == changed
    assert not [n for n, content in repository.files.items() if str(tmp_path).encode() in content]
    config = json.loads(repository.files["adapter/adapter_config.json"])
    assert config == json.loads(kept["adapter/adapter_config.json"]) | {
        "base_model_name_or_path": policy.base.name
    }

    copy = tmp_path / "downloaded"
    for name, content in repository.files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    AutoTokenizer.from_pretrained(copy)
    found = AutoModelForCausalLM.from_pretrained(copy)(input_ids=policy.probe.rows).logits
    torch.testing.assert_close(found, policy.probe.logits, rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(policy.base)
    found = PeftModel.from_pretrained(base, str(copy), subfolder="adapter")(
        input_ids=policy.probe.rows
    ).logits
    torch.testing.assert_close(found, policy.probe.logits, rtol=0, atol=1e-5)
    assert metadata_load(copy / "README.md")["library_name"] == "transformers"
    assert 'from_pretrained("someone/films")' in ModelCard.load(copy / "README.md").text


def test_the_adapter_alone_and_a_folder_that_equals_the_upload(
    uri: str, registered: Path, hub: FakeHub, tmp_path: Path
) -> None:
    for options in ((), ("--adapter",)):
        hub.repositories.clear()
        folder = tmp_path / f"offline{len(options)}"
        written = push(uri, "films/1", "their-lab/films", *options, "--to", str(folder))
        assert written.exit_code == 0, written.exception
        assert hub.requests == []
        assert push(uri, "films/1", "their-lab/films", *options).exit_code == 0
        assert read_files(folder) == hub.repositories["their-lab/films"].files
        hub.requests.clear()
    assert set(read_files(folder)) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert metadata_load(folder / "README.md")["library_name"] == "peft"
    assert hub.repositories["their-lab/films"].tags.keys() == {"films-1-adapter"}
    full = refusal(push(uri, "films/1", "their-lab/films", "--to", str(folder)))
    assert "is not an empty folder" in full
    assert not list(tmp_path.glob(".offline*"))


def test_what_is_no_part_of_a_model_is_left_out(
    uri: str, registered: Path, hub: FakeHub, tmp_path: Path
) -> None:
    private = (
        "optimizer.safetensors",
        "probe.safetensors",
        "training_args.bin",
        "run.json",
        ".env",
        "adapter/x.pt",
    )
    for name in private:
        (registered / name).write_text("mine")
    connect_to_mlflow(uri).set_model_version_tag("films", "1", "polyref.digest", digest_folder(registered))
    result = push(uri, "films/1", "someone/films")
    assert result.exit_code == 0, result.exception
    assert not set(private) & set(hub.repositories["someone/films"].files)
    assert all(name in result.stdout for name in private)


def test_a_push_that_broke_off_is_run_again(uri: str, registered: Path, hub: FakeHub) -> None:
    # Two large files: the adapter's and the model's. Each is tried six times.
    hub.refuse = lambda method, path: 503 if method == "PUT" and hub.large_files else None
    message = refusal(push(uri, "films/1", "someone/films"), RunFailed)
    assert "someone/films" in message
    assert "broke off" in message
    assert "the same command sends what is missing" in message
    assert len(hub.large_files) == 1
    repository = hub.repositories["someone/films"]
    assert repository.files == {}  # no half of a model
    hub.refuse = lambda method, path: None
    hub.requests.clear()
    assert push(uri, "films/1", "someone/films").exit_code == 0
    assert len([method for method, _ in hub.requests if method == "PUT"]) == 1  # only the other one
    assert set(repository.files) == set(read_files(registered))
    # And a third time nothing is left to do.
    result = push(uri, "films/1", "someone/films")
    assert result.exit_code == 0
    assert len(repository.commits) == 2
    assert repository.tags == {"films-1": repository.head}


def test_a_connection_lost_inside_a_file_is_tried_again(uri: str, registered: Path, hub: FakeHub) -> None:
    hub.lose_upload = 1
    assert push(uri, "films/1", "someone/films").exit_code == 0
    assert hub.uploads >= 3
    sent = hub.repositories["someone/films"].files["model.safetensors"]
    assert sent == (registered / "model.safetensors").read_bytes()


def test_a_hub_without_xet_storage(
    uri: str, registered: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert "set HF_HUB_DISABLE_XET=1 and push again" in refusal(push(uri, "films/1", "someone/films"))


def test_weights_of_an_earlier_push_are_not_left_beside_the_new(
    uri: str, registered: Path, hub: FakeHub
) -> None:
    earlier = {
        "README.md": b"---\ntags: [polyref]\n---\n",
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "LICENSE": b"theirs",
    }
    hub.repositories["someone/films"] = repository = Repository(private=True, commits=[("earlier", earlier)])
    repository.tags["films-1"] = first = repository.head
    result = push(uri, "films/1", "someone/films")
    assert result.exit_code == 0, result.exception
    assert set(repository.files) == set(read_files(registered)) | {"LICENSE"}
    assert repository.commits[0][1] == earlier
    assert "model-00001-of-00002.safetensors" in result.stdout
    assert repository.tags == {"films-1": first}
    assert "tag films-1 is on another commit and stays there" in result.stdout


def test_a_file_that_the_hub_drops_is_missed(uri: str, registered: Path, hub: FakeHub) -> None:
    hub.ignored = ("model.safetensors",)
    message = refusal(push(uri, "films/1", "someone/films"), RunFailed)
    assert "lacks model.safetensors: take them out of its .gitignore" in message
    assert hub.repositories["someone/films"].tags == {}


def test_nothing_becomes_public_by_itself(uri: str, registered: Path, hub: FakeHub) -> None:
    hub.repositories["someone/open"] = repository = Repository(private=False)
    message = refusal(push(uri, "films/1", "someone/open"))
    assert "someone/open is public" in message
    assert "--public" in message
    assert len(repository.commits) == 1
    assert hub.large_files == {}
    assert push(uri, "films/1", "someone/open", "--public").exit_code == 0
    assert push(uri, "films/1", "someone/new", "--public").exit_code == 0
    assert not hub.repositories["someone/new"].private
    hub.repositories["someone/closed"] = Repository(private=True)
    result = push(uri, "films/1", "someone/closed", "--public")
    assert "was private and stays so" in result.stdout
    assert hub.repositories["someone/closed"].private


def test_a_model_of_another_program_is_left_as_it_is(uri: str, registered: Path, hub: FakeHub) -> None:
    hub.repositories["someone/theirs"] = repository = Repository(
        private=True, commits=[("mine", {"pytorch_model.bin": b"mine"})]
    )
    message = refusal(push(uri, "films/1", "someone/theirs"))
    assert "holds a model that polyref did not push" in message
    assert len(repository.commits) == 1


def test_a_repository_of_someone_else(uri: str, registered: Path, hub: FakeHub) -> None:
    for there in ({}, {"a-stranger/films": Repository(False)}, {"a-stranger/films": Repository(True)}):
        hub.repositories = dict(there)
        message = refusal(push(uri, "films/1", "a-stranger/films", "--public"))
        assert "does not let you write to a-stranger/films" in message
        assert "choose a repository of your own" in message
        assert hub.large_files == {}
        assert hub.repositories.keys() == there.keys()
        assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


def test_a_wrong_token_or_none(
    uri: str,
    registered: Path,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anoldtoken00000000000")
    message = refusal(push(uri, "films/1", "someone/films"))
    assert "does not accept the token (401)" in message
    assert "hf auth login" in message
    assert "hf_anoldtoken" not in message + caplog.text
    hub.requests.clear()
    monkeypatch.delenv("HF_TOKEN")
    message = refusal(push(uri, "films/1", "someone/films"))
    assert "there is no token to push with" in message
    assert "`hf auth login`" in message
    assert "HF_TOKEN" in message
    assert hub.requests == []
    assert hub.repositories == {}


def test_a_hub_that_is_silent_or_away(
    uri: str, registered: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "CONNECT_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        start = time.monotonic()
        message = refusal(push(uri, "films/1", "someone/films"))
        assert time.monotonic() - start < 20
    assert f"the hub at {address} does not answer" in message
    assert f"the hub at {address} does not answer" in refusal(push(uri, "films/1", "someone/films"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(push(uri, "films/1", "someone/films"))


def test_refused_before_a_hub_is_asked(uri: str, registered: Path, hub: FakeHub) -> None:
    refused = {
        ("films/1", "films"): "names no owner",
        ("films/1", "a/b/c"): "is no name of a repository",
        ("films/1", "someone/fi lms"): "is no name of a repository",
        ("films/2", "someone/films"): "is not in the registry",
        ("films/1", "someone/films", "--public", "--to", "x"): "leave one of them out",
    }
    for arguments, said in refused.items():
        assert said in refusal(push(uri, *arguments))
    assert hub.requests == []


def test_versions_that_cannot_be_pushed(uri: str, registered: Path, hub: FakeHub) -> None:
    client = connect_to_mlflow(uri)
    client.delete_model_version_tag("films", "1", "polyref.adapter_digest")
    assert "has no separate adapter" in refusal(push(uri, "films/1", "someone/films", "--adapter"))
    assert hub.requests == []
    (registered / "config.json").write_text('{"auto_map": {}}')
    assert "are not those that were registered" in refusal(push(uri, "films/1", "someone/films"))
    client.delete_model_version_tag("films", "1", "polyref.digest")
    hub.requests.clear()
    assert "was registered by another program" in refusal(push(uri, "films/1", "someone/films"))
    assert hub.requests == []
