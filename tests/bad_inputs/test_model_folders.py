"""Model folders that make no model: each is refused by one line before any device is taken."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.config import LoraSettings, ModelConfig, ModelError, PolicyConfig
from models.load import load_model, locate_model
from tests.support import tiny
from tests.support.bad_inputs import Commands, Workplace

Spoil = Callable[[Path], object]


def change_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def set_config(**changes: Any) -> Spoil:
    return lambda folder: change_json(folder / "config.json", **changes)


def set_tokenizer(**changes: Any) -> Spoil:
    return lambda folder: change_json(folder / "tokenizer_config.json", **changes)


def write(name: str, content: bytes | str) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, share: float = 0.5) -> Spoil:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def delete(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def replace(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def change_weights(
    change: Callable[[dict[str, torch.Tensor]], object], name: str = "model.safetensors"
) -> Spoil:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name, metadata={"format": "pt"})

    return spoil


def write_header(header: bytes, length: int | None = None) -> Spoil:
    return write("model.safetensors", struct.pack("<Q", len(header) if length is None else length) + header)


def write_index(content: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return spoil


def keep_only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def entry(**changes: Any) -> bytes:
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return json.dumps({"model.norm.weight": good | changes}).encode()


HUGE = 10**12
SMALL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NEST = '{"a":' * 5000
WEIGHTS = "model.safetensors"

CASES: list[tuple[str, Spoil, list[str]]] = [
    # ---- config.json ----
    ("config missing", delete("config.json"), ["config.json"]),
    ("config empty", write("config.json", ""), ["config.json", "JSON"]),
    ("config binary", write("config.json", b"\xff\xfe\0"), ["config.json", "JSON"]),
    ("config a list", write("config.json", "[]"), ["config.json", "object"]),
    ("config nested", write("config.json", NEST), ["config.json", "JSON"]),
    ("config of a long number", write("config.json", f'{{"a": {"9" * 5000}}}'), ["config.json", "JSON"]),
    ("config with nothing", write("config.json", "{}"), ["config.json", "model_type"]),
    ("unknown model_type", set_config(model_type="lama"), ["lama"]),
    ("model_type a number", set_config(model_type=3), ["config.json"]),
    ("model_type a list", set_config(model_type=["llama"]), ["config.json"]),
    ("model_type null", set_config(model_type=None), ["config.json"]),
    ("model_type of another model", set_config(model_type="gpt2"), ["missing"]),
    ("model_type of a picture model", set_config(model_type="vit"), []),
    ("hidden_size a text", set_config(hidden_size="a"), ["hidden_size"]),
    ("hidden_size below 0", set_config(hidden_size=-1), ["config.json"]),
    ("hidden_size 0", set_config(hidden_size=0), ["config.json"]),
    ("hidden_size null", set_config(hidden_size=None), ["hidden_size"]),
    ("hidden_size a fraction", set_config(hidden_size=32.5), ["hidden_size"]),
    ("hidden_size of another model", set_config(hidden_size=64), ["[261, 32]", "[261, 64]"]),
    ("hidden_size huge", set_config(hidden_size=HUGE), ["config.json"]),
    ("vocab_size 0", set_config(vocab_size=0), ["config.json"]),
    ("vocab_size below 0", set_config(vocab_size=-5), ["config.json"]),
    ("vocab_size a text", set_config(vocab_size="many"), ["vocab_size"]),
    ("vocab_size smaller than the weights'", set_config(vocab_size=259), ["[261, 32]", "[259, 32]"]),
    ("no heads", set_config(num_attention_heads=0), ["config.json"]),
    ("heads that do not divide", set_config(num_attention_heads=5), ["config.json"]),
    ("key heads that do not divide", set_config(num_key_value_heads=3), ["config.json"]),
    ("no layers", set_config(num_hidden_layers=0), ["layers"]),
    ("layers below 0", set_config(num_hidden_layers=-1), ["layers"]),
    ("more layers than weights", set_config(num_hidden_layers=3), ["missing", "layers.2"]),
    ("a billion layers", set_config(num_hidden_layers=10**9), ["num_hidden_layers", "1000000000"]),
    ("layers as a list", set_config(num_hidden_layers=[2]), ["num_hidden_layers"]),
    ("positions a text", set_config(max_position_embeddings="long"), ["max_position_embeddings"]),
    ("positions 0", set_config(max_position_embeddings=0), ["max_position_embeddings"]),
    ("positions below 0", set_config(max_position_embeddings=-3), ["max_position_embeddings"]),
    ("unknown activation", set_config(hidden_act="relux"), ["relux"]),
    ("unknown dtype", set_config(dtype="float7"), ["float7"]),
    (
        "rope of unknown type",
        set_config(rope_parameters={"rope_type": "x", "rope_theta": 1e4}),
        ["config.json"],
    ),
    ("rope a text", set_config(rope_parameters="long"), ["config.json"]),
    ("padding id beyond the vocabulary", set_config(pad_token_id=9999), ["config.json"]),
    ("an encoder-decoder", set_config(is_encoder_decoder=True), ["encoder-decoder"]),
    (
        "code of its own",
        set_config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        ["code of its own"],
    ),
    ("config a pipe", replace("config.json", os.mkfifo), ["config.json", "pipe"]),
    (
        "config a device",
        replace("config.json", lambda f: f.symlink_to("/dev/zero")),
        ["config.json", "device"],
    ),
    ("config a folder", replace("config.json", Path.mkdir), ["config.json"]),
    ("config a link in a circle", replace("config.json", lambda f: f.symlink_to(f)), ["config.json", "link"]),
    # ---- weights ----
    ("no weights", delete(WEIGHTS), ["safetensors"]),
    ("only pickled weights", keep_only_pickle, ["pickled", "convert"]),
    (
        "weights of another name",
        lambda f: (f / WEIGHTS).rename(f / "weights.safetensors"),
        ["weights.safetensors"],
    ),
    ("weights empty", write(WEIGHTS, b""), [WEIGHTS, "header"]),
    ("weights cut", cut(WEIGHTS), [WEIGHTS, "incomplete"]),
    ("weights cut by a byte", cut(WEIGHTS, 0.99999), [WEIGHTS, "incomplete"]),
    ("weights longer than their header says", lambda f: (f / WEIGHTS).open("ab").write(b"0"), [WEIGHTS]),
    (
        "weights a text",
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid 1\n"),
        [WEIGHTS, "git lfs pull"],
    ),
    ("header longer than the file", write_header(b"{}", 2**20), [WEIGHTS]),
    ("header of 2**63 bytes", write_header(b"{}", 2**63), [WEIGHTS, "too large"]),
    ("header of 0 bytes", write_header(b"", 0), [WEIGHTS]),
    ("header not JSON", write_header(b"{a"), [WEIGHTS, "JSON"]),
    ("header a list", write_header(b"[]"), [WEIGHTS, "JSON"]),
    ("header nested", write_header(NEST.encode()), [WEIGHTS]),
    ("header with nothing", write_header(b"{}"), ["0 tensors"]),
    ("a weight of unknown dtype", write_header(entry(dtype="F7")), [WEIGHTS]),
    ("a weight outside the file", write_header(entry(data_offsets=[0, 800])), [WEIGHTS]),
    ("a weight that ends before it begins", write_header(entry(data_offsets=[8, 0])), [WEIGHTS]),
    ("a weight of another size", write_header(entry(shape=[3])), [WEIGHTS]),
    (
        "a weight is missing",
        change_weights(lambda w: w.pop("model.norm.weight")),
        ["missing", "model.norm.weight"],
    ),
    (
        "a weight of another shape",
        change_weights(lambda w: w.update({"model.norm.weight": torch.zeros(7)})),
        ["model.norm.weight", "[7]", "[32]"],
    ),
    ("weights a pipe", replace(WEIGHTS, os.mkfifo), [WEIGHTS, "pipe"]),
    ("weights a device", replace(WEIGHTS, lambda f: f.symlink_to("/dev/zero")), [WEIGHTS, "device"]),
    ("weights a folder", replace(WEIGHTS, Path.mkdir), [WEIGHTS]),
    (
        "index not JSON",
        lambda f: (write_index({})(f), write("model.safetensors.index.json", "{")(f)),
        ["index.json"],
    ),
    ("index a list", write_index([]), ["index.json", "object"]),
    ("index without a map", write_index({"metadata": {}}), ["index.json", "weight_map"]),
    ("index with an empty map", write_index({"weight_map": {}}), ["index.json", "weight_map"]),
    ("index of numbers", write_index({"weight_map": {"a": 1}}), ["index.json", "weight_map"]),
    (
        "index of a file outside",
        write_index({"weight_map": {"a": "../x.safetensors"}}),
        ["'../x.safetensors'"],
    ),
    ("index of an absolute path", write_index({"weight_map": {"a": "/x.safetensors"}}), ["'/x.safetensors'"]),
    (
        "index of a missing file",
        write_index({"weight_map": {"a": "b.safetensors"}}),
        ["b.safetensors", "missing"],
    ),
    ("index that names a text", write_index({"weight_map": {"a": "config.json"}}), ["config.json"]),
    (
        "index of a weight that is not there",
        write_index({"weight_map": {"a": "model-00001-of-00001.safetensors"}}),
        [],
    ),
    # ---- tokenizer ----
    ("no tokenizer", delete("tokenizer.json", "tokenizer_config.json"), ["tokenizer"]),
    ("tokenizer.json missing", delete("tokenizer.json"), ["tokenizer"]),
    ("tokenizer.json empty", write("tokenizer.json", ""), ["tokenizer"]),
    ("tokenizer.json binary", write("tokenizer.json", b"\xff\0\xfe"), ["tokenizer"]),
    ("tokenizer.json cut", cut("tokenizer.json"), ["tokenizer"]),
    ("tokenizer.json a list", write("tokenizer.json", "[]"), ["tokenizer"]),
    ("tokenizer.json with nothing", write("tokenizer.json", "{}"), ["tokenizer"]),
    ("tokenizer.json nested", write("tokenizer.json", NEST), ["tokenizer"]),
    ("tokenizer.json a pipe", replace("tokenizer.json", os.mkfifo), ["tokenizer.json", "pipe"]),
    ("tokenizer_config a list", write("tokenizer_config.json", "[]"), ["tokenizer"]),
    ("tokenizer_config binary", write("tokenizer_config.json", b"\xff"), ["tokenizer"]),
    ("tokenizer_config cut", cut("tokenizer_config.json"), ["tokenizer"]),
    ("tokenizer_config nested", write("tokenizer_config.json", NEST), ["tokenizer"]),
    ("tokenizer class a number", set_tokenizer(tokenizer_class=3), ["tokenizer"]),
    ("eos a number", set_tokenizer(eos_token=3), ["tokenizer"]),
    ("eos a list", set_tokenizer(eos_token=["a"]), ["tokenizer"]),
    ("no eos", set_tokenizer(eos_token=None), ["EOS"]),
    ("longest text a text", set_tokenizer(model_max_length="long"), ["tokenizer"]),
    ("template a number", set_tokenizer(chat_template=5), ["tokenizer"]),
    ("added tokens a list", set_tokenizer(added_tokens_decoder=[1]), ["tokenizer"]),
    ("added tokens of text ids", set_tokenizer(added_tokens_decoder={"a": {"content": "b"}}), ["tokenizer"]),
]


@pytest.mark.parametrize(("spoil", "says"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_a_model_folder_is_refused(
    workplace: Workplace, commands: Commands, tiny_llama_folder: Path, spoil: Spoil, says: list[str]
) -> None:
    folder = workplace.folder / "model"
    shutil.copytree(tiny_llama_folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    spoil(folder)
    workplace.write_run(references={"models": {"base": {"model": "model"}}})
    commands.refuse("check", workplace.file, says=["model", *says])


# ---- adapters ----

ADAPTER = "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def tiny_adapter_folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    config = PolicyConfig(model=str(tiny_llama_folder), adapter=LoraSettings(r=2))
    folder = tmp_path_factory.mktemp("tiny") / "adapter"
    load_model(locate_model(config), config, device="cpu", trainable=True).save_pretrained(folder)
    return folder


def set_adapter(**changes: Any) -> Spoil:
    return lambda folder: change_json(folder / "adapter_config.json", **changes)


def save_bad_base(folder: Path) -> None:
    shutil.copytree(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"], folder / "base"
    )
    cut(WEIGHTS)(folder / "base")
    set_adapter(base_model_name_or_path="base")(folder)


def link_two_adapters(folder: Path) -> None:
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    set_adapter(base_model_name_or_path=str(other))(folder)
    set_adapter(base_model_name_or_path=str(folder))(other)


ADAPTERS: list[tuple[str, Spoil, list[str]]] = [
    ("its base is itself", set_adapter(base_model_name_or_path="."), ["base", "adapter itself"]),
    ("two adapters are each other's base", link_two_adapters, ["base", "adapter itself"]),
    (
        "its base is missing",
        set_adapter(base_model_name_or_path="/none/model"),
        ["/none/model", "base: <model>"],
    ),
    ("its base is empty", set_adapter(base_model_name_or_path=""), ["names no base"]),
    ("its base is null", set_adapter(base_model_name_or_path=None), ["names no base"]),
    ("its base is a number", set_adapter(base_model_name_or_path=3), ["names no base"]),
    ("its base is a list", set_adapter(base_model_name_or_path=["a"]), ["names no base"]),
    ("its base has a long name", set_adapter(base_model_name_or_path="x" * 5000), ["path"]),
    ("its base has a NUL", set_adapter(base_model_name_or_path="a\0b"), ["base"]),
    ("its base is of nobody", set_adapter(base_model_name_or_path="~nouser/base"), ["base"]),
    ("its base is in the registry", set_adapter(base_model_name_or_path="models:/base/1"), ["base"]),
    ("its base is damaged", save_bad_base, ["base", WEIGHTS]),
    ("its revision is a number", set_adapter(revision=3), ["adapter_config.json"]),
    ("config a list", write("adapter_config.json", "[]"), ["adapter_config.json", "object"]),
    ("config binary", write("adapter_config.json", b"\xff\0"), ["adapter_config.json", "JSON"]),
    ("config nested", write("adapter_config.json", NEST), ["adapter_config.json", "JSON"]),
    ("config cut", cut("adapter_config.json"), ["adapter_config.json", "JSON"]),
    ("config a pipe", replace("adapter_config.json", os.mkfifo), ["adapter_config.json", "pipe"]),
    ("unknown kind", set_adapter(peft_type="LORAX"), ["LORAX"]),
    ("no kind", set_adapter(peft_type=...), ["does not fit"]),
    ("rank a text", set_adapter(r="two"), ["does not fit"]),
    ("rank 0", set_adapter(r=0), ["does not fit"]),
    ("rank of another adapter", set_adapter(r=4), [FIRST.split(".", 3)[-1], "[2, 32]", "[4, 32]"]),
    ("layers that the base does not have", set_adapter(target_modules=["none"]), ["none"]),
    ("other layers than its weights'", set_adapter(target_modules=["q_proj"]), ["no module", "lora"]),
    ("no weights", delete(ADAPTER), [ADAPTER]),
    ("weights empty", write(ADAPTER, b""), [ADAPTER, "header"]),
    ("weights cut", cut(ADAPTER), [ADAPTER, "incomplete"]),
    ("weights a pipe", replace(ADAPTER, os.mkfifo), [ADAPTER, "pipe"]),
    ("a weight is missing", change_weights(lambda w: w.pop(FIRST), ADAPTER), ["lacks 1 weights"]),
    (
        "a weight of another shape",
        change_weights(lambda w: w.update({FIRST: torch.zeros(2, 33)}), ADAPTER),
        ["[2, 33]", "[2, 32]"],
    ),
]


@pytest.mark.parametrize(("spoil", "says"), [pytest.param(*case[1:], id=case[0]) for case in ADAPTERS])
def test_an_adapter_is_refused(
    workplace: Workplace, commands: Commands, tiny_adapter_folder: Path, spoil: Spoil, says: list[str]
) -> None:
    folder = workplace.folder / "adapter"
    shutil.copytree(tiny_adapter_folder, folder)
    spoil(folder)
    workplace.write_run(references={"models": {"base": {"model": "adapter"}}})
    commands.refuse("check", workplace.file, says=["references.models.base", "adapter", *says])


# ---- GGUF files, and what is no model ----


def write_gguf(version: int = 3, tensors: int = 0, settings: int = 0) -> Spoil:
    return write("a.gguf", b"GGUF" + struct.pack("<IQQ", version, tensors, settings))


OTHERS: list[tuple[str, str, Spoil, list[str]]] = [
    ("GGUF empty", "a.gguf", write("a.gguf", b""), ["a.gguf"]),
    ("GGUF a text", "a.gguf", write("a.gguf", "a text"), ["a.gguf"]),
    ("GGUF with its mark alone", "a.gguf", write("a.gguf", b"GGUF"), ["a.gguf"]),
    (
        "GGUF of an unknown version",
        "a.gguf",
        write_gguf(version=99),
        ["a.gguf"],
    ),
    (
        "GGUF of 2**63 tensors",
        "a.gguf",
        write_gguf(tensors=2**63),
        ["a.gguf"],
    ),
    (
        "GGUF of 2**63 settings",
        "a.gguf",
        write_gguf(settings=2**63),
        ["a.gguf"],
    ),
    ("GGUF without a setting", "a.gguf", write_gguf(), ["a.gguf"]),
    ("GGUF a pipe", "a.gguf", lambda f: os.mkfifo(f / "a.gguf"), ["a.gguf", "pipe"]),
    ("GGUF a device", "a.gguf", lambda f: (f / "a.gguf").symlink_to("/dev/zero"), ["/dev/zero", ".gguf"]),
    ("GGUF a folder", "a.gguf", lambda f: (f / "a.gguf").mkdir(), ["a.gguf"]),
    ("GGUF missing", "a.gguf", lambda f: None, ["a.gguf", "no such file"]),
    ("an empty folder", "empty", lambda f: (f / "empty").mkdir(), ["empty", "config.json"]),
    ("a file", "pairs.jsonl", lambda f: None, ["pairs.jsonl", ".gguf"]),
    ("a pipe", "pipe", lambda f: os.mkfifo(f / "pipe"), ["pipe"]),
    ("a device", "/dev/zero", lambda f: None, ["/dev/zero"]),
    ("a link in a circle", "./loop", lambda f: (f / "loop").symlink_to("loop"), ["loop"]),
    ("a name of 300 characters", "./" + "x" * 300, lambda f: None, ["path"]),
    ("a name with a NUL", "./a\0b", lambda f: None, ["model"]),
    ("a folder of nobody", "~nouser/model", lambda f: None, ["~nouser"]),
    ("a number", "12", lambda f: None, ["12"]),
    ("a URL", "https://huggingface.co/gpt2", lambda f: None, ["https"]),
    ("a name with blanks", "my model", lambda f: None, ["my model"]),
]


@pytest.mark.parametrize(("model", "make", "says"), [pytest.param(*case[1:], id=case[0]) for case in OTHERS])
def test_what_is_no_model_is_refused(
    workplace: Workplace, commands: Commands, model: str, make: Spoil, says: list[str]
) -> None:
    make(workplace.folder)
    workplace.write_run(policy={"model": model})
    commands.refuse("check", workplace.file, says=["policy", *says])


def test_a_gguf_file_that_is_cut_is_refused(
    workplace: Workplace, commands: Commands, tiny_gguf_file: Path
) -> None:
    for share in (0.2, 0.6):
        shutil.copy(tiny_gguf_file, workplace.folder / "a.gguf")
        cut("a.gguf", share)(workplace.folder)
        workplace.write_run(policy={"model": "a.gguf"})
        commands.refuse("check", workplace.file, says=["policy", "a.gguf"])


def test_a_tokenizer_of_another_model_is_refused(
    workplace: Workplace, commands: Commands, tiny_llama_folder: Path
) -> None:
    tiny.save(workplace.folder / "small", tiny.llama(vocab_size=200, **SMALL_IDS), tiny.byte_tokenizer())
    workplace.write_run(references={"models": {"base": {"model": "small"}}})
    commands.refuse("check", workplace.file, says=["references.models.base", "256 tokens", "200"])


def test_weights_that_are_not_finite_are_refused_when_they_are_loaded(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_folder, tmp_path / "model")
    change_weights(lambda w: w["model.norm.weight"].fill_(float("nan")))(tmp_path / "model")
    config = ModelConfig(model=str(tmp_path / "model"))
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*not finite.*copy or download"):
        load_model(locate_model(config), config, device="cpu", trainable=False)
