"""Samples are the policy's own distribution, and their KL is what a plain computation gives."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from models.adapters import add_lora
from models.config import LoraSettings, ModelError
from models.logprobs import Scorer
from models.parallel import Parallel, prepare_parallel
from models.rows import PromptWithResponses
from orchestrator.config.sections import SamplingConfig
from orchestrator.references.messages import PromptGroup, Scores
from orchestrator.worker.eval_sets import EvaluationSets
from orchestrator.worker.policy import Policy
from orchestrator.worker.sampling import PROMPTS_PER_CHUNK, Sampler
from preferences.split import TokenizedSplit
from preferences.tokens.tables import RaggedArray, TokenTable
from tests.support import tiny
from tests.support.plain_logits import plain_scores

CPU = torch.device("cpu")
WORDS = tiny.word_tokenizer(["good", "bad", "film"])  # few ids, so that every response can be listed
IDS = len(WORDS)
SMALL = {"vocab_size": IDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SETTINGS = SamplingConfig(prompts=19, max_new_tokens=3)
END, OTHER_END = WORDS.eos_token_id, 7


def policy_of(model: PreTrainedModel) -> Policy:
    return Policy(
        parallel=prepare_parallel(Scorer(model.train()), device=CPU, learning_rate=1e-3),
        load_initial_policy=lambda: model,
        tokenizer=WORDS,
        precision=torch.float32,
        plain_rows_reason=None,
        pad_id=0,
        peak_flops=None,
    )


def part_of(prompts: list[list[int]], *, others: tuple[str, ...] = ()) -> TokenizedSplit:
    """Held-out rows with these prompts, that the policy, `a` and `b` read alike, and `others` do not."""

    def table(response: list[int]) -> TokenTable:
        responses = RaggedArray.from_rows([response] * len(prompts))
        return TokenTable(RaggedArray.from_rows(prompts), responses, responses)

    references = {"a": table([6, END]), "b": table([6, END])} | {name: table([5, END]) for name in others}
    ones = np.ones(len(prompts))
    return TokenizedSplit(
        table([6, END]),
        references,
        ones,
        tuple("f:1" for _ in prompts),
        has_pairs=True,
        has_soft_labels=False,
    )


def shuffled(count: int) -> list[list[int]]:
    """Different prompts of 1 to 7 tokens."""
    draw = np.random.default_rng(0)
    drawn = (tuple(draw.integers(IDS, size=draw.integers(1, 8)).tolist()) for _ in range(3 * count))
    return [list(prompt) for prompt in dict.fromkeys(drawn)][:count]


class Client:
    """References in this process; remembers what it was asked."""

    def __init__(self, **models: PreTrainedModel) -> None:
        self._models, self._open = models, {}
        self.asked: list[PromptGroup] = []

    def request_sample_scores(self, ticket, groups, names):
        self.asked += groups if names else []
        self._open[ticket] = {name: plain(self._models[name], groups) for name in names}

    def collect_sample_scores(self, ticket):
        return {
            name: Scores(logps, np.zeros(len(logps)), logps) for name, logps in self._open.pop(ticket).items()
        }


def plain(model: PreTrainedModel, groups: list[PromptGroup]) -> np.ndarray:
    rows = [PromptWithResponses(g.prompt.tolist(), [r.tolist() for r in g.responses]) for g in groups]
    with torch.no_grad():
        return plain_scores(model, rows)[0].double().numpy()


class Length:
    """A reward scorer that records what it scores."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def score(self, prompts, responses):
        self.seen += zip(prompts, responses, strict=True)
        return [float(len(response)) for response in responses]

    def close(self):
        pass


def sampler(policy, part, client, **changes):
    arguments = {"names": ["a", "b"], "scored_by_workers": [], "reward_scorer": None}
    arguments |= {"rank": 0, "world_size": 1, "seed": 0}
    return Sampler(
        changes.pop("config", SETTINGS),
        policy,
        part,
        changes.pop("rows", np.arange(len(part))),
        client,
        **(arguments | changes),
    )


