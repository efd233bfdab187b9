"""Prompt and response have the tokens of one text, a date that stays, and ids that the model has."""

import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from preferences.config import DataConfig
from preferences.pairs import DataError, Pair
from preferences.tokens.rendering import Rendering
from tests.support import tiny
from tests.support.tokenized import Tokenized, tokenize

TEXTS = ["Paris is the capital of France", "The film was good and the film was bad", "assistant user said"]
SPECIAL = ["<unk>", "<s>", "</s>"]
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONFIG = DataConfig(train="train.jsonl", max_length=200, max_prompt_length=120)


def build_sentencepiece(
    scheme: str, *, unigram: bool, template: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a blank before a text, as SentencePiece's do, trained on a few words."""
    trainer: Any
    if unigram:
        raw = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")
    else:
        raw = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(
            vocab_size=150, special_tokens=SPECIAL, initial_alphabet=[*"\n:<|>?.", "\u2581"]
        )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    raw.train_from_iterator([*TEXTS * 4, "\n:<|>?."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def build_llama_2(*, rstrip: bool = False) -> PreTrainedTokenizerFast:
    """Llama 2's rules: a blank is put before every stretch of text, bytes stand in for unknown characters."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = []
    for character in "\u2581" + "".join(dict.fromkeys("".join(TEXTS).replace(" ", ""))) + ".:'":
        vocab[character] = len(vocab)
    for word in dict.fromkeys(" ".join(TEXTS).split()):
        for parts in ([*word], ["\u2581", word]):
            while len(parts) > 1:
                merges.append((parts[0], parts[1]))
                parts = ["".join(parts[:2]), *parts[2:]]
                vocab.setdefault(parts[0], len(vocab))
    raw = Tokenizer(models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    raw.add_special_tokens([*SPECIAL, AddedToken("<|assistant|>", rstrip=rstrip)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def build_prefixed_bytes() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that puts a blank before every text."""
    tokenizer = tiny.byte_tokenizer(chat=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


BUILDERS = {
    "always": lambda: build_sentencepiece("always", unigram=False),
    "first": lambda: build_sentencepiece("first", unigram=False),
    "unigram": lambda: build_sentencepiece("always", unigram=True),
    "llama 2": build_llama_2,
    "phi 3": lambda: build_llama_2(rstrip=True),
    "prefixed bytes": build_prefixed_bytes,
}


def text_pair(prompt: str = "Was it good?\n", chosen: str = "Paris is", rejected: str = "The film") -> Pair:
    return Pair(prompt, chosen, rejected, source="train.jsonl:1")


def chat_pair() -> Pair:
    answers = [[{"role": "assistant", "content": text}] for text in ("Paris is", "The film was bad")]
    return Pair([{"role": "user", "content": "Was it good?"}], *answers, source="train.jsonl:1")


def tokenize_one(pair: Pair, rendering: Rendering, **settings: Any) -> Tokenized:
    return tokenize([pair], {"policy": rendering}, CONFIG.model_copy(update=settings))


@pytest.mark.parametrize("scheme", ["always", "first"])
@pytest.mark.parametrize("unigram", [False, True])
@pytest.mark.parametrize("template", [None, ZEPHYR])
def test_a_response_has_the_tokens_that_it_has_in_one_text(
    scheme: str, unigram: bool, template: str | None
) -> None:
    tokenizer = build_sentencepiece(scheme, unigram=unigram, template=template)
    pair = chat_pair() if template else text_pair()
    found = tokenize_one(pair, Rendering(tokenizer))
    row = found.tables["policy"][0]
    assert row.rejected is not None
    for ids, text in (
        (row.chosen, "Paris is"),
        (row.rejected, "The film was bad" if template else "The film"),
    ):
        whole = (
            tokenizer.apply_chat_template(
                [*pair.prompt, {"role": "assistant", "content": text}], tokenize=False
            ).rstrip()
            if template
            else f"{pair.prompt}{text}</s>"
        )
        assert [*row.prompt, *ids] == tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(int(ids[0]))[0] != "\u2581"  # as it is for the text alone
    assert tokenizer.tokenize("Paris")[0][0] == "\u2581"
    assert found.boundary_merges == {"policy": []}


@pytest.fixture(scope="module", params=BUILDERS)
def prefixing(request: pytest.FixtureRequest) -> Rendering:
    return Rendering(BUILDERS[request.param]())


def join_ids(rendering: Rendering, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """The ids of the parts, put together, and those of the one text."""
    parts = rendering.encode([prompt])[0] + rendering.encode_response(prompt, response)
    return parts, rendering.encode([prompt + response])[0]


@pytest.mark.parametrize("prompt", ["Was it good?\n", "is it good:", "good</s>", "good</s>\n", "a <s>"])
@pytest.mark.parametrize(
    "response", ["Paris is", " Paris", "The film was bad.</s>", "\u00e9t\u00e9", "  Paris"]
)
def test_the_ids_of_the_parts_are_those_of_one_text(prefixing: Rendering, prompt: str, response: str) -> None:
    parts, whole = join_ids(prefixing, prompt, response)
    assert parts == whole
    if response == "Paris is" and not prompt.endswith(">"):  # which alone begins with a blank
        assert prefixing.encode_response(prompt, response) != prefixing.encode([response])[0]


def test_a_text_behind_an_added_token_begins_as_that_token_has_it() -> None:
    """Llama 2 puts a blank behind a special token, which may take the blanks of the text besides."""
    for rstrip in (False, True):
        rendering = Rendering(build_llama_2(rstrip=rstrip))
        for prompt in ("Was it good?<|assistant|>", "Was it good?<|assistant|>\n"):
            parts, whole = join_ids(rendering, prompt, "Paris is")
            assert parts == whole
            first = rendering.tokenizer.convert_ids_to_tokens(rendering.encode_response(prompt, "Paris is"))[
                0
            ]
            assert first == ("\u2581Paris" if rstrip or not prompt.endswith("\n") else "Paris")


@settings(deadline=None, max_examples=40)
@given(
    prompt=st.text("aP .:?\n", min_size=1, max_size=8), response=st.text("aP is.\n", min_size=1, max_size=8)
)
def test_parts_spell_the_text_also_where_a_token_would_reach_over_the_boundary(
    prompt: str, response: str
) -> None:
    """The ids may be others than those of one text; what they decode to may not."""
    rendering = Rendering(build_llama_2())
    parts, whole = join_ids(rendering, prompt, response)
    assert rendering.tokenizer.decode(parts) == rendering.tokenizer.decode(whole) == prompt + response
    if response[0] == " " and prompt[-1] not in " ":  # a blank begins a token
        assert parts == whole


@pytest.mark.parametrize("build", [tiny.byte_tokenizer, lambda: tiny.word_tokenizer(["a", "film"])])
def test_tokenizers_that_begin_a_text_as_they_continue_it_need_no_sentinel(build: Any) -> None:
    rendering = Rendering(build())
    assert rendering.text_sentinel == ""
    assert rendering.encode_response("a film", "a") == rendering.encode(["a"])[0]


def test_a_token_over_the_boundary_is_counted() -> None:
    tokenizer = build_sentencepiece("always", unigram=False)
    blank, none = (
        tokenize_one(text_pair(p, r, "The film"), Rendering(tokenizer))
        for p, r in (("good ", "film"), ("good", " film"))
    )
    assert blank.boundary_merges == {"policy": ["train.jsonl:1"]}
    row = blank.tables["policy"][0]
    assert tokenizer.decode([*row.prompt, *row.chosen]) == "good film</s>"  # and not another blank
    assert none.boundary_merges == {"policy": []}
    # Byte-level tokens do not depend on what is before them, unless a merge reaches over.
    assert tokenize_one(text_pair("good "), Rendering(tiny.byte_tokenizer())).boundary_merges == {
        "policy": []
    }


def test_a_truncated_response_keeps_the_tokens_of_one_text() -> None:
    tokenizer = build_sentencepiece("first", unigram=False)
    pair = text_pair("Was it good?\n", "Paris is the capital of France", "The film was good and bad")
    prompt = len(tokenizer("Was it good?\n", add_special_tokens=False)["input_ids"])
    found = tokenize_one(pair, Rendering(tokenizer), max_length=prompt + 3, on_long_row="truncate")
    row = found.tables["policy"][0]
    whole = tokenizer("Was it good?\nParis is the capital of France", add_special_tokens=False)["input_ids"]
    assert found.truncated == 1
    assert [*row.prompt, *row.chosen] == whole[: len(row.prompt) + len(row.chosen)]


def test_a_token_id_that_the_model_lacks_is_refused_with_the_row() -> None:
    tokenizer = tiny.byte_tokenizer()  # bytes have ids below 256, special tokens from there
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "a"  # so that only the second pair has a special token
    pairs = [text_pair(), Pair("Why?", "so<|im_end|>", "no", source="train.jsonl:2")]
    expected = (
        rf"train.jsonl:2: the tokenizer of the policy gives token {end} \('<\|im_end\|>'\), and the model has"
    )
    with pytest.raises(DataError, match=expected):
        tokenize(pairs, {"policy": Rendering(tokenizer, vocabulary=end)}, CONFIG)
    tokenize(pairs, {"policy": Rendering(tokenizer, vocabulary=end + 1)}, CONFIG)


def test_a_date_in_the_template_is_the_given_one() -> None:
    template = "{{ strftime_now('%d %B %Y') }}\n" + tiny.CHATML
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = template

    def digest(date: datetime.date | None) -> str:
        return tokenize_one(chat_pair(), Rendering(tokenizer, date=date)).digests["policy"]

    first = datetime.date(2024, 2, 29)
    rendering = Rendering(tokenizer, date=first)
    assert rendering.writes_date
    assert not Rendering(tiny.byte_tokenizer()).writes_date
    text = rendering.apply_template(chat_pair().prompt, None, add_generation_prompt=True)
    assert text.startswith("29 February 2024\n")
    assert digest(first) == digest(datetime.date(2024, 2, 29))
    assert digest(first) != digest(datetime.date(2024, 3, 1))
    assert digest(None) == digest(datetime.datetime.now().astimezone().date())


@pytest.mark.parametrize(
    "call",
    [
        "{%- if strftime_now is defined %}{{ strftime_now('%d.%m.%y') }}{% endif %}",
        '{{- strftime_now ( format = "%d.%m.%y" ) }}',
        "{%- macro today() %}{{ strftime_now('%d.%m.%y') }}{% endmacro %}{{ today() }}",
        "{#- as strftime_now has it #}{{ strftime_now('%d.%m.%y') }}",
    ],
)
def test_a_date_is_written_however_the_template_asks_for_it(call: str) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = call + tiny.CHATML
    rendering = Rendering(tokenizer, date=datetime.date(2024, 2, 29))
    text = rendering.apply_template(chat_pair().prompt, None, add_generation_prompt=True)
    assert text.startswith("29.02.24<|im_start|>")


@pytest.mark.parametrize("call", ["{{ strftime_now(form) }}", "{% set now = strftime_now %}{{ now('%d') }}"])
def test_a_date_that_cannot_be_kept_is_refused(call: str) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = call + tiny.CHATML
    with pytest.raises(DataError, match="the tokens of tomorrow would be others; set a chat_template"):
        tokenize_one(chat_pair(), Rendering(tokenizer, date=datetime.date(2024, 2, 29)))


def test_digests_differ_with_any_token() -> None:
    rendering = Rendering(tiny.byte_tokenizer())
    digests = {
        tokenize_one(text_pair(*texts), rendering).digests["policy"]
        for texts in (("a", "bc", "d"), ("ab", "c", "d"), ("a", "bc", "e"), ("a", "bd", "d"))
    }
    assert len(digests) == 4
