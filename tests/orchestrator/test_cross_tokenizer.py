"""References with a tokenizer and a chat template of their own: scores equal hand-made ones, on real Ray."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from losses.presets import preset
from losses.scores import ReferenceScores
from models.config import LoraSettings, ModelConfig, PolicyConfig
from models.load import load_model, load_tokenizer, locate_model
from models.logprobs import Scorer
from models.parallel import prepare_parallel as make_parallel
from models.rows import PromptWithResponses, build_rows
from orchestrator.config.run import RunConfig, parse_run
from orchestrator.demo.assets import fetch_gpt2_tokenizer, fetch_smollm2
from orchestrator.driver.prepare import PreparedRun, prepare_run
from orchestrator.driver.train import train_run
from orchestrator.references.client import ReferenceArrays, ReferenceClient
from orchestrator.references.messages import ReferenceSpec
from orchestrator.references.service import start_references
from orchestrator.tracking.metrics_file import read_metrics
from orchestrator.worker.metrics import StepTable
from orchestrator.worker.step import MicroBatch, run_training_step, to_pair_scores
from tests.support import tiny

POSITIONS = 64
FILM_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)

TEXTS = [
    ("The film opens on a quiet street, and", " then everything goes wrong.", " nothing happens, ever."),
    ("Über den Film läßt sich sagen:", " großartig 🎬!", " naja…"),
    ("I had hoped for more: ", "the plot is thin.", "it was wonderful, 10/10!"),
    ("2019 was\n\nthe year", "\nof sequels", " of nothing"),
]
TOO_LONG = ("Rated " + "a😀b " * 24, "good", "bad")
"""Under 100 of SmolLM2's tokens at most; more than GPT-2's 64 positions here."""


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama behind SmolLM2's own tokenizer and chat template."""
    tokenizer = AutoTokenizer.from_pretrained(fetch_smollm2())
    model = tiny.llama(
        vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=2
    )
    return tiny.save(tmp_path_factory.mktemp("cross") / "policy", model, tokenizer)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of few positions behind its own tokenizer, with a template that it lacks by itself."""
    tokenizer = AutoTokenizer.from_pretrained(fetch_gpt2_tokenizer())
    tokenizer.chat_template = FILM_TEMPLATE
    model = tiny.gpt2(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tiny.save(tmp_path_factory.mktemp("cross") / "gpt2", model, tokenizer)


def chat(text: tuple[str, str, str]) -> dict[str, Any]:
    prompt, chosen, rejected = (part.strip() for part in text)
    return {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def plain(text: tuple[str, str, str]) -> dict[str, Any]:
    return dict(zip(("prompt", "chosen", "rejected"), text, strict=True))


def run_over(rows: list[dict[str, Any]], policy: Path, reference: Path, folder: Path) -> RunConfig:
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_run(
        {
            "name": "cross",
            "policy": {"model": str(policy), "adapter": {"r": 2, "alpha": 4}},
            "references": {"primary": "other", "models": {"other": {"model": str(reference)}}},
            "data": {"train": str(folder / "pairs.jsonl"), "max_length": 200, "max_prompt_length": 190},
            "loss": {"preset": "dpo"},
            "storage_path": str(folder / "runs"),
        },
        source="cross",
    )


def served(prepared: PreparedRun) -> ReferenceArrays:
    """What the running reference answers for all rows."""
    model = prepared.references["other"]
    spec = ReferenceSpec(
        name="other",
        config=model.config.model_copy(update={"dtype": "float32"}),
        fingerprint=model.fingerprint.digest,
        num_cpus=0.1,
    )
    with start_references([spec], prepared.config.storage_path) as service:
        client = ReferenceClient(service.routers, prepared.train.references)
        client.request_scores("all", np.arange(len(prepared.train)))
        return client.collect_scores("all")["other"]


def by_hand(folder: Path, prompt: list[int], response: list[int]) -> tuple[float, int, float]:
    """Summed log-prob, length and mean normalised entropy of a response from plain logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logps = torch.log_softmax(logits.double(), dim=-1)
    entropy = -(logps.exp() * logps).sum(-1).mean() / math.log(logits.shape[-1])
    return logps[range(len(response)), response].sum().item(), len(response), entropy.item()


def assert_scores(arrays: ReferenceArrays, expected: list[tuple[tuple[float, int, float], ...]]) -> None:
    for side in (0, 1):
        logps, lengths, entropies = zip(*(pair[side] for pair in expected), strict=True)
        name = ("chosen", "rejected")[side]
        np.testing.assert_allclose(getattr(arrays, name), logps, rtol=1e-5)
        np.testing.assert_array_equal(getattr(arrays, f"{name}_lengths"), lengths)
        np.testing.assert_allclose(getattr(arrays, f"{name}_entropy"), entropies, rtol=1e-5)