def test_kl_is_the_mean_log_ratio_of_the_samples_under_plain_models():
    model, a, b = (tiny.llama(seed=seed, **SMALL) for seed in range(3))
    model.generation_config.eos_token_id = [OTHER_END]
    client, scorer, prompts = Client(a=a, b=b), Length(), shuffled(24)
    measured = sampler(
        policy_of(model), part_of(prompts[:5] + prompts), client, reward_scorer=scorer
    ).measure_policy(3)
    groups = client.asked
    assert [group.prompt.tolist() for group in groups] == prompts[:19]
    written = [group.responses[0].tolist() for group in groups]
    ends = {response[-1] for response in written if len(response) < 3}
    assert ends == {END, OTHER_END}
    assert all(ends.isdisjoint(response[:-1]) and len(response) <= 3 for response in written)
    ours = plain(model, groups)
    assert measured == {
        "eval/kl/a": pytest.approx(np.mean(ours - plain(a, groups)), abs=1e-5),
        "eval/kl/b": pytest.approx(np.mean(ours - plain(b, groups)), abs=1e-5),
        "eval/reward": pytest.approx(np.mean([len(text) for _, text in scorer.seen])),
        "eval/samples/length": pytest.approx(np.mean([len(response) for response in written])),
    }
    assert measured["eval/kl/a"] > 0.1
    whole = [WORDS.decode([*p, *r], skip_special_tokens=True) for p, r in zip(prompts, written, strict=False)]
    assert [prompt + response for prompt, response in scorer.seen] == whole


def test_samples_follow_the_policys_distribution_whatever_its_own_sampling_settings():
    """How often the likeliest token, the second, ... were drawn, against their probabilities."""
    model = tiny.llama(seed=0, **SMALL)
    own = {"do_sample": True, "top_k": 6, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.5}
    model.generation_config = GenerationConfig(eos_token_id=OTHER_END, **own)
    prompts = shuffled(800)
    client = Client(a=model)
    config = SamplingConfig(prompts=len(prompts), max_new_tokens=2)
    sampler(policy_of(model), part_of(prompts), client, config=config, names=["a"]).measure_policy(0)
    ids = torch.zeros(len(prompts), 9, dtype=torch.long)
    for row, group in enumerate(client.asked):
        text = [*group.prompt, *group.responses[0]]
        ids[row, : len(text)] = torch.tensor(text, dtype=torch.long)
    written = torch.tensor([[True, len(group.responses[0]) == 2] for group in client.asked])
    with torch.no_grad():
        chances = model(ids).logits.double().softmax(-1)
    rows, at = torch.arange(len(ids))[:, None], torch.tensor([[len(p), len(p) + 1] for p in prompts])
    ordered, order = chances[rows, at - 1].sort(-1, descending=True)
    rank = (order == ids[rows, at][..., None]).double().argmax(-1)[written]
    expected = ordered[written].sum(0)
    observed = torch.bincount(rank, minlength=IDS)
    assert len(rank) > 1300
    assert (((observed - expected) ** 2) / expected).sum() < 31.8  # chi-squared, 8 degrees, p = 0.0001


def test_only_prompts_of_the_judged_rows_are_sampled():
    model, client, prompts = tiny.llama(seed=0, **SMALL), Client(a=tiny.llama(seed=1, **SMALL)), shuffled(8)
    split = replace(
        part_of(prompts + prompts[:1]),
        source_names=("other", "judged"),
        source_index=np.array([0, 1, 0, 0, 1, 0, 1, 0, 1], dtype=np.int16),
    )
    rows = EvaluationSets.of_split(split, "judged").judged.numpy()
    sampler(policy_of(model), split, client, rows=rows, names=["a"]).measure_policy(0)
    assert [group.prompt.tolist() for group in client.asked] == [prompts[row] for row in (1, 4, 6, 0)]


