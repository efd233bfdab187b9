"""One step on plain tensors: whatever the split into micro-batches, it is the same step."""

import math

import numpy as np
import pytest
import torch

from losses.presets import preset
from losses.scores import ReferenceScores
from models.logprobs import Scorer
from models.parallel import Parallel, prepare_parallel
from models.rows import PromptWithResponses, build_rows
from orchestrator.worker.metrics import StepTable
from orchestrator.worker.step import MicroBatch, NonFiniteLoss, run_evaluation_pass, run_training_step
from tests.support import tiny

CPU = torch.device("cpu")


def policy(seed: int = 0, learning_rate: float = 1e-2) -> Parallel:
    model = tiny.llama(seed=seed).train()
    return prepare_parallel(Scorer(model), device=CPU, learning_rate=learning_rate)


def weights_of(parallel: Parallel) -> dict[str, torch.Tensor]:
    return {name: state["weight"].clone() for name, state in parallel.iterate_full_state(moments=False)}


def pairs(count: int = 6) -> list[PromptWithResponses]:
    generator = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return generator.integers(0, 256, size=int(generator.integers(low, high)))

    return [PromptWithResponses(ids(3, 9), [ids(2, 12), ids(2, 12)]) for _ in range(count)]


def reference_scores(scorer: Scorer, groups: list[PromptWithResponses]) -> ReferenceScores:
    with torch.no_grad():
        scores = scorer(build_rows(groups, shared=False, pad_id=0), entropy=True)
    assert scores.entropy is not None
    return ReferenceScores(
        *(f[side::2] for f in (scores.logps, scores.lengths, scores.entropy) for side in (0, 1))
    )


def batch(
    groups: list[PromptWithResponses],
    at: list[int],
    references: list[ReferenceScores],
    *,
    shared: bool = True,
) -> MicroBatch:
    cut = tuple(ReferenceScores(*(v[at] for v in vars(r).values())) for r in references)
    return MicroBatch(
        rows=build_rows([groups[i] for i in at], shared=shared, pad_id=0),
        slots=torch.tensor(at, dtype=torch.long),
        soft_labels=torch.linspace(0.5, 1, len(groups), dtype=torch.float64)[at],
        references=cut,
    )


LOSS = preset("mrpo", soft_label={"type": "geometric"}, dispersion={"type": "entropy", "phi_star": 0.5})


def trajectory(
    split: list[list[int]], *, shared: bool = True, steps: int = 3
) -> tuple[list[float], torch.Tensor]:
    groups, parallel = pairs(), policy()
    references = [reference_scores(Scorer(tiny.llama(seed=s)), groups) for s in (0, 1)]
    batches = [batch(groups, part, references, shared=shared) for part in split]
    losses = []
    for _ in range(steps):
        table, _ = run_training_step(
            parallel, batches, loss=LOSS, table=StepTable(6, ["a", "b"]), clip_norm=1.0
        )
        losses.append(float(table["loss"].mean()))
    weights = torch.cat([w.flatten() for w in weights_of(parallel).values()])
    return losses, weights


@pytest.mark.parametrize("split", [[[0], [1], [2], [3], [4], [5]], [[5, 1, 3], [0], [], [4, 2]]])
def test_any_split_into_microbatches_is_the_same_step(split: list[list[int]]) -> None:
    whole, weights = trajectory([[0, 1, 2, 3, 4, 5]])
    losses, others = trajectory(split)
    assert losses == pytest.approx(whole, rel=1e-5)
    assert whole[0] != pytest.approx(whole[-1], rel=1e-3)
    assert torch.allclose(weights, others, atol=2e-4)


def test_plain_rows_are_the_same_step() -> None:
    shared, plain = trajectory([[0, 1, 2], [3, 4, 5]]), trajectory([[0, 1, 2], [3, 4, 5]], shared=False)
    assert plain[0] == pytest.approx(shared[0], rel=1e-5)


def test_the_first_step_against_oneself_is_log_2() -> None:
    groups, parallel = pairs(), policy()
    own = reference_scores(parallel.scorer, groups)
    table, _ = run_training_step(
        parallel,
        [batch(groups, list(range(6)), [own])],
        loss=preset("dpo"),
        table=StepTable(6, ["self"]),
        clip_norm=1.0,
    )
    assert table["loss"].tolist() == pytest.approx([math.log(2)] * 6, abs=1e-5)


def test_the_norm_of_the_gradient_is_clipped() -> None:
    groups, parallel = pairs(), policy()
    own = reference_scores(parallel.scorer, groups)
    seen = {}
    inner = parallel.step

    def step() -> None:
        seen["norm"] = math.sqrt(sum(float(w.grad.square().sum()) for w in parallel.scorer.parameters()))
        inner()

    parallel.step = step  # type: ignore[method-assign]
    _, before = run_training_step(
        parallel,
        [batch(groups, [0, 1, 2], [own])],
        loss=preset("dpo", beta=5.0),
        table=StepTable(3, ["s"]),
        clip_norm=0.1,
    )
    assert before > 0.1
    assert seen["norm"] == pytest.approx(0.1, rel=1e-3)


def test_a_loss_that_is_not_finite_names_its_pairs_and_touches_no_weight() -> None:
    groups, parallel = pairs(), policy()
    own = reference_scores(parallel.scorer, groups)
    own.chosen[4] = float("nan")
    before = weights_of(parallel)
    with pytest.raises(NonFiniteLoss) as caught:
        run_training_step(
            parallel,
            [batch(groups, [0, 1, 2], [own]), batch(groups, [3, 4, 5], [own])],
            loss=preset("dpo"),
            table=StepTable(6, ["self"]),
            clip_norm=1.0,
        )
    assert caught.value.slots == (4,)
    after = weights_of(parallel)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(w.grad is None for w in parallel.scorer.parameters())


def test_evaluation_leaves_weights_and_mode_and_equals_that_of_an_equal_reference() -> None:
    groups, parallel = pairs(), policy()
    own = reference_scores(parallel.scorer, groups)
    other = reference_scores(Scorer(tiny.llama(seed=1)), groups)
    batches = [batch(groups, [0, 2, 4], [own, other]), batch(groups, [1, 3, 5], [own, other])]
    before = weights_of(parallel)
    table = run_evaluation_pass(parallel, batches, loss=LOSS, table=StepTable(6, ["a", "b"]))
    equal = run_evaluation_pass(
        parallel, batches, loss=LOSS, table=StepTable(6, ["a", "b"]), equal_reference=0
    )
    assert torch.allclose(table.values[:-1], equal.values[:-1], atol=1e-4)
    assert equal.cost.tokens == 0 < table.cost.tokens
    assert parallel.module.training
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(parallel).items())


def test_supervised_rows_learn_their_completion() -> None:
    groups = [PromptWithResponses(group.prompt, [group.responses[0]]) for group in pairs()]
    parallel = policy()
    rows = build_rows(groups, shared=True, pad_id=0)
    one = MicroBatch(rows=rows, slots=torch.arange(6), soft_labels=torch.ones(6), references=(), paired=False)
    losses = []
    for _ in range(5):
        table, _ = run_training_step(
            parallel, [one], loss=preset("sft"), table=StepTable(6, []), clip_norm=1.0
        )
        losses.append(float(table["loss"].mean()))
    with torch.no_grad():
        start = Scorer(tiny.llama())(rows)
    assert losses[0] == pytest.approx(float((-start.logps / start.lengths).mean()), rel=1e-5)
    assert losses[-1] < losses[0]
