import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orchestrator.demo import assets
from preferences.config import DataConfig
from preferences.pairs import BadRow, DataError, Pair
from preferences.tokens import rendering as rendering_module
from preferences.tokens.rendering import Rendering
from tests.support import tiny
from tests.support.tokenized import tokenize

CONFIG = DataConfig(train="train.jsonl", max_length=100, max_prompt_length=60)
WORDS = ["user", "assistant", "system", "why", "because", "so", "no", "is", "it", "good", "bad"]
PAD, BOS, EOS, START, END, UNK = range(6)
USER, ASSISTANT, SYSTEM, WHY, BECAUSE, SO, NO, IS, IT, GOOD, BAD = range(6, 17)
ROLES = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def build_tokenizer(*, chat: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = tiny.word_tokenizer(WORDS, chat=chat)
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    return tokenizer


def text_pair(prompt="is it good", chosen="it is", rejected="it is bad", **more) -> Pair:
    return Pair(prompt, chosen, rejected, source="train.jsonl:1", **more)


def chat_pair(*prompt: str, chosen="because so", rejected="no", roles=("user", "assistant")) -> Pair:
    messages = [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(prompt)]
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return Pair(messages, *answers, source="train.jsonl:1")


def make_config(**changes) -> DataConfig:
    return CONFIG.model_copy(update=changes)


def tokenize_one(
    pair: Pair, rendering: Rendering, settings: DataConfig = CONFIG
) -> tuple[list[int], list[int], list[int]]:
    row = tokenize([pair], {"policy": rendering}, settings).tables["policy"][0]
    return row.prompt.tolist(), row.chosen.tolist(), row.rejected.tolist()


# ---- plain text, by hand ----


def test_plain_text_gets_no_template_and_an_end():
    expected = ([IS, IT, GOOD], [IT, IS, EOS], [IT, IS, BAD, EOS])
    assert tokenize_one(text_pair(), Rendering(build_tokenizer())) == expected
    expected = ([IS, IT, GOOD], [IT, IS, END], [IT, IS, BAD, END])
    with_template = Rendering(build_tokenizer(chat=True))  # which is not for plain text
    assert tokenize_one(text_pair(), with_template) == expected


def test_bos_and_eos_are_put_once():
    rendering = Rendering(build_tokenizer(bos=True))
    assert rendering.prefix_ids == [BOS]
    expected = ([BOS, IS, IT, GOOD], [IT, IS, EOS], [IT, IS, BAD, EOS])
    assert tokenize_one(text_pair(), rendering) == expected
    assert tokenize_one(text_pair("<bos>is it good", "it is<eos>", "it is bad<eos>"), rendering) == expected


def test_an_unknown_last_word_does_not_end_the_response():
    assert tokenize_one(text_pair(chosen="it is fine"), Rendering(build_tokenizer()))[1] == [IT, IS, UNK, EOS]


def test_completions_only():
    done = tokenize(
        [Pair("why", "so", None), Pair("why so", "no", None)], {"p": Rendering(build_tokenizer())}, CONFIG
    )
    table = done.tables["p"]
    assert table.rejected is None
    assert table[1].rejected is None
    assert table[1].prompt.tolist() == [WHY, SO]
    assert table.rejected_lengths.tolist() == [0, 0]
    assert table.pair_lengths.tolist() == [3, 4]


# ---- conversations, by hand ----


def test_chatml():
    prompt, chosen, rejected = tokenize_one(chat_pair("why"), Rendering(build_tokenizer(chat=True)))
    assert prompt == [START, USER, WHY, END, START, ASSISTANT]
    assert (chosen, rejected) == ([BECAUSE, SO, END], [NO, END])


def test_system_and_several_turns():
    pair = chat_pair("so", "why", "no", "is it", roles=("system", "user", "assistant", "user"))
    prompt, chosen, _ = tokenize_one(pair, Rendering(build_tokenizer(chat=True)))
    assert prompt == [
        *(START, SYSTEM, SO, END, START, USER, WHY, END),
        *(START, ASSISTANT, NO, END, START, USER, IS, IT, END, START, ASSISTANT),
    ]
    assert chosen == [BECAUSE, SO, END]


def test_a_template_without_an_end_of_turn_gets_eos():
    prompt, chosen, _ = tokenize_one(chat_pair("why"), Rendering(build_tokenizer(), ROLES))
    assert (prompt, chosen) == ([USER, WHY, ASSISTANT], [BECAUSE, SO, EOS])


@pytest.mark.parametrize("ending", ["<eos>", "<eos>\\n", "<eos>\\n<eos>"])
def test_ends_of_turn_are_not_doubled(ending):
    template = ROLES.replace("{{ m.content }} ", "{{ m.content }}" + ending.replace("\\n", "\n"))
    assert tokenize_one(chat_pair("why"), Rendering(build_tokenizer(), template))[1] == [BECAUSE, SO, EOS]


def test_an_eos_behind_the_end_of_turn_is_dropped():
    template = tiny.CHATML.replace("{% if", "{% if not add_generation_prompt %}<eos>{% endif %}{% if")
    tokenizer = build_tokenizer(chat=True)
    tokenizer.eos_token = "<eos>"
    assert tokenize_one(chat_pair("why"), Rendering(tokenizer, template))[1] == [BECAUSE, SO, END]


def test_bos_in_the_template_is_not_doubled():
    rendering = Rendering(build_tokenizer(bos=True), "{{ bos_token }}" + ROLES)
    assert tokenize_one(chat_pair("why"), rendering)[0] == [BOS, USER, WHY, ASSISTANT]


def test_template_arguments_and_tools_reach_the_template():
    template = "{{ tools[0].name if tools }} {{ mood }} " + ROLES
    pair = replace(chat_pair("why"), tools=[{"name": "is"}])
    settings = make_config(chat_template_kwargs={"mood": "bad"})
    rendering = Rendering(build_tokenizer(), template)
    assert tokenize_one(pair, rendering, settings)[0] == [IS, BAD, USER, WHY, ASSISTANT]
    own = replace(rendering, template_kwargs={"mood": "good"})  # a model's arguments override the run's
    assert tokenize_one(pair, own, settings)[0] == [IS, GOOD, USER, WHY, ASSISTANT]


def test_an_answer_opened_differently_by_the_generation_prompt_is_split_where_they_differ():
    template = ROLES.replace("assistant{% endif %}", "assistant so{% endif %}")
    prompt, chosen, rejected = tokenize_one(chat_pair("why"), Rendering(build_tokenizer(), template))
    assert (prompt, chosen, rejected) == ([USER, WHY, ASSISTANT], [BECAUSE, SO, EOS], [NO, EOS])


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = "{{ messages | length }} " + ROLES
    with pytest.raises(
        BadRow, match=r"l:1: the chat template of the policy changes the prompt's turns .* set another"
    ):
        tokenize_one(chat_pair("why"), Rendering(build_tokenizer(), template))


def test_a_template_that_refuses_a_row():
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + ROLES
    )
    bad = chat_pair("so", "why", roles=("system", "user"))
    with pytest.raises(
        BadRow, match=r"l:1: the chat template of the policy refuses the messages \(no system role\)"
    ):
        tokenize_one(bad, Rendering(build_tokenizer(), template))
    done = tokenize(
        [bad, chat_pair("why")],
        {"policy": Rendering(build_tokenizer(), template)},
        make_config(on_bad_row="skip"),
    )
    assert done.kept_indices.tolist() == [1]
    assert dict(done.skipped) == {"unsuited to the chat template": 1}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ range(1000000000)|list }}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ {}.popitem() }}", "popitem"),
        ("{{ 'a'.index('b') }}", "substring not found"),
        ("{{ cycler.__init__.__globals__.os.system('echo out') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_fails_or_leaves_the_sandbox_refuses_rows(template: str, said: str, capfd):
    with pytest.raises(BadRow, match=f"the chat template of the policy refuses the messages .*{said}"):
        tokenize_one(chat_pair("why"), Rendering(build_tokenizer(), template))
    assert capfd.readouterr().out == ""


NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x'|int }}{% endfor %}{% endfor %}"


def test_a_template_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(rendering_module, "MAX_RENDERING_S", 0.1)
    before = signal.getsignal(signal.SIGVTALRM), signal.getitimer(signal.ITIMER_VIRTUAL)
    for template in (NESTED, "{% macro f() %}" + NESTED + "{{ f() }}{% endmacro %}{{ f() }}"):
        with pytest.raises(
            DataError, match=r"computed for 0\.1 s and has not.*set another chat_template"
        ) as refused:
            tokenize(
                [chat_pair("why")] * 1000,
                {"policy": Rendering(build_tokenizer(), template)},
                make_config(on_bad_row="skip"),
            )
        assert not isinstance(refused.value, BadRow)  # or all rows would be tried, one after the other
    assert before == (signal.getsignal(signal.SIGVTALRM), signal.getitimer(signal.ITIMER_VIRTUAL))
    tokenize_one(chat_pair("why"), Rendering(build_tokenizer(), ROLES))
    with ThreadPoolExecutor(1) as threads:  # no signals there, and no bound
        threads.submit(tokenize_one, chat_pair("why"), Rendering(build_tokenizer(), ROLES)).result()


def test_a_conversation_needs_a_template():
    with pytest.raises(
        DataError, match=r"l:1: .* tokenizer of the policy has no chat template; set chat_template"
    ):
        tokenize_one(chat_pair("why"), Rendering(build_tokenizer()))


def test_text_that_makes_no_tokens_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Replace("\u200b", "")  # a zero-width blank
    for field in ("prompt", "chosen", "rejected"):
        with pytest.raises(
            BadRow, match=f"train.jsonl:1: {field} has no tokens under the tokenizer of the policy"
        ):
            tokenize_one(text_pair(**{field: "\u200b"}), Rendering(tokenizer))


def test_responses_of_the_same_tokens_are_refused():
    with pytest.raises(
        BadRow, match="chosen and rejected are the same tokens under the tokenizer of the policy"
    ):
        tokenize_one(text_pair(chosen="one", rejected="two"), Rendering(build_tokenizer()))


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no EOS token to end a response with; set its eos_token"):
        tokenize_one(text_pair(), Rendering(tokenizer))


# ---- several models ----


def test_every_model_reads_the_same_text_in_its_own_tokens():
    pairs = [chat_pair("why"), text_pair(), chat_pair("so", "no", "why")]
    renderings = {
        "policy": Rendering(build_tokenizer(chat=True)),
        "bytes": Rendering(tiny.byte_tokenizer()),
        "roles": Rendering(build_tokenizer(), ROLES),
        "same": Rendering(build_tokenizer(chat=True)),
    }
    done = tokenize(pairs, renderings, make_config(max_length=300, max_prompt_length=200))
    assert {name: len(table) for name, table in done.tables.items()} == dict.fromkeys(renderings, 3)
    assert done.tables["same"] is done.tables["policy"]  # the same tokens are made once
    row = done.tables["bytes"][0]
    decode = renderings["bytes"].tokenizer.decode
    assert decode(row.prompt) == "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    assert decode(row.chosen) == "because so<|im_end|>"
    assert decode(done.tables["bytes"][1].rejected) == "it is bad<|im_end|>"
    assert done.tables["roles"][2].prompt.tolist() == [USER, SO, ASSISTANT, NO, USER, WHY, ASSISTANT]


# ---- long rows ----


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"max_length": 8, "max_prompt_length": 3}, [0, 1]),  # 3 + 4 tokens, 3 + 5
        ({"max_length": 7, "max_prompt_length": 3}, [0]),
        ({"max_length": 50, "max_prompt_length": 2}, []),
    ],
)
def test_long_rows_are_left_out(limits, kept):
    pairs = [text_pair(), text_pair(chosen="it is so good")]
    settings = make_config(**limits)
    if not kept:
        with pytest.raises(
            DataError, match=r"no pair is left of 2 \(2 too long for the policy\); raise data.max_length"
        ):
            tokenize(pairs, {"policy": Rendering(build_tokenizer())}, settings)
        return
    done = tokenize(pairs, {"policy": Rendering(build_tokenizer())}, settings)
    assert done.kept_indices.tolist() == kept
    assert done.skipped.total() == 2 - len(kept)


