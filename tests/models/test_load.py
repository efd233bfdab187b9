"""Locating, loading and exporting models; models that cannot work are refused with a remedy."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import T5Config

from models import locate as locating
from models.adapters import find_adapter, silence_known_warnings
from models.config import LoraSettings, ModelConfig, ModelError, PolicyConfig
from models.load import (
    build_empty_model,
    export_model,
    load_model,
    load_tokenizer,
    locate_model,
    read_model_limits,
)
from models.logprobs import Scorer
from models.rows import build_rows
from tests.support import tiny
from tests.support.plain_logits import GROUPS

ROWS = build_rows(GROUPS, shared=True, pad_id=0)


def compute_scores(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return Scorer(model)(ROWS).logps


def locate_and_load(config: ModelConfig, *, trainable: bool = False, seed: int = 0) -> torch.nn.Module:
    return load_model(locate_model(config), config, device="cpu", trainable=trainable, seed=seed)


@pytest.fixture
def adapter_folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter that is not zero, with its tokenizer."""
    config = PolicyConfig(model=str(tiny_llama_folder), adapter=LoraSettings(r=2))
    model = locate_and_load(config, trainable=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += 0.1
    return export_model(model, load_tokenizer(locate_model(config), config), tmp_path / "adapter")


def test_a_frozen_folder(tiny_gpt2_folder: Path) -> None:
    config = ModelConfig(model=str(tiny_gpt2_folder))
    files = locate_model(config)
    assert (files.path, files.kind, files.base_path, files.revision) == (
        tiny_gpt2_folder, "folder", None, None,
    )  # fmt: skip
    model = locate_and_load(config)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(compute_scores(model), compute_scores(tiny.gpt2()))
    assert {
        p.dtype
        for p in locate_and_load(ModelConfig(model=str(tiny_gpt2_folder), dtype="bfloat16")).parameters()
    } == {torch.bfloat16}


def test_a_fully_trained_policy_is_float32_and_without_dropout(tiny_gpt2_folder: Path) -> None:
    model = locate_and_load(PolicyConfig(model=str(tiny_gpt2_folder), dtype="bfloat16"), trainable=True)
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(compute_scores(model), Scorer(model)(ROWS).logps.detach())
    assert model.config.attn_pdrop == 0.1  # exports keep the original config


def test_a_lora_policy_keeps_its_base_in_its_dtype(tiny_llama_folder: Path) -> None:
    config = PolicyConfig(
        model=str(tiny_llama_folder), dtype="bfloat16", adapter=LoraSettings(r=2, dropout=0.5)
    )
    model = locate_and_load(config, trainable=True, seed=4)
    assert model.training
    assert {p.requires_grad: p.dtype for p in model.parameters()} == {
        True: torch.float32,
        False: torch.bfloat16,
    }
    again = locate_and_load(config, trainable=True, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_activation_checkpointing_is_switched_on(tiny_llama_folder: Path) -> None:
    config = PolicyConfig(model=str(tiny_llama_folder))
    model = load_model(
        locate_model(config), config, device="cpu", trainable=True, activation_checkpointing=True
    )
    assert model.is_activation_checkpointing


def test_an_adapter_folder(adapter_folder: Path, tiny_llama_folder: Path) -> None:
    config = ModelConfig(model=str(adapter_folder))
    files = locate_model(config)
    assert (files.kind, files.path, files.base_path) == ("adapter", adapter_folder, tiny_llama_folder)
    model = locate_and_load(config)
    assert isinstance(model, PeftModel)
    assert not any(p.requires_grad for p in model.parameters())
    assert not torch.allclose(compute_scores(model), compute_scores(tiny.llama()))
    assert load_tokenizer(files, config).chat_template == tiny.CHATML
    # As a policy it is merged, so that the policy starts as its own reference.
    policy = locate_and_load(PolicyConfig(model=str(adapter_folder)), trainable=True)
    assert find_adapter(policy) is None
    torch.testing.assert_close(compute_scores(policy), compute_scores(model), rtol=1e-5, atol=0.0)
    policy = locate_and_load(
        PolicyConfig(model=str(adapter_folder), adapter=LoraSettings(r=2)), trainable=True
    )
    torch.testing.assert_close(compute_scores(policy), compute_scores(model), rtol=1e-5, atol=0.0)


def test_an_adapter_whose_base_moved(adapter_folder: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    settings = json.loads((adapter_folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/gone/base"
    (adapter_folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ModelError, match=r"base of adapter .*/gone/base: there is no such.*give base: <model>"
    ):
        locate_model(ModelConfig(model=str(adapter_folder)))
    moved = ModelConfig(model=str(adapter_folder), base=str(tiny_llama_folder))
    assert not torch.allclose(compute_scores(locate_and_load(moved)), compute_scores(tiny.llama()))


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def mark(adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The adapter names a base with code of its own, and this is the file that the code makes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base, mark = tmp_path / "base", tmp_path / "mark"
    settings = json.loads((adapter_folder / "adapter_config.json").read_text())
    shutil.copytree(settings["base_model_name_or_path"], base)
    (base / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (base / "config.json").write_text(json.dumps(config))
    settings |= {"base_model_name_or_path": str(base), "revision": "refs/pr/1"}
    (adapter_folder / "adapter_config.json").write_text(json.dumps(settings))
    return mark


def test_trust_in_an_adapter_is_none_in_the_base_that_it_names(adapter_folder: Path, mark: Path) -> None:
    config = ModelConfig(model=str(adapter_folder), trust_remote_code=True)
    files = locate_model(config)
    assert files.trusted == (adapter_folder,)
    for load in (read_model_limits, build_empty_model, partial(load_model, device="cpu", trainable=False)):
        with pytest.raises(ModelError):
            load(files, config)
    with pytest.raises(ModelError, match=r"base brings code of its own.*read the code, then.*base: <model>"):
        read_model_limits(files, config)
    untrusting = ModelConfig(model=str(adapter_folder))
    with pytest.raises(ModelError, match=r"then set base: <model> and trust_remote_code: true"):
        read_model_limits(locate_model(untrusting), untrusting)
    for file in adapter_folder.glob("tokenizer*"):
        file.unlink()
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (mark.with_name("base") / "tokenizer_config.json").write_text(json.dumps(own))
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded.*base brings code of its own"):
        load_tokenizer(files, config)
    assert not mark.exists()


def test_a_base_that_the_user_names_may_run_code(
    adapter_folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = mark.with_name("base")
    config = ModelConfig(model=str(adapter_folder), base=str(base), trust_remote_code=True)
    load_model(locate_model(config), config, device="cpu", trainable=False)
    assert mark.exists()
    # On the hub it is not the revision that the adapter names, which may be anybody's pull request.
    requested: list[dict[str, object]] = []

    def download(_: str, **arguments: object) -> str:
        requested.append(arguments)
        return str(base)

    monkeypatch.setattr(locating, "snapshot_download", download)
    config = ModelConfig(model=str(adapter_folder), base="owner/base", trust_remote_code=True)
    assert locate_model(config).trusted == (adapter_folder, base)
    assert requested[0]["revision"] is None


def test_an_adapter_without_a_weight_or_on_another_base(adapter_folder: Path, tiny_gpt2_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"does not fit its base .*give the base it was trained on"):
        locate_and_load(ModelConfig(model=str(adapter_folder), base=str(tiny_gpt2_folder)))
    weights = load_file(adapter_folder / "adapter_model.safetensors")
    gone = sorted(weights)[0]
    weights.pop(gone)
    save_file(weights, adapter_folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 weights that its config requires"):
        locate_and_load(ModelConfig(model=str(adapter_folder)))
    (adapter_folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors; pickled weights"):
        locate_model(ModelConfig(model=str(adapter_folder)))


def test_virtual_tokens_are_refused(tmp_path: Path) -> None:
    with silence_known_warnings():
        model = get_peft_model(tiny.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="PROMPT_TUNING adapters add virtual tokens"):
        locate_model(ModelConfig(model=str(tmp_path)))


def test_a_gguf_file_gives_the_same_model_and_can_be_exported(tiny_gguf_file: Path, tmp_path: Path) -> None:
    config = ModelConfig(model=str(tiny_gguf_file))
    files = locate_model(config)
    assert (files.kind, files.path) == ("gguf", tiny_gguf_file)
    assert locate_model(ModelConfig(model=str(tiny_gguf_file.parent))) == files
    assert locate_model(ModelConfig(model=str(tiny_gguf_file.parent), gguf_file=tiny_gguf_file.name)) == files
    model, tokenizer = locate_and_load(config), load_tokenizer(files, config)
    assert torch.equal(compute_scores(model), compute_scores(tiny.llama()))
    assert tokenizer("hello")["input_ids"] == tiny.byte_tokenizer()("hello")["input_ids"]
    assert tokenizer.chat_template == tiny.CHATML
    folder = export_model(model, tokenizer, tmp_path / "plain")
    assert torch.equal(compute_scores(locate_and_load(ModelConfig(model=str(folder)))), compute_scores(model))


def test_one_of_several_gguf_files_must_be_chosen(tiny_gguf_file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(tiny_gguf_file, tmp_path / name)
    with pytest.raises(ModelError, match=r"several GGUF files; choose one as gguf_file: a.gguf \| b.gguf"):
        locate_model(ModelConfig(model=str(tmp_path)))
    with pytest.raises(ModelError, match=r"no file c.gguf; its GGUF files: a.gguf, b.gguf"):
        locate_model(ModelConfig(model=str(tmp_path), gguf_file="c.gguf"))


def test_an_export_replaces_an_earlier_one_completely(tiny_llama_folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(model=str(tiny_llama_folder))
    folder, tokenizer = tmp_path / "out", load_tokenizer(locate_model(config), config)
    export_model(tiny.llama(seed=1), tokenizer, folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"stale")
    (folder / "notes.txt").write_text("kept")
    export_model(tiny.llama(), tokenizer, folder)
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert (folder / "notes.txt").exists()
    assert torch.equal(
        compute_scores(locate_and_load(ModelConfig(model=str(folder)))), compute_scores(tiny.llama())
    )
    assert list(tmp_path.iterdir()) == [folder]


def test_a_tokenizer_with_another_template(tiny_gpt2_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(tiny.CHATML)
    for template in (str(tmp_path / "t.jinja"), tiny.CHATML):
        config = ModelConfig(model=str(tiny_gpt2_folder), chat_template=template)
        assert load_tokenizer(locate_model(config), config).chat_template == tiny.CHATML
    config = ModelConfig(model=str(tiny_gpt2_folder), chat_template="nowhere.jinja")
    with pytest.raises(ModelError, match=r"chat_template nowhere.jinja: there is no such file"):
        load_tokenizer(locate_model(config), config)


def test_paths_without_a_model_are_refused(tmp_path: Path, tiny_llama_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"/nope: there is no such file or folder; correct the path"):
        locate_model(ModelConfig(model=str(tmp_path / "nope")))
    with pytest.raises(ModelError, match=r"is not a model folder: it has no config.json"):
        locate_model(ModelConfig(model=str(tmp_path)))
    with pytest.raises(ModelError, match=r"a single file must be a .gguf file; give the model's folder"):
        locate_model(ModelConfig(model=str(tiny_llama_folder / "config.json")))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"cannot be read as JSON"):
        locate_model(ModelConfig(model=str(tmp_path)))


def test_pickled_weights_are_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama_folder / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"has no \*.safetensors weights; copy them there"):
        locate_model(ModelConfig(model=str(tmp_path)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickled \(.bin\).*convert them once with"):
        locate_model(ModelConfig(model=str(tmp_path)))


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    T5Config(d_model=8).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"\(t5\) is an encoder-decoder; use a decoder-only"):
        locate_model(ModelConfig(model=str(tmp_path)))


def test_missing_weights_are_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_llama_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"1 weights are missing from .*model.norm.weight; they would be random"
    ):
        locate_and_load(ModelConfig(model=str(folder)))
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read as safetensors"):
        locate_and_load(ModelConfig(model=str(folder)))


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    config = ModelConfig(model=str(tmp_path))
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded .*put its files \(tokenizer.json"):
        load_tokenizer(locate_model(config), config)


def test_hub_models_are_pinned_and_their_absence_explained(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ModelError, match=r"model nobody/nothing is not in the hub's cache here .*local folder"
    ):
        locate_model(ModelConfig(model="nobody/nothing"))
    with pytest.raises(ModelError, match=r"neither an existing path nor a hub id"):
        locate_model(ModelConfig(model="not a model!"))

    snapshot = tmp_path / "0123abcd"
    shutil.copytree(tiny_llama_folder, snapshot)
    asked = {}

    def download(repository: str, **settings: object) -> str:
        asked.update(settings, repository=repository)
        if settings["revision"] == "unknown":
            raise LocalEntryNotFoundError("nothing cached")
        return str(snapshot)

    monkeypatch.setattr(locating, "snapshot_download", download)
    files = locate_model(ModelConfig(model="org/name", revision="main"))
    assert (files.path, files.revision, asked["repository"]) == (snapshot, "0123abcd", "org/name")
    assert "*.py" not in asked["allow_patterns"]
    assert "README.md" in asked["allow_patterns"]  # it states the licence
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    with pytest.raises(ModelError, match="nothing cached"):
        locate_model(ModelConfig(model="org/name", revision="unknown"))


def test_flex_and_unsuitable_quantisation_are_refused(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="attention: flex has no backward pass on a CPU"):
        locate_and_load(ModelConfig(model=str(tiny_llama_folder), attention="flex"))

    # Which shapes bitsandbytes' kernels take depends on the processor, so the fault is made here.
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel for this shape")

    linear = pytest.importorskip("bitsandbytes").nn.Linear4bit
    monkeypatch.setattr(linear, "forward", fail)
    with pytest.raises(
        ModelError, match=r"quantization 4bit does not run on cpu here .*no kernel.*set quantization: none"
    ):
        locate_and_load(ModelConfig(model=str(tiny_llama_folder), quantization="4bit"))


def test_a_quantised_model_scores_nearly_the_same(tmp_path: Path) -> None:
    wide = tiny.llama(hidden_size=128, intermediate_size=128)
    tiny.save(tmp_path, wide, tiny.byte_tokenizer())
    model = locate_and_load(ModelConfig(model=str(tmp_path), quantization="4bit"))
    exact, found = compute_scores(wide), compute_scores(model)
    assert not torch.equal(found, exact)
    assert ((found - exact) / exact).abs().max() < 0.5
    policy = PolicyConfig(model=str(tmp_path), quantization="4bit", adapter=LoraSettings(r=2))
    with pytest.raises(ModelError, match="a quantised policy trains on a GPU only; set quantization: none"):
        locate_and_load(policy, trainable=True)
