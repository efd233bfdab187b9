"""Labels of judges on a small Ray are what plain transformers give, are kept, and can be trained on."""

import json
import math

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from models.config import ModelError
from orchestrator.cli.main import app
from orchestrator.errors import UsageError
from orchestrator.labels.templates import load_template
from preferences.config import SourceConfig
from preferences.load import load_pairs
from tests.support import tiny

PAIRS = 6
TEMPERATURE = 4.0


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    talk = [{"role": "user", "content": "Which?"}]
    rows = [
        {
            "prompt": talk,
            "chosen": [{"role": "assistant", "content": "yes" * (n + 1)}],
            "rejected": [{"role": "assistant", "content": f"no {n}"}],
            "soft_label": round(0.3 + n / 10, 1),
        }
        for n in range(PAIRS)
    ]
    rows.append({**rows[0], "chosen": [{"role": "assistant", "content": "long" * 200}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = tiny.llama_config(num_labels=1, initializer_range=0.5)
        model = AutoModelForSequenceClassification.from_config(config)
    return tiny.save(tmp_path_factory.mktemp("reward") / "reward", model, tiny.byte_tokenizer())


@pytest.fixture
def run(cluster, source, tmp_path):
    def call(*options, to="out.parquet"):
        command = ["label", str(source), "--to", str(tmp_path / to), "--storage-path", str(tmp_path / "runs")]
        done = CliRunner().invoke(app, [*command, *map(str, options)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output, pq.read_table(tmp_path / to).to_pylist()

    return call


def probability_of_a(model, tokenizer, text, answers):
    """The share of the first answer among both, by one plain forward pass."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].double()
    return float((logits[answers] / TEMPERATURE).softmax(-1)[0])


def judge_plainly(folder, row, *, chat):
    """Probability that `chosen` is better, with it shown first and second."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    letters = tokenizer.convert_tokens_to_ids(["A", "B"])
    chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
    found = []
    for first, second in ((chosen, rejected), (rejected, chosen)):
        text = load_template("harmlessness").render("Which?", first, second, ("A", "B"))
        text = (
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if chat else f"{text}\n\nAnswer:"
        )
        found.append(probability_of_a(model.eval(), tokenizer, text, letters))
    return found[0], 1 - found[1]


def reward_plainly(folder, row):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rewards = []
    for side in ("chosen", "rejected"):
        text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            rewards.append(model(input_ids=ids).logits.item())
    return 1 / (1 + math.exp((rewards[1] - rewards[0]) / TEMPERATURE))


def test_labels_are_what_plain_transformers_give(
    run, source, tmp_path, tiny_llama_folder, tiny_gpt2_folder, reward_folder
):
    options = ["--judge", f"{tiny_llama_folder}=2", "--judge", tiny_gpt2_folder, "--reward", reward_folder]
    options += ["--template", "harmlessness", "--temperature", TEMPERATURE]
    output, rows = run(*options)
    assert f"{PAIRS + 1} pairs, 1 skipped (longer than a judge's positions)" in output
    assert f"llama: 0 answers from the store, {4 * PAIRS} scored" in output
    assert f"reward: 0 answers from the store, {2 * PAIRS} scored" in output
    given = [json.loads(line) for line in source.read_text().splitlines()][:PAIRS]
    for row, original in zip(rows, given, strict=True):
        assert {name: row[name] for name in ("prompt", "chosen", "rejected")} == {
            name: original[name] for name in ("prompt", "chosen", "rejected")
        }
        assert row["human_label"] == pytest.approx(original["soft_label"])
        llama = judge_plainly(tiny_llama_folder, original, chat=True)
        gpt2 = judge_plainly(tiny_gpt2_folder, original, chat=False)
        assert (row["judge_llama_first"], row["judge_llama_second"]) == pytest.approx(llama, abs=1e-4)
        assert (row["judge_gpt2_first"], row["judge_gpt2_second"]) == pytest.approx(gpt2, abs=1e-4)
        reward = reward_plainly(reward_folder, original)
        assert row["judge_reward"] == pytest.approx(reward, abs=1e-4)
        label = (2 * sum(llama) / 2 + sum(gpt2) / 2 + reward) / 4
        assert row["soft_label"] == pytest.approx(label, abs=1e-4)
    assert len({round(row["judge_reward"], 3) for row in rows}) == PAIRS

    lineage = json.loads((tmp_path / "out.json").read_text())
    assert lineage["counts"] == {"labelled": PAIRS, "too_long": 1, "no_answer": 0, "skipped": {}}
    assert len(lineage["request"]["judges"]["llama"]["fingerprint"]) == 64
    assert lineage["pins"]["gpt2"] == str(tiny_gpt2_folder)
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert set(report["orders"]) == {"llama", "gpt2"}
    assert set(report["human"]) == {"label", "llama", "gpt2", "reward"}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    pairs = load_pairs(SourceConfig(source=str(tmp_path / "out.parquet"))).pairs
    assert [max(row["soft_label"], 1 - row["soft_label"]) for row in rows] == [p.soft_label for p in pairs]

    assert "nothing to do" in run(*options)[0]
    with pytest.raises(UsageError, match="made with different judges, temperature;"):
        run("--judge", tiny_llama_folder, "--template", "harmlessness")
    # Another file of the same scores: a temperature and weights change no score.
    output, _ = run("--judge", tiny_llama_folder, "--template", "harmlessness", to="again.parquet")
    assert f"llama: {4 * PAIRS} answers from the store, 0 scored" in output


def test_models_that_cannot_judge_are_refused(run, tiny_llama_folder, tmp_path):
    with pytest.raises(UsageError, match=r"--judge .*llama: 'Yes' and 'No' are not two single"):
        run("--judge", tiny_llama_folder, "--answers", "Yes,No")
    with pytest.raises(ModelError, match="is no classifier"):
        run("--reward", tiny_llama_folder)
    with pytest.raises(ModelError, match=r"--judge: .*no such file or folder"):
        run("--judge", tmp_path / "nothing")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge-url", "http://x/v1"], "--judge-model is missing"),
        (["--judge-model", "m"], "--judge-url is missing"),
        (["--judge-url", "localhost:8000", "--judge-model", "m"], "give a URL such as"),
        (["--judge", "m", "--temperature", "0"], "--temperature must be above 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(source, options, message):
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(app, ["label", str(source), "--to", "o.parquet", *options], catch_exceptions=False)
