"""Settings every test needs before the heavy imports, and tiny model folders shared by all tests."""

import os

# One thread: several threads are slower on small models, and float sums then depend on the machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Nothing in a test may reach a hub or a telemetry host.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.pop("MLFLOW_TRACKING_URI", None)

from pathlib import Path

import pytest
import torch

from tests.support import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama, grouped-query attention, byte tokenizer with a ChatML template."""
    return tiny.save(tmp_path_factory.mktemp("tiny") / "llama", tiny.llama(), tiny.byte_tokenizer())


@pytest.fixture(scope="session")
def tiny_llama_b_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and tokenizer as `tiny_llama_folder`, other weights: a second reference."""
    return tiny.save(tmp_path_factory.mktemp("tiny") / "llama_b", tiny.llama(seed=1), tiny.byte_tokenizer())


@pytest.fixture(scope="session")
def tiny_qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with a tied head, byte tokenizer with a ChatML template."""
    return tiny.save(tmp_path_factory.mktemp("tiny") / "qwen", tiny.qwen(), tiny.byte_tokenizer())


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 (learned positions, dropout 0.1), byte tokenizer without a chat template."""
    return tiny.save(tmp_path_factory.mktemp("tiny") / "gpt2", tiny.gpt2(), tiny.byte_tokenizer(chat=False))


@pytest.fixture(scope="session")
def tiny_sliding_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral with a sliding window of 4 tokens: prefix sharing must be refused."""
    return tiny.save(tmp_path_factory.mktemp("tiny") / "sliding", tiny.sliding(), tiny.byte_tokenizer())


@pytest.fixture(scope="session")
def tiny_words_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama behind a word tokenizer: a reference whose tokens are not the policy's."""
    words = "a the good bad film was is it not very great poor i liked hated this , . ! ?"
    tokenizer = tiny.word_tokenizer(words.split())
    model = tiny.llama(seed=2, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return tiny.save(tmp_path_factory.mktemp("tiny") / "words", model, tokenizer)


@pytest.fixture(scope="session")
def tiny_gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny_llama_folder` in one GGUF file, unquantised."""
    return tiny.save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny.llama(), tiny.byte_tokenizer())