@pytest.mark.usefixtures("cluster")
def test_plain_text_is_scored_in_the_references_own_tokens(
    policy_folder: Path, gpt2_folder: Path, tmp_path: Path
) -> None:
    rows = [plain(text) for text in (*TEXTS[:2], TOO_LONG, *TEXTS[2:])]
    prepared = prepare_run(run_over(rows, policy_folder, gpt2_folder, tmp_path / "plain"))

    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    policy_tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    expected = []
    for prompt, *responses in TEXTS:
        # GPT-2's tokenizer puts nothing before a text; its end of text ends a response.
        start = tokenizer(prompt)["input_ids"]
        ends = [[*tokenizer(response)["input_ids"], tokenizer.eos_token_id] for response in responses]
        expected.append(tuple(by_hand(gpt2_folder, start, end) for end in ends))
    assert_scores(served(prepared), expected)

    assert prepared.counts["train"]["pairs"] == len(TEXTS)
    assert prepared.counts["train"]["skipped"] == {"too long for reference other": 1}
    for i, (prompt, chosen, _) in enumerate(TEXTS):
        pair = prepared.train.policy[i]
        assert pair.prompt.tolist() == policy_tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert policy_tokenizer.decode(pair.chosen) == chosen + policy_tokenizer.eos_token
        assert pair.chosen.tolist() != prepared.train.references["other"][i].chosen.tolist()


@pytest.mark.usefixtures("cluster")
def test_messages_are_rendered_in_each_models_own_template(
    policy_folder: Path, gpt2_folder: Path, tmp_path: Path
) -> None:
    rows = [chat(text) for text in TEXTS[:3]]
    prepared = prepare_run(run_over(rows, policy_folder, gpt2_folder, tmp_path / "chat"))

    expected = []
    for i, row in enumerate(rows):
        ids = {folder: rendered(folder, row, "chosen") for folder in (policy_folder, gpt2_folder)}
        pair = prepared.train.policy[i]
        assert (pair.prompt.tolist(), pair.chosen.tolist()) == ids[policy_folder]
        assert ids[policy_folder] != ids[gpt2_folder]
        expected.append(
            tuple(by_hand(gpt2_folder, *rendered(gpt2_folder, row, side)) for side in ("chosen", "rejected"))
        )
    assert_scores(served(prepared), expected)
    assert AutoTokenizer.from_pretrained(gpt2_folder).decode(
        prepared.train.references["other"][0].prompt
    ) == ("[system] Be brief.\n[user] The film opens on a quiet street, and\n[assistant] ")


def rendered(folder: Path, row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
    """Prompt and response ids: the template's text up to the answer, and from there to its end of turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
    assert whole.startswith(prompt)
    end = tokenizer.eos_token  # for both: <|im_end|>, <|endoftext|>
    answer = whole[len(prompt) : whole.rindex(end) + len(end)]
    encode = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    assert encode[1][-1] == tokenizer.eos_token_id
    return encode[0], encode[1]


@pytest.mark.smollm2
def test_a_real_model_against_itself_begins_at_log_2() -> None:
    """Models and step alone: the frozen copy's scores, then one training step of the policy."""
    folder = str(fetch_smollm2())
    frozen = ModelConfig(model=folder, dtype="float32")
    policy = PolicyConfig(model=folder, dtype="float32", adapter=LoraSettings(r=4, alpha=8))
    tokenizer: Any = load_tokenizer(locate_model(frozen), frozen)
    groups = [
        PromptWithResponses(
            tokenizer(prompt)["input_ids"],
            [[*tokenizer(r)["input_ids"], tokenizer.eos_token_id] for r in responses],
        )
        for prompt, *responses in (TEXTS[0], TEXTS[2])
    ]
    rows = build_rows(groups, shared=True, pad_id=tokenizer.pad_token_id)
    scorer = Scorer(load_model(locate_model(frozen), frozen, device="cpu", trainable=False))
    with torch.no_grad():
        scores = scorer(rows, entropy=True)
    pairs, _ = to_pair_scores(scores, paired=True)
    assert scores.entropy is not None
    reference = ReferenceScores(
        pairs.chosen.double(),
        pairs.rejected.double(),
        pairs.chosen_lengths,
        pairs.rejected_lengths,
        scores.entropy[0::2],
        scores.entropy[1::2],
    )
    model = load_model(locate_model(policy), policy, device="cpu", trainable=True)
    parallel = make_parallel(Scorer(model), device=torch.device("cpu"), learning_rate=1e-3)
    batch = MicroBatch(
        rows=rows, slots=torch.arange(2), soft_labels=torch.ones(2).double(), references=(reference,)
    )
    losses = []
    for _ in range(2):
        table = StepTable(2, ["base"], torch.device("cpu"))
        table, norm = run_training_step(parallel, [batch], loss=preset("dpo"), table=table, clip_norm=1.0)
        assert norm > 0
        losses.append(table["loss"].mean().item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] < losses[0] - 1e-3, "and the step learns"


@pytest.mark.smollm2
@pytest.mark.usefixtures("cluster")
def test_a_run_of_a_real_model_against_itself_begins_at_log_2(tmp_path: Path) -> None:
    folder = fetch_smollm2()
    config = run_over([plain(TEXTS[0]), plain(TEXTS[2])], folder, folder, tmp_path / "real")
    training = config.training.model_copy(update={"max_steps": 1, "pairs_per_step": 2})
    config = config.model_copy(update={"training": training})
    record = train_run(config)
    assert read_metrics(config.folder)[-1]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert record.reference_counts["other"]["scored"] == 4
    model = AutoModelForCausalLM.from_pretrained(config.folder / "export" / "model", dtype="auto")
    assert model.dtype == torch.float32