def test_a_row_too_long_for_one_model_is_left_out_for_all():
    pairs = [text_pair(), text_pair("why", "so", "no")]
    renderings = {
        "policy": Rendering(build_tokenizer()),
        "short": Rendering(tiny.byte_tokenizer(), max_positions=7),
    }
    done = tokenize(pairs, renderings, CONFIG)
    assert done.kept_indices.tolist() == [1]
    assert done.tables["policy"][0].prompt.tolist() == [WHY]
    assert renderings["short"].tokenizer.decode(done.tables["short"][0].prompt) == "why"
    assert dict(done.skipped) == {"too long for reference short": 1}
    message = (
        r"train.jsonl:1: too long for reference short: 20 tokens, 10 of them the prompt, and 7 fit, .* "
        "data.on_long_row"
    )
    with pytest.raises(DataError, match=message):
        tokenize(pairs, renderings, make_config(on_long_row="stop"))


def test_the_policys_positions_bind_it():
    done = tokenize(
        [text_pair(), text_pair("why", "so", "no")],
        {"p": Rendering(build_tokenizer(), max_positions=6)},
        CONFIG,
    )
    assert done.kept_indices.tolist() == [1]


# ---- tables ----


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=12), st.data())
def test_a_table_gives_back_each_row(shape, data):
    pairs = [Pair("why " * a, "so " * b, "no " * (a + b)) for a, b in shape]
    table = tokenize(pairs, {"p": Rendering(build_tokenizer())}, CONFIG).tables["p"]
    chosen = data.draw(st.lists(st.integers(0, len(pairs) - 1), max_size=10))
    indices = np.array(chosen, np.int64)
    for part in (table.take(indices), pickle.loads(pickle.dumps(table)).take(indices)):
        assert len(part) == len(chosen)
        for row, index in zip((part[i] for i in range(len(part))), chosen, strict=True):
            a, b = shape[index]
            assert row.prompt.tolist() == [WHY] * a
            assert row.chosen.tolist() == [SO] * b + [EOS]
            assert row.rejected.tolist() == [NO] * (a + b) + [EOS]
    assert table.prompt_lengths.tolist() == [a for a, _ in shape]
    assert table.chosen_lengths.tolist() == [b + 1 for _, b in shape]
    assert table.pair_lengths.tolist() == [2 * a + 2 * b + 2 for a, b in shape]


