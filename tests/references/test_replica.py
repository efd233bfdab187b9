"""What replicas compute, against `log_softmax` over the model's own logits; without Ray, then through it."""

import os
import signal

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.config import ModelConfig, ModelError
from models.logprobs import Scorer
from orchestrator.references.client import ReferenceClient, group_pairs
from orchestrator.references.messages import PromptGroup, ReferenceSpec, ScoreRequest, ScoringError
from orchestrator.references.replica import FrozenModel, Replica
from orchestrator.references.service import start_references
from orchestrator.references.store import digest_response
from tests.support import tiny

TOLERANCE = 2e-4  # nats, on sums of about a hundred


def plain(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray) -> tuple[float, int, float]:
    ids = torch.tensor(np.concatenate([prompt, response])[None].astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    logps = logits.log_softmax(-1)
    total = sum(float(logps[place, token]) for place, token in enumerate(response))
    entropy = -(logps.exp() * logps).sum(-1).mean() / np.log(logits.shape[-1])
    return total, len(response), float(entropy)


def frozen(model: PreTrainedModel, *, shared: bool, budget: int = 10_000) -> FrozenModel:
    return FrozenModel("base", Scorer(model), device=torch.device("cpu"), shared=shared, budget=budget)


def request_of(groups: list[PromptGroup]) -> ScoreRequest:
    return ScoreRequest.pack(groups)


def agrees(model: PreTrainedModel, groups: list[PromptGroup], scores) -> bool:
    wanted = [plain(model, group.prompt, response) for group in groups for response in group.responses]
    found = [tuple(scores[i]) for i in range(len(scores))]
    return len(found) == len(wanted) and np.allclose(found, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize(("shared", "budget"), [(True, 10_000), (True, 60), (False, 60)])
def test_scores_equal_log_softmax_in_the_order_asked(build, shared, budget, make_table):
    model = build()
    groups = group_pairs(make_table(7), range(7))
    groups[3] = PromptGroup(groups[3].prompt, groups[3].responses[:1], groups[3].keys[:1])
    groups[5].responses.append(groups[0].responses[0])
    groups[5].keys.append(digest_response(groups[5].prompt, groups[0].responses[0]))
    replica = frozen(model, shared=shared, budget=budget)
    assert agrees(model, groups, replica.score(request_of(groups)))
    assert (replica.forwards == 1) == (budget == 10_000)


class OutOfMemory(torch.nn.Module):
    """A scorer with room for so many positions."""

    def __init__(self, scorer: Scorer, room: int) -> None:
        super().__init__()
        self.scorer, self.room, self.refused = scorer, room, 0

    def forward(self, rows, *, entropy=False):
        if rows.input_ids.numel() > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.scorer(rows, entropy=entropy)


def test_out_of_memory_halves_the_batch_and_the_batches_after_it(make_table):
    model = tiny.llama()
    groups = group_pairs(make_table(12), range(12))
    scorer = OutOfMemory(Scorer(model), room=100)
    replica = FrozenModel("base", scorer, device=torch.device("cpu"), shared=True, budget=10_000)
    assert agrees(model, groups, replica.score(request_of(groups)))
    refused = scorer.refused
    assert refused > 0
    assert agrees(model, groups, replica.score(request_of(groups)))
    assert scorer.refused - refused < refused


def test_the_budget_grows_again_once_memory_is_free(make_table, monkeypatch):
    monkeypatch.setattr("orchestrator.references.replica.FORWARDS_BEFORE_GROWTH", 2)
    groups = group_pairs(make_table(12), range(12))
    scorer = OutOfMemory(Scorer(tiny.llama()), room=100)
    replica = FrozenModel("base", scorer, device=torch.device("cpu"), shared=True, budget=10_000)
    replica.score(request_of(groups))
    scorer.room = 10_000
    for _ in range(8):
        before = replica.forwards
        replica.score(request_of(groups))
    assert replica.forwards - before == 1


def test_a_shared_row_that_does_not_fit_falls_apart_and_then_the_error_says_what_to_do(make_table):
    model = tiny.llama()
    prompt, a, b = (np.arange(n, dtype=np.int32) for n in (20, 15, 16))
    groups = [PromptGroup(prompt, [a, b], [b"a" * 16, b"b" * 16])]
    device = torch.device("cpu")
    roomy = FrozenModel("base", OutOfMemory(Scorer(model), room=40), device=device, shared=True, budget=999)
    assert agrees(model, groups, roomy.score(request_of(groups)))
    tight = FrozenModel("base", OutOfMemory(Scorer(model), room=10), device=device, shared=True, budget=999)
    with pytest.raises(ScoringError, match=r"reference 'base': memory ran out on a single row of 3\d tokens"):
        tight.score(request_of(groups))


def spec_of(folder, **changes) -> ReferenceSpec:
    settings = {
        "name": "base",
        "config": ModelConfig(model=str(folder)),
        "fingerprint": "e" * 32,
        "num_cpus": 0.1,
        "max_retries": 2,
    }
    return ReferenceSpec(**(settings | changes))


def test_setup_comes_before_score(tmp_path):
    with pytest.raises(ScoringError, match="before setup"):
        Replica(spec_of(tmp_path)).score(request_of([]))


def test_a_promised_gpu_that_is_not_there_is_refused(tiny_llama_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ScoringError, match=r"was given 0\.5 GPU"):
        Replica(spec_of(tiny_llama_folder, num_gpus=0.5)).setup()


def test_two_live_references_score_what_the_models_say_through_a_kill(
    ray_running, tiny_llama_folder, tiny_sliding_folder, make_table, tmp_path
):
    table = make_table(24)
    folders = {"base": tiny_llama_folder, "window": tiny_sliding_folder}
    specs = [
        spec_of(folder, name=name, fingerprint=name, max_tokens_per_batch=128)
        for name, folder in folders.items()
    ]
    with start_references(specs, tmp_path) as service:
        client = ReferenceClient(service.routers, dict.fromkeys(folders, table))
        client.request_scores("first", range(4))
        first = client.collect_scores("first")
        (pid,) = ray.get(service.routers["base"].replica_pids.remote())
        client.request_scores("rest", range(24))
        os.kill(pid, signal.SIGKILL)
        rest = client.collect_scores("rest")
        stats = service.stats()
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        wanted = [
            (*plain(model, pair.prompt, pair.chosen), *plain(model, pair.prompt, pair.rejected))
            for pair in table
        ]
        for arrays, rows in ((first[name], wanted[:4]), (rest[name], wanted)):
            found = (
                arrays.chosen,
                arrays.chosen_lengths,
                arrays.chosen_entropy,
                arrays.rejected,
                arrays.rejected_lengths,
                arrays.rejected_entropy,
            )
            np.testing.assert_allclose(np.transpose(found), rows, atol=TOLERANCE, rtol=0)
    assert stats["base"].replicas_started == 2
    assert stats["window"].replicas_started == 1
    assert stats["base"].scored == stats["window"].scored == 48
    np.testing.assert_array_equal(first["base"].chosen, rest["base"].chosen[:4])  # the store's own


def test_a_missing_model_is_the_users_error(ray_running, tmp_path, make_table):
    with start_references([spec_of(tmp_path / "nowhere")], tmp_path / "storage") as service:
        client = ReferenceClient(service.routers, {"base": make_table(2)})
        client.request_scores(0, [0, 1])
        with pytest.raises(ModelError, match=r"reference 'base': .*nowhere"):
            client.collect_scores(0)
        with pytest.raises(ModelError, match="nowhere"):
            service.start_replicas()
