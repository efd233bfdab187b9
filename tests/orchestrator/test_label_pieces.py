"""What labels are made of: questions, judges' answer tokens, verdicts, statistics, files."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from models.config import ModelConfig
from models.load import load_tokenizer, locate_model
from orchestrator.errors import UsageError
from orchestrator.labels.answers import AnswerFile
from orchestrator.labels.endpoint import RateLimiter, count_votes, read_answer_logprobs
from orchestrator.labels.output import build_text_table, read_lineage, refuse_other_lineage, write_labels
from orchestrator.labels.pairs import format_text, read_unlabelled_pairs
from orchestrator.labels.questions import JudgeReader, render_questions
from orchestrator.labels.report import print_report
from orchestrator.labels.rewards import RewardReader
from orchestrator.labels.settings import (
    JudgeChoice,
    LabelSettings,
    check_output,
    parse_answers,
    parse_judges,
    read_source,
)
from orchestrator.labels.statistics import (
    compare_orders,
    compare_with_people,
    compute_statistics,
    correlate,
    estimate_share,
)
from orchestrator.labels.templates import BUILT_IN, load_template
from orchestrator.labels.verdicts import Verdicts, combine_verdicts, compare_scores
from orchestrator.registry.find import PreparedModel
from preferences.config import SourceConfig
from preferences.load import load_pairs
from preferences.pairs import DataError, Pair


@pytest.fixture
def settings(tmp_path):
    def make(**changes):
        given = {
            "sources": (),
            "storage_path": str(tmp_path),
            "tracking_uri": None,
            "output": tmp_path / "out.parquet",
            "judges": (),
            "template": load_template("helpfulness"),
        }
        return LabelSettings(**(given | changes))

    return make


def read_judge(folder, settings, **changes):
    config = ModelConfig(model=str(folder))
    located = locate_model(config)
    model = PreparedModel(config, located, load_tokenizer(located, config), str(folder))
    return JudgeReader(JudgeChoice("tiny", str(folder), 1.0, "judge"), model, settings(**changes))


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_templates_show_the_prompt_and_both_answers_in_order(name):
    text = load_template(name).render("why {first}?", "because {second}", "so", ("X", "Y"))
    assert text.index("why {first}?") < text.index("because {second}") < text.index("\nso\n")
    assert text.index("X:") < text.index("because") < text.index("Y:")


def test_template_files_are_checked(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("{prompt} {first} or {second}? {not a name} {}\n")
    assert load_template(str(file)).render("p", "f", "s", ("A", "B")) == "p f or s? {not a name} {}"
    file.write_text("{promt} {first} {second}")
    with pytest.raises(UsageError, match=r"no placeholder \{promt\}; did you mean 'prompt'"):
        load_template(str(file))
    file.write_text("{prompt} {first}")
    with pytest.raises(UsageError, match=r"\{second\} is missing"):
        load_template(str(file))
    with pytest.raises(UsageError, match="none of helpfulness, harmlessness, summary"):
        load_template("helpfulnes")


def test_judges_have_weights_and_names_of_their_own():
    judges = parse_judges(["org/Good-1=2.5", "other/Good-1", "models:/mine@champion"], ["a/rm"], "gpt x")
    assert [judge.name for judge in judges] == ["Good-1", "Good-1-2", "mine-champion", "rm", "gpt-x"]
    assert [judge.weight for judge in judges] == [2.5, 1, 1, 1, 1]
    assert judges[0].model == "org/Good-1"
    with pytest.raises(UsageError, match="weight must be above 0"):
        parse_judges(["a=0"], [], None)
    with pytest.raises(UsageError, match="no judge is named"):
        parse_judges([], [], None)


def test_options_are_checked(tmp_path):
    assert parse_answers(" 1, 2") == ("1", "2")
    for text in ("A", "A,A", "A,B,C", "A,"):
        with pytest.raises(UsageError, match="two different answers"):
            parse_answers(text)
    with pytest.raises(UsageError, match=r"ends with \.parquet"):
        check_output("labels.jsonl")
    with pytest.raises(UsageError, match=r"set data\.split"):
        read_source("run.yaml", split="test", subset=None, storage_path=None)


def test_a_run_file_names_the_pairs_and_the_storage(tmp_path, tiny_llama_folder):
    run = {
        "name": "r",
        "policy": {"model": str(tiny_llama_folder)},
        "references": {"primary": "base", "models": {"base": {"model": str(tiny_llama_folder)}}},
        "data": {"train": ["a.jsonl", "b.jsonl"], "columns": {"chosen": "good"}, "on_bad_row": "skip"},
        "loss": {"preset": "dpo"},
        "storage_path": "/somewhere",
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    found = read_source(str(tmp_path / "run.yaml"), split=None, subset=None, storage_path=None)
    assert [source.source for source in found.sources] == ["a.jsonl", "b.jsonl"]
    assert found.sources[1].columns == {"chosen": "good"}
    assert (found.storage_path, found.on_bad_row) == ("/somewhere", "skip")


def test_pairs_keep_the_order_of_their_source(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "p ", "chosen": "bad", "rejected": "good", "soft_label": 0.25},
        {"prompt": "p ", "chosen": "x", "rejected": "y", "soft_label": 1.0},
        {"prompt": "p ", "chosen": "u", "rejected": "v"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_unlabelled_pairs([SourceConfig(source=str(file))], limit=2, on_bad_row="stop")
    assert [(p.chosen, p.rejected, p.soft_label) for p in read.pairs] == [
        ("bad", "good", 0.25),
        ("x", "y", 1),
    ]
    assert read.has_human_labels
    file.write_text(json.dumps(rows[1]) + "\n")
    other = read_unlabelled_pairs([SourceConfig(source=str(file))], limit=None, on_bad_row="stop")
    assert not other.has_human_labels
    assert other.digest != read.digest


def test_text_and_messages_are_not_labelled_together(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    other = [talk[0], {"role": "assistant", "content": "no"}]
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "p ", "chosen": "a", "rejected": "b"}, {"chosen": talk, "rejected": other}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=r"pairs\.jsonl:1 is plain text and .*pairs\.jsonl:2 is messages"):
        read_unlabelled_pairs([SourceConfig(source=str(file))], limit=None, on_bad_row="stop")


def test_conversations_become_text():
    turns = [
        {"role": "user", "content": "Hi "},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},
        {"role": "user", "content": "Go"},
    ]
    assert format_text(turns) == 'User: Hi\n\nAssistant: [{"name": "f"}]\n\nUser: Go'
    assert format_text(turns[:1]) == "Hi"
    assert format_text([{"role": "system", "content": "Be kind"}]) == "System: Be kind"


def test_a_chat_judge_is_asked_in_its_format_and_a_plain_one_in_text(
    tiny_llama_folder, tiny_gpt2_folder, settings
):
    pair = Pair("p", "yes", "no")
    chat = read_judge(tiny_llama_folder, settings)
    questions = render_questions([pair], chat.settings)
    assert questions[0].index("yes") < questions[0].index("no\n\nWhich")
    assert questions[1].index("no\n") < questions[1].index("yes")
    table = chat.build_table([pair])
    text = chat.model.tokenizer.decode(table[1].prompt)
    assert text == f"<|im_start|>user\n{questions[1]}<|im_end|>\n<|im_start|>assistant\n"
    assert chat.model.tokenizer.decode([table[0].chosen[0], table[0].rejected[0]]) == "AB"
    plain = read_judge(tiny_gpt2_folder, settings)
    assert plain.model.tokenizer.decode(plain.build_table([pair])[0].prompt).endswith("else.\n\nAnswer:")


def test_answers_that_are_no_single_tokens_are_refused(tiny_llama_folder, tiny_words_folder, settings):
    with pytest.raises(UsageError, match=r"'Yes' and 'No' are not two single.*--answers 1,2"):
        read_judge(tiny_llama_folder, settings, answers=("Yes", "No")).build_table([])
    with pytest.raises(UsageError, match="'A' and 'B' are not two"):
        read_judge(tiny_words_folder, settings).build_table([])
    assert len(set(read_judge(tiny_words_folder, settings, answers=("good", "bad")).answer_ids)) == 2


def test_pairs_beyond_the_judges_positions_do_not_fit(tiny_llama_folder, settings):
    judge = read_judge(tiny_llama_folder, settings)
    short, exact = Pair("p", "yes", "no"), 512 - 1 - len(judge.build_table([Pair("p", "", "no")])[0].prompt)
    pairs = [short, Pair("p", "y" * exact, "no"), Pair("p", "y" * (exact + 1), "no")]
    table = judge.build_table(pairs)
    assert judge.find_fitting_pairs(table).tolist() == [True, True, False]
    kept = judge.take_pairs(table, np.array([1]))
    assert len(kept) == 2
    assert len(kept[0].prompt) == 511


def test_a_judges_template_that_fails_or_has_no_end_is_refused(tiny_llama_folder, settings, monkeypatch):
    judge = read_judge(tiny_llama_folder, settings)
    reader = RewardReader(judge.choice, judge.model, judge.settings)
    judge.model.tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(UsageError, match=r"its chat template refuses a question \(division by zero\)"):
        judge.wrap_question("?")
    with pytest.raises(UsageError, match=r"its chat template refuses a pair \(division by zero\)"):
        reader.build_table([Pair("p", " yes", " no")])
    monkeypatch.setattr("preferences.tokens.rendering.MAX_RENDERING_S", 0.1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    judge.model.tokenizer.chat_template = endless
    with pytest.raises(DataError, match=f"chat template of {tiny_llama_folder} has computed for 0.1 s"):
        judge.wrap_question("?")


def test_a_reward_model_reads_its_chat_format_or_plain_text(tiny_llama_folder, tiny_gpt2_folder, settings):
    talk = Pair([{"role": "user", "content": "p"}], [{"role": "assistant", "content": "yes"}], None)
    texts = {}
    for folder in (tiny_llama_folder, tiny_gpt2_folder):
        judge = read_judge(folder, settings)
        reader = RewardReader(judge.choice, judge.model, judge.settings)
        for kind, pair in (("text", Pair("p", " yes", " no")), ("talk", replace(talk, rejected=talk.chosen))):
            table = reader.build_table([pair])
            assert len(table[0].prompt) == 0
            texts[folder.name, kind] = judge.model.tokenizer.decode(table[0].chosen)
            assert reader.find_fitting_pairs(table).tolist() == [True]
            assert reader.fingerprint != judge.fingerprint
    chat = "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert texts == {
        ("llama", "text"): chat.format(" yes"),
        ("llama", "talk"): chat.format("yes"),
        ("gpt2", "text"): "p yes",
        ("gpt2", "talk"): "p\n\nyes",
    }


def test_tools_and_tool_calls_survive_the_file(tmp_path):
    def answer(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}]

    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    user = [{"role": "user", "content": "p"}]
    pairs = [Pair(user, answer({"a": 1}), answer({"b": 2}), tools=tools)]
    output = tmp_path / "out.parquet"
    lineage = {"version": 1, "request": {}}
    write_labels(output, pairs, np.array([0.8]), {}, lineage, with_human_labels=False)
    (found,) = load_pairs(SourceConfig(source=str(output))).pairs
    assert (found.chosen, found.rejected, found.tools, found.soft_label) == (
        pairs[0].chosen,
        pairs[0].rejected,
        tools,
        0.8,
    )
    for others in ({}, {"a": "text"}):
        mixed = Pair(user, answer(others), answer(others))
        with pytest.raises(UsageError, match="arguments of tool calls as JSON text"):
            build_text_table([mixed] if not others else [*pairs, mixed])


def test_verdicts_average_both_orders_and_judges_by_weight():
    first = compare_scores([-1.0, -2.0], [-2.0, -1.0], temperature=0.5)
    assert first.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])
    verdict = Verdicts.from_first_answers(np.array([0.9, 0.3]))
    assert (verdict.chosen_first[0], verdict.chosen_second[0]) == (0.9, 0.7)
    assert verdict.mean[0] == pytest.approx(0.8)
    two = {"a": verdict, "b": Verdicts(np.array([0.2]))}
    assert combine_verdicts(two, {"a": 3.0, "b": 1.0})[0] == pytest.approx(0.65)


def test_statistics_of_orders_and_people_by_hand():
    orders = compare_orders(Verdicts.from_first_answers(np.array([0.9, 0.8, 0.6, 0.1])))
    assert orders.mean_first == pytest.approx(0.6)
    assert orders.flips == 0.5  # the first pair: 0.9, then 0.2; the second: 0.6, then 0.9
    labels, human = np.array([0.95, 0.95, 0.05, 0.65, 0.5]), np.array([1.0, 0.8, 0.3, 0.25, 0.5])
    found = compare_with_people(labels, human)
    assert found.accuracy.value == 0.75
    assert [one.pairs for one in found.reliability] == [1, 1, 3]
    assert found.reliability[2].agreement == pytest.approx((1 + 0.8 + 0.7) / 3)
    assert found.calibration_error == pytest.approx((0 + 0.4 + 3 * (0.95 - 2.5 / 3)) / 5)
    assert compare_with_people(1 - labels, 1 - human).calibration_error == pytest.approx(
        found.calibration_error
    )


def test_a_judge_that_only_sees_the_order_is_called_so():
    lines = Console(file=io.StringIO(), width=300)
    for first in ([0.9, 0.8] * 2, [0.9, 0.1] * 2):
        verdicts = {"j": Verdicts.from_first_answers(np.array(first))}
        pairs = [Pair("p", "a", "b"), Pair("p", "c", "d")]
        print_report(compute_statistics(pairs, verdicts["j"].mean, verdicts, None), lines)
    text = lines.file.getvalue()
    assert "mean probability 0.850; the verdict flips with the order for 100.0% of the pairs" in text
    assert text.count("its labels say little") == 1


def test_intervals_cover_what_they_estimate():
    draw, hits = np.random.default_rng(0), 0
    for _ in range(300):
        pairs = draw.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 60)
        found = correlate(pairs[:, 0], pairs[:, 1])
        hits += found.low < 6 / math.pi * math.asin(0.3) < found.high  # Spearman's of a bivariate normal
    assert 270 <= hits <= 298
    # Wilson's interval of 8 in 10, from the published formula's worked value.
    share = estimate_share(np.array([1.0] * 8 + [0.0] * 2))
    assert (share.low, share.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert correlate(np.ones(9), np.arange(9)) is None


def test_answers_of_an_endpoint_are_read_with_blanks_and_without_one():
    tokens = [("A", math.log(0.4)), (" A", math.log(0.2)), ("B", math.log(0.1)), ("The", math.log(0.05))]
    first, second = read_answer_logprobs(tokens, ("A", "B"))
    assert (math.exp(first), math.exp(second)) == pytest.approx((0.6, 0.1))
    assert read_answer_logprobs(tokens, ("A", "C"))[1] == pytest.approx(math.log(0.05))
    assert read_answer_logprobs(tokens, ("C", "D")) == (None, None)
    shares = count_votes(["A", "B", "A", None, None, None, None, None], 4, ("A", "B"))
    assert shares[0] == pytest.approx(2 / 3)
    assert np.isnan(shares[1])


def test_requests_are_spaced_over_all_threads(monkeypatch):
    slept, now = [], [100.0]
    monkeypatch.setattr("orchestrator.labels.endpoint.time.monotonic", lambda: now[0])
    monkeypatch.setattr("orchestrator.labels.endpoint.time.sleep", slept.append)
    limiter = RateLimiter(120)
    for _ in range(3):
        limiter.wait_for_turn()
    now[0] = 200.0
    limiter.wait_for_turn()
    assert slept == [0.0, 0.5, 1.0, 0.0]


def test_a_torn_last_line_of_answers_is_asked_again(tmp_path):
    path = tmp_path / "answers" / "x.jsonl"
    with AnswerFile(path) as answers:
        answers.add_answer("a", [1.5, None])
        answers.add_answer("b", "A")
    path.write_text(path.read_text()[:-4])
    with AnswerFile(path) as answers:
        assert "a" in answers
        assert "b" not in answers
        answers.add_answer("b", "B")
    with AnswerFile(path) as answers:
        assert (answers.get_answer("a"), answers.get_answer("b")) == ([1.5, None], "B")


def test_labels_are_refused_where_another_file_or_other_labels_are(tmp_path):
    output = tmp_path / "out.parquet"
    assert read_lineage(output) is None
    lineage = {"version": 1, "request": {"source": "a", "temperature": 1.0}}
    pairs = [Pair("p", "c", "r", 0.7)]
    verdicts = {"j": Verdicts.from_first_answers(np.array([0.9, 0.3]))}
    write_labels(output, pairs, np.array([0.8]), verdicts, lineage, with_human_labels=True)
    assert pq.read_table(output).to_pylist() == [
        {
            "prompt": "p",
            "chosen": "c",
            "rejected": "r",
            "soft_label": 0.8,
            "human_label": 0.7,
            "judge_j": pytest.approx(0.8),
            "judge_j_first": 0.9,
            "judge_j_second": 0.7,
        }
    ]
    written = read_lineage(output)
    refuse_other_lineage(output, written, lineage["request"])
    with pytest.raises(UsageError, match="made with different temperature;"):
        refuse_other_lineage(output, written, {"source": "a", "temperature": 2.0})
    output.write_bytes(b"mine")
    with pytest.raises(UsageError, match="polyref label did not write it"):
        read_lineage(output)
