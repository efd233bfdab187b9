"""The tiny models and tokenizers that the other tests use."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import tiny


def test_byte_tokenizer_round_trips_any_text() -> None:
    tokenizer = tiny.byte_tokenizer()
    text = "Ein Maß, <|im_end|> 日本!\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == tiny.VOCAB
    assert tokenizer.pad_token_id == 256
    assert tokenizer.bos_token_id == 257


def test_a_chat_template_only_if_requested() -> None:
    messages = [{"role": "user", "content": "hi"}]
    rendered = tiny.byte_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.byte_tokenizer(chat=False).chat_template is None


def test_folders_load_as_hub_models(tiny_llama_folder: Path, tiny_words_folder: Path) -> None:
    for folder in (tiny_llama_folder, tiny_words_folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.vocab_size == len(tokenizer)
        assert model.num_parameters() < 500_000
