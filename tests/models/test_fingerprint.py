"""Fingerprints are equal for copies and differ as soon as anything that decides a score changes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import fingerprint as module
from models.adapters import add_lora
from models.config import LoraSettings, ModelConfig, ModelError
from models.fingerprint import Fingerprint, compute_fingerprint
from models.load import export_model, load_tokenizer, locate_model
from tests.support import tiny


def fingerprint_folder(folder: Path, **settings: Any) -> Fingerprint:
    arguments = {k: settings.pop(k) for k in ("template_kwargs", "device_type") if k in settings}
    config = ModelConfig(model=str(folder), **settings)
    files = locate_model(config)
    return compute_fingerprint(files, config, load_tokenizer(files, config), **arguments)


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "copy"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_copies_have_equal_fingerprints_whatever_wrote_them(tiny_llama_folder: Path, folder: Path) -> None:
    first = fingerprint_folder(tiny_llama_folder)
    assert len(first.digest) == 64
    edit_json(folder / "config.json", transformers_version="9.9", _name_or_path="elsewhere")
    (folder / "README.md").write_text("new")
    os.utime(folder / "model.safetensors", (1, 1))
    assert fingerprint_folder(folder) == first
    config = ModelConfig(model=str(folder))
    tokenizer = load_tokenizer(locate_model(config), config)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)  # changes the tokenizer's state
    assert compute_fingerprint(locate_model(config), config, tokenizer) == first


def replace_weights(folder: Path) -> None:
    tiny.llama(seed=9).save_pretrained(folder)


def swap_two_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


CHANGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "weights": (replace_weights, {"weights"}),
    "config": (lambda f: edit_json(f / "config.json", rms_norm_eps=1e-5), {"config"}),
    "template": (lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"), {"chat_template"}),
    "tokenizer": (swap_two_tokens, {"tokenizer"}),
    "eos": (lambda f: edit_json(f / "tokenizer_config.json", eos_token="<eos>"), {"tokenizer", "bos_eos"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_changes_the_fingerprint(name: str, folder: Path) -> None:
    before = fingerprint_folder(folder)
    change, parts = CHANGES[name]
    change(folder)
    after = fingerprint_folder(folder)
    assert after.digest != before.digest
    assert set(after.list_changed_parts(before)) == parts


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"device_type": "cuda"}, "dtype"),
        ({"template_kwargs": {"enable_thinking": False}}, "template_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"quantization": "8bit", "device_type": "cuda", "dtype": "bfloat16"}, "quantization"),
    ],
)
def test_a_changed_setting_changes_the_fingerprint(
    settings: dict[str, Any], part: str, tiny_llama_folder: Path
) -> None:
    assert part in fingerprint_folder(tiny_llama_folder, **settings).list_changed_parts(
        fingerprint_folder(tiny_llama_folder)
    )


def test_the_version_of_the_scoring_code_counts(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint_folder(tiny_llama_folder)
    monkeypatch.setattr(module, "SCORING_VERSION", module.SCORING_VERSION + 1)
    assert fingerprint_folder(tiny_llama_folder).list_changed_parts(before) == ["scoring"]


def test_an_adapter_counts_with_its_base(folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(model=str(folder))
    model = add_lora(tiny.llama(), LoraSettings(r=2))
    model.peft_config["default"].base_model_name_or_path = str(folder)
    adapter = export_model(model, load_tokenizer(locate_model(config), config), tmp_path / "adapter")
    first, base = fingerprint_folder(adapter), fingerprint_folder(folder)
    assert first.list_changed_parts(base) == ["adapter"]
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert fingerprint_folder(adapter, base=str(moved)) == first
    settings = json.loads((adapter / "adapter_config.json").read_text())
    edit_json(
        adapter / "adapter_config.json", target_modules=sorted(settings["target_modules"], reverse=True)
    )
    assert fingerprint_folder(adapter) == first
    edit_json(adapter / "adapter_config.json", lora_alpha=99)
    assert fingerprint_folder(adapter).list_changed_parts(first) == ["adapter"]
    replace_weights(folder)
    assert "weights" in fingerprint_folder(adapter).list_changed_parts(first)


def test_a_gguf_file_has_a_fingerprint(tiny_gguf_file: Path) -> None:
    assert fingerprint_folder(tiny_gguf_file).parts["config"] is None


def test_all_shards_count_and_none_may_be_missing(folder: Path) -> None:
    tiny.llama().save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    before = fingerprint_folder(folder)
    data = bytearray(shards[-1].read_bytes())
    data[-1] ^= 1
    shards[-1].write_bytes(data)
    assert fingerprint_folder(folder).list_changed_parts(before) == ["weights"]
    shards[-1].unlink()
    with pytest.raises(ModelError, match=r"is named by model.safetensors.index.json but missing"):
        fingerprint_folder(folder)


def test_the_whole_file_counts_where_an_index_names_others(folder: Path) -> None:
    """transformers loads model.safetensors where both are there."""
    shutil.copytree(folder, folder.with_name("shards"))
    tiny.llama(seed=4).save_pretrained(folder.with_name("shards"), max_shard_size="40KB")
    before = fingerprint_folder(folder)
    for file in folder.with_name("shards").glob("model*"):
        if file.name != "model.safetensors":
            shutil.copy(file, folder)
    assert (folder / "model.safetensors.index.json").exists()
    assert fingerprint_folder(folder) == before
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in tiny.llama().state_dict().items())


def test_parts_can_be_written_as_json(tiny_llama_folder: Path) -> None:
    parts = fingerprint_folder(tiny_llama_folder, template_kwargs={"a": [1]}).parts
    assert json.loads(json.dumps(parts)) == parts
    assert torch.float32 not in parts.values()
