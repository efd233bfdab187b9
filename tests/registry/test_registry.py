"""What a `models:/` URI stands for."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.config import ModelError
from orchestrator.errors import UsageError
from orchestrator.registry.download import (
    DamagedError,
    ResolvedModel,
    copy_merged_version,
    copy_version,
    is_adapter_folder,
    resolve_model,
)
from orchestrator.registry.register import register_model
from orchestrator.tracking.mlflow import connect_to_mlflow
from tests.support import tiny
from tests.support.policies import Exported, lineage


@pytest.fixture
def registered(uri: str, run_id: str, policy: Exported) -> ResolvedModel:
    return register_model(
        uri,
        name="sentiment",
        folder=policy.merged,
        adapter=policy.adapter,
        run_id=run_id,
        lineage=lineage(),
        probe=policy.probe,
        alias="champion",
    )


@pytest.mark.parametrize("ref", ["models:/sentiment@champion", "models:/sentiment/1", "sentiment/1"])
def test_alias_and_version(uri: str, registered: ResolvedModel, run_id: str, ref: str) -> None:
    found = resolve_model(ref, uri)
    assert found == registered
    assert found.uri_pinned == "models:/sentiment/1"
    assert found.run_id == run_id
    assert (found.folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("models:/sentiment", r"leaves the version open: choose one of sentiment@champion, sentiment/1"),
        ("models:/sentiment@winner", r"not in the registry: choose one of sentiment@champion, sentiment/1"),
        ("models:/sentiment/7", "not in the registry: choose one of sentiment@champion"),
        ("models:/sentimant@champion", "no registered model is called 'sentimant'.*sentiment"),
        ("models:/sentiment/latest", "names no registered model: write models:/NAME@ALIAS"),
        ("runs:/0/model", "names no registered model"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    uri: str, registered: ResolvedModel, ref: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_model(ref, uri)


def test_an_empty_registry(uri: str) -> None:
    with pytest.raises(UsageError, match="the registry is empty"):
        resolve_model("models:/sentiment@champion", uri)


def test_an_alias_moves_and_a_pin_does_not(uri: str, registered: ResolvedModel, run_id: str) -> None:
    client = connect_to_mlflow(uri)
    source = client.get_model_version("sentiment", "1").source
    client.create_model_version("sentiment", source, run_id)
    client.set_registered_model_alias("sentiment", "champion", "2")
    assert resolve_model("models:/sentiment@champion", uri).version == 2
    assert resolve_model(registered.uri_pinned, uri).version == 1


def test_a_model_logged_by_mlflow_itself_gets_its_tokenizer(
    uri: str, exported: Exported, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported.merged)
    tokenizer = AutoTokenizer.from_pretrained(exported.merged)
    folder = tmp_path / "theirs"
    mlflow.transformers.save_model(
        {"model": model, "tokenizer": tokenizer},
        str(folder),
        task="text-generation",
        pip_requirements=["torch"],
    )
    client = connect_to_mlflow(uri)
    client.create_registered_model("theirs")
    client.create_model_version("theirs", folder.as_uri())
    found = resolve_model("models:/theirs/1", uri, cache=tmp_path / "cache")
    assert found.run_id is None
    assert found.digest is None
    assert AutoTokenizer.from_pretrained(found.folder)("ab")["input_ids"] == tokenizer("ab")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(found.folder)(input_ids=exported.probe.rows).logits
    torch.testing.assert_close(logits, exported.probe.logits, rtol=0, atol=1e-5)
    assert resolve_model("models:/theirs/1", uri, cache=tmp_path / "cache") == found


def test_plain_transformers_folders_and_what_is_no_model(
    uri: str, exported: Exported, tmp_path: Path
) -> None:
    client = connect_to_mlflow(uri)
    client.create_registered_model("raw")
    client.create_model_version("raw", exported.merged.as_uri())
    assert resolve_model("models:/raw/1", uri).folder == exported.merged
    (tmp_path / "nothing").mkdir()
    client.create_model_version("raw", (tmp_path / "nothing").as_uri())
    with pytest.raises(UsageError, match="models:/raw/2 holds no transformers model"):
        resolve_model("models:/raw/2", uri)


def _theirs(uri: str, folder: Path) -> str:
    """A version that another program registered: files, no tags."""
    client = connect_to_mlflow(uri)
    if not client.search_registered_models("name='theirs'"):
        client.create_registered_model("theirs")
    return f"models:/theirs/{client.create_model_version('theirs', folder.as_uri()).version}"


@pytest.mark.parametrize("layout", ["plain", "mlflow"])
def test_an_adapter_that_others_registered_is_merged_into_its_base(
    uri: str, exported: Exported, tmp_path: Path, layout: str
) -> None:
    lora = tmp_path / "theirs" if layout == "plain" else tmp_path / "theirs" / "peft"
    shutil.copytree(exported.adapter, lora)
    if layout == "mlflow":
        AutoTokenizer.from_pretrained(exported.merged).save_pretrained(
            tmp_path / "theirs" / "components" / "tokenizer"
        )
    model = resolve_model(_theirs(uri, tmp_path / "theirs"), uri, cache=tmp_path / "cache")
    assert is_adapter_folder(model.folder)
    copy_version(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(exported.base)
    assert PeftModel.from_pretrained(base, tmp_path / "adapter")

    copy_merged_version(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = merged(input_ids=exported.probe.rows).logits
    torch.testing.assert_close(logits, exported.probe.logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("ab")["input_ids"]
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_an_adapter_whose_base_has_moved(uri: str, exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.adapter, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone/base"
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    half = AutoModelForCausalLM.from_pretrained(exported.base, dtype=torch.bfloat16)
    tiny.save(tmp_path / "base", half, tiny.byte_tokenizer())
    model = resolve_model(_theirs(uri, tmp_path / "theirs"), uri)
    with pytest.raises(ModelError, match="give base: <model>"):
        copy_merged_version(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    copy_merged_version(model, tmp_path / "merged", base=str(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16  # its base's


def test_files_that_are_gone(uri: str, registered: ResolvedModel, tmp_path: Path) -> None:
    shutil.rmtree(registered.folder.parent)
    with pytest.raises(
        UsageError, match=r"cannot be downloaded from .*check that the artifact store is reachable"
    ):
        resolve_model(registered.uri_pinned, uri, cache=tmp_path / "cache")


def test_fetch_copies_all_and_only_what_was_registered(registered: ResolvedModel, tmp_path: Path) -> None:
    copy_version(registered, tmp_path / "new" / "copy")
    names = {p.relative_to(registered.folder) for p in registered.folder.rglob("*")}
    assert {p.relative_to(tmp_path / "new" / "copy") for p in (tmp_path / "new" / "copy").rglob("*")} == names
    (tmp_path / "empty").mkdir()
    copy_version(registered, tmp_path / "empty")
    with pytest.raises(UsageError, match="is not an empty folder"):
        copy_version(registered, tmp_path / "empty")


def test_fetch_refuses_files_changed_since(registered: ResolvedModel, tmp_path: Path) -> None:
    with (registered.folder / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(DamagedError, match="are not those that were registered"):
        copy_version(registered, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.glob(".copy.*"))
