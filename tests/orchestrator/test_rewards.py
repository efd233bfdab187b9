"""Reward scorers return what a function or a classifier gives, and say what is wrong with it."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from models.config import ModelError
from orchestrator.config.sections import RewardConfig
from orchestrator.demo.assets import load_lexicon
from orchestrator.errors import RunFailed, UsageError
from orchestrator.worker.rewards import RewardModelActor, find_reward_class, load_reward_function
from tests.support import tiny

ROOT = Path(__file__).parents[2]
FUNCTIONS = """
import math, helper_of_mine
import numpy as np

def lengths(prompts, responses):
    return np.array([len(p) + len(r) for p, r in zip(prompts, responses)])

def short(prompts, responses): return [1.0]
def broken(prompts, responses): return [math.nan if r == "b" else 1 for r in responses]
def text(prompts, responses): return ["good" for _ in responses]
def nothing(prompts, responses): return None
def fails(prompts, responses): raise KeyError("x")
number = 3
"""


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "helper_of_mine.py").touch()
    (tmp_path / "needy.py").write_text("import nothing_like_this")
    (tmp_path / "bad.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_function_of_the_working_folder_is_called_wherever_the_scorer_is_sent(
    working_folder, tmp_path_factory
):
    scorer = load_reward_function("my_rewards:lengths")
    assert scorer.score(["ab", ""], ["c", "de"]) == [3.0, 2.0]
    scorer.close()
    sent = tmp_path_factory.mktemp("elsewhere") / "scorer"
    sent.write_bytes(pickle.dumps(scorer))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).score(['a'], ['b']))"
    done = subprocess.run(
        [sys.executable, "-c", code, sent],
        cwd=sent.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[2.0]\n"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rewards", "not of the form package.module:function, e.g. orchestrator.demo.rewards:sentiment"),
        ("your_rewards:f", "there is no module your_rewards, neither in .* nor installed; start the command"),
        ("os.nothing:f", "there is no module os.nothing"),
        ("needy:f", "needy needs nothing_like_this, which is not installed"),
        ("bad:f", "bad cannot be imported: ZeroDivisionError: division by zero"),
        ("my_rewards:length", "my_rewards has no 'length'; did you mean 'lengths'"),
        ("my_rewards:number", "is of type int, not a function such as orchestrator.demo.rewards:sentiment"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_with_the_remedy(working_folder, path, message):
    with pytest.raises(UsageError, match=f"evaluation.sampling.reward.function: .*{message}"):
        load_reward_function(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "gave 1 numbers for 2 responses"),
        ("broken", "gave nan for the response 'b'"),
        ("text", r"gave \['good', 'good'\], where one number"),
        ("nothing", "gave None, where one number"),
        ("fails", "failed: KeyError: 'x'"),
    ],
)
def test_results_that_are_no_rewards_end_the_run_by_name(working_folder, name, message):
    with pytest.raises(RunFailed, match=f"function my_rewards:{name} {message}"):
        load_reward_function(f"my_rewards:{name}").score(["", ""], ["a", "b"])


@pytest.mark.smollm2
def test_the_example_likes_favourable_responses():
    score = load_lexicon()
    responses = [" a great, funny film", " a dull mess", ""]
    found = load_reward_function("orchestrator.demo.rewards:sentiment").score(["A bad"] * 3, responses)
    assert found == [score(response) for response in responses]
    assert found[0] > 0 > found[1]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory):
    """`classifier(num_labels, **settings)`: the folder of a tiny Llama that classifies."""

    def make(num_labels: int, **settings) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForSequenceClassification(tiny.llama_config(num_labels=num_labels, **settings))
        return tiny.save(tmp_path_factory.mktemp("classifier"), model, tiny.byte_tokenizer())

    return make


def ready(folder: Path | str, **settings) -> RewardModelActor:
    model = RewardModelActor(RewardConfig(model=str(folder), **settings), gpu=False, cpus=1)
    model.load_model()
    return model


PROMPTS = [f"Film {number} was " for number in range(20)]
RESPONSES = ["very " * (number % 4) + "good" for number in range(20)]


def logits_of(folder: Path) -> torch.Tensor:
    """One text at a time, without padding."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), tiny.byte_tokenizer()
    texts = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def test_one_output_is_the_reward(classifier):
    folder = classifier(1)
    found = ready(folder).score(PROMPTS, RESPONSES)
    assert found == pytest.approx(logits_of(folder)[:, 0].tolist(), abs=1e-5)
    assert len(set(found)) == 20


@pytest.mark.parametrize("label", ["good", 2])
@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_of_several_classes_the_reward_is_ones_probability(classifier, label, kind):
    names = {0: "bad", 1: "so-so", 2: "good"}
    folder = classifier(3, id2label=names, problem_type=kind)
    logits = logits_of(folder)
    wanted = logits.softmax(-1) if kind.startswith("single") else logits.sigmoid()
    found = ready(folder, label=label).score(PROMPTS, RESPONSES)
    assert found == pytest.approx(wanted[:, 2].tolist(), abs=1e-5)


def test_long_texts_keep_their_end(classifier):
    model = ready(classifier(1, max_position_embeddings=32))
    assert model.score(["x" * 50], ["y" * 30]) == model.score(["x" * 2], ["y" * 30])
    assert model.score(["x" * 50], ["y" * 30]) != model.score(["x" * 2], ["y" * 29])
    model.score(["", "a"], ["", ""])


def test_labels_are_names_or_numbers_of_classes():
    names = {0: "bad", 1: "good"}
    assert find_reward_class(names, "good") == find_reward_class(names, 1) == 1
    assert find_reward_class({0: "LABEL_0"}, None) is None
    for label, message in [
        (None, r"label is missing: the model has 2 classes, 0 \(bad\), 1 \(good\); set it to"),
        ("goood", "no class 'goood'; did you mean 'good'"),
        (2, r"no class 2; it has 0 \(bad\), 1 \(good\)"),
    ]:
        with pytest.raises(UsageError, match=message):
            find_reward_class(names, label)
    with pytest.raises(UsageError, match="one output, which is the reward; leave label out"):
        find_reward_class({0: "LABEL_0"}, "good")


def test_models_that_do_not_classify_are_refused(classifier, tiny_llama_folder, tiny_gguf_file, tmp_path):
    with pytest.raises(ModelError, match=r"is no classifier: it has no weights score\.weight"):
        ready(tiny_llama_folder)
    with pytest.raises(ModelError, match="is no whole model"):
        ready(tiny_gguf_file)
    with pytest.raises(ModelError, match="no such file or folder"):
        ready(tmp_path / "nothing")
    folder = classifier(1)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        ready(folder)