class Recording(Parallel):
    """One of several simulated ranks: keeps what it gives to the sum over ranks."""

    def all_reduce_sum(self, tensor):
        self.given = tensor.clone()
        return tensor


def test_samples_depend_on_step_and_seed_and_neither_on_ranks_nor_padding():
    model, reference = tiny.llama(seed=0, **SMALL), tiny.llama(seed=1, **SMALL)
    policy, part = policy_of(model), part_of(shuffled(2 * PROMPTS_PER_CHUNK + 3))
    parallel = Recording(policy.scorer, policy.parallel.optimizer, CPU)
    policy = replace(policy, parallel=parallel)

    def given(rank, world_size, *, seed=0, step=5, pad_id=0):
        client = Client(a=reference, b=reference)
        options = {"rank": rank, "world_size": world_size, "seed": seed, "reward_scorer": Length()}
        sampler(replace(policy, pad_id=pad_id), part, client, **options).measure_policy(step)
        return parallel.given

    whole = given(0, 1)
    assert torch.equal(whole, given(0, 2) + given(1, 2))
    assert torch.equal(whole, sum(given(rank, 5) for rank in range(5)))
    assert torch.equal(whole, given(0, 1, pad_id=8))
    assert not torch.equal(whole, given(0, 1, step=6))
    assert not torch.equal(whole, given(0, 1, seed=1))


def test_measuring_leaves_the_policy_and_random_numbers_as_they_were(caplog):
    model = tiny.llama(seed=0, **SMALL)
    own = model.generation_config
    policy = policy_of(model)
    transformers_logging.enable_propagation()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(policy, part_of([[4, END], [END], [0], [3]]), Client(a=model, b=model)).measure_policy(0)
    transformers_logging.disable_propagation()
    assert not caplog.records
    assert torch.equal(torch.get_rng_state(), before)
    assert model.generation_config is own
    assert all(module.training for module in policy.scorer.modules())


def test_a_reference_in_process_is_the_policy_without_its_adapter():
    start = tiny.llama(seed=0, **SMALL)
    model = add_lora(tiny.llama(seed=0, **SMALL), LoraSettings(r=4, dropout=0.5))
    policy, client = policy_of(model), Client(b=start)
    sample = sampler(policy, part_of(shuffled(12)), client, scored_by_workers=["a"])
    assert sample.measure_policy(0)["eval/kl/a"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    reported = []
    moved = sample.measure_policy(1, lambda *counts: reported.append(counts))
    assert reported == [(0, 12), (8, 12)], "before every chunk"
    assert moved["eval/kl/a"] > 0.05
    assert moved["eval/kl/a"] == pytest.approx(moved["eval/kl/b"], abs=1e-5)


def test_a_reference_that_reads_other_tokens_has_no_kl():
    model = tiny.llama(seed=0, **SMALL)
    policy, part, client = policy_of(model), part_of(shuffled(4), others=("other",)), Client(a=model)
    measured = sampler(policy, part, client, names=["other", "a"]).measure_policy(0)
    assert measured.keys() == {"eval/kl/a", "eval/samples/length"}
    budget = SETTINGS.model_copy(update={"kl_budget": 5.0})
    assert sampler(policy, part, client, names=["a", "other"], config=budget)
    with pytest.raises(ModelError, match=r"'other' reads other token ids .* or leave kl_budget out"):
        sampler(policy, part, client, names=["other", "a"], config=budget)


def test_responses_longer_than_the_policy_has_positions_for_are_refused():
    policy = policy_of(tiny.llama(seed=0, max_position_embeddings=16, **SMALL))
    part = part_of([[6] * 10])
    sampler(policy, part, Client(), config=SamplingConfig(max_new_tokens=6))
    with pytest.raises(ModelError, match="16 positions; set it to at most 6"):
        sampler(policy, part, Client(), config=SamplingConfig(max_new_tokens=7))