def test_rows_are_counted_from_either_end():
    table = tokenize([text_pair(), text_pair("why")], {"p": Rendering(build_tokenizer())}, CONFIG).tables["p"]
    assert table[-1].prompt.tolist() == [WHY]
    assert table[0].prompt.dtype == np.int32
    with pytest.raises(IndexError, match="pair 2 of 2"):
        table[2]


# ---- real tokenizers ----


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(assets.fetch_smollm2())


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(assets.fetch_gpt2_tokenizer())


@pytest.mark.smollm2
def test_smollm2_reads_a_conversation_as_it_would_answer_it(smollm2):
    assert smollm2.pad_token_id == smollm2.eos_token_id == 2
    pair = chat_pair("Is it good?", chosen="Yes, it is.", rejected="No \U0001f642")
    prompt, chosen, rejected = tokenize_one(pair, Rendering(smollm2))
    own = smollm2.apply_chat_template(pair.prompt, add_generation_prompt=True, return_dict=False)
    assert prompt == own
    assert smollm2.decode(chosen) == "Yes, it is.<|im_end|>"
    assert smollm2.decode(rejected) == "No \U0001f642<|im_end|>"
    assert chosen.count(2) == rejected.count(2) == 1  # its pad token ends the turn, and must be scored


@pytest.mark.smollm2
def test_two_real_tokenizers_read_the_same_text(smollm2, gpt2):
    pair = text_pair("The film was", " g\u00e9nial, truly  fine.", " dull \U0001f4a4 and long")
    done = tokenize([pair], {"policy": Rendering(smollm2), "gpt2": Rendering(gpt2)}, CONFIG)
    rows = {name: table[0] for name, table in done.tables.items()}
    ends = {"policy": (smollm2, "<|im_end|>"), "gpt2": (gpt2, "<|endoftext|>")}
    for name, (tokenizer, end) in ends.items():
        assert tokenizer.decode(rows[name].prompt) == pair.prompt
        assert tokenizer.decode(rows[name].chosen) == pair.chosen + end
        assert tokenizer.decode(rows[name].rejected) == pair.rejected + end
    assert rows["policy"].chosen.tolist() != rows["gpt2"].chosen.tolist()
