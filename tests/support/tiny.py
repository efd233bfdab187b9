"""Tiny random models and tokenizers, built in memory: no network, no weights in the repository.

Every model is a few ten thousand parameters, seeded, and spread wide enough (`initializer_range`) that a
wrong mask, position or shift changes log-probs by far more than any tolerance.
"""

import os
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

PAD, BOS, EOS, START, END = "<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, BOS, EOS, START, END)
VOCAB = 256 + len(SPECIAL)  # bytes first, so that a byte's id is below 256

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPREAD = 0.25


def _special_ids() -> dict[str, int]:
    return {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}


def llama_config(**overrides: object) -> LlamaConfig:
    settings: dict[str, object] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=_SPREAD,
        tie_word_embeddings=False,
        **_special_ids(),
    )
    return LlamaConfig(**(settings | overrides))


def qwen_config(**overrides: object) -> Qwen3Config:
    settings: dict[str, object] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=_SPREAD,
        tie_word_embeddings=True,
        **_special_ids(),
    )
    return Qwen3Config(**(settings | overrides))


def gpt2_config(**overrides: object) -> GPT2Config:
    """GPT-2 as it comes: learned absolute positions, tied head, dropout 0.1."""
    settings: dict[str, object] = dict(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=_SPREAD,
        **_special_ids(),
    )
    return GPT2Config(**(settings | overrides))


def sliding_config(**overrides: object) -> MistralConfig:
    """Mistral whose window (4 tokens) is shorter than any useful row."""
    settings: dict[str, object] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=4,
        initializer_range=_SPREAD,
        **_special_ids(),
    )
    return MistralConfig(**(settings | overrides))


def build(config: PreTrainedConfig, seed: int = 0, *, attention: str = "sdpa") -> PreTrainedModel:
    """A float32 causal LM with random weights, in eval mode; the global random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


def llama(seed: int = 0, **overrides: object) -> PreTrainedModel:
    return build(llama_config(**overrides), seed)


def qwen(seed: int = 0, **overrides: object) -> PreTrainedModel:
    return build(qwen_config(**overrides), seed)


def gpt2(seed: int = 0, **overrides: object) -> PreTrainedModel:
    return build(gpt2_config(**overrides), seed)


def sliding(seed: int = 0, **overrides: object) -> PreTrainedModel:
    return build(sliding_config(**overrides), seed)


def byte_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte plus special tokens, so any text has ids and round-trips; `VOCAB` ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIAL))
    return _wrapped(raw, chat=chat)


def word_tokenizer(words: list[str], *, chat: bool = False) -> PreTrainedTokenizerFast:
    """Whitespace words and punctuation, unknown words as <unk>; ids unlike the byte tokenizer's."""
    vocab = {w: i for i, w in enumerate([*SPECIAL, "<unk>", *dict.fromkeys(words)])}
    raw = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens(list(SPECIAL))
    return _wrapped(raw, chat=chat, unk_token="<unk>")


def _wrapped(raw: Tokenizer, *, chat: bool, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END if chat else EOS,
        model_max_length=512,
        **special,
    )
    tokenizer.chat_template = CHATML if chat else None
    return tokenizer


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a model folder as the hub has it (safetensors, config, tokenizer); returns the folder."""
    os.makedirs(folder, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_gguf(file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a tiny llama with a byte tokenizer as llama.cpp's converter would; returns the file.

    <bos> becomes the merged token `ab`, because a GGUF tokenizer needs at least one merge.
    """
    c, heads = (
        model.config,
        {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads},
    )
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    tokens = [t for t, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    tokens[tokenizer.bos_token_id] = "ab"
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in SPECIAL else 1 for t in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids(EOS))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        for projection, count in heads.items():
            if projection in name:  # llama.cpp rotates neighbouring channels, transformers halves
                parts = array.reshape(count, 2, array.shape[0] // count // 2, array.shape[1])
                array = parts.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
