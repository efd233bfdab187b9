"""Weights of pairs, from the split to the gradient: a pair of weight 2 is a pair that occurs twice."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from losses.config import LossConfig
from losses.presets import preset
from models.logprobs import Scorer
from models.parallel import Parallel
from orchestrator.worker.metrics import (
    MetricFlags,
    StepTable,
    compute_eval_metrics,
    compute_training_metrics,
)
from orchestrator.worker.step import run_evaluation_pass, run_training_step
from preferences.split import TokenizedSplit
from tests.support import tiny
from tests.support.pair_batches import PAIRS, WEIGHTS, build_split, load_batches, take_rows

CPU = torch.device("cpu")
FLAGS = MetricFlags(has_soft_labels=True)
LOSSES = {
    "rpo": preset("rpo", soft_label={"type": "geometric"}, sft_weight=0.5),
    "orpo": preset("orpo", soft_label={"type": "mixture"}),
}


@dataclass
class Rank(Parallel):
    """One of several simulated ranks, which keeps its gradient and takes no step."""

    scorer: Scorer
    world_size: int = 1  # type: ignore[assignment]

    def __post_init__(self) -> None:
        weights = self.scorer.parameters()
        super().__init__(self.scorer, torch.optim.SGD(weights, lr=0.0), CPU)

    def step(self) -> None:
        grads = [w.grad for w in self.scorer.parameters() if w.grad is not None]
        self.gradient = torch.cat([grad.flatten() for grad in grads])


def take_step(
    split: TokenizedSplit,
    indices: np.ndarray,
    loss: LossConfig = LOSSES["rpo"],
    *,
    ranks: int = 1,
    budget: int = 4096,
) -> tuple[StepTable, torch.Tensor]:
    """The table summed over simulated ranks, and their mean gradient."""
    table, gradients = StepTable(len(indices), ["base"]), []
    for rank in range(ranks):
        parallel = Rank(Scorer(tiny.llama(num_hidden_layers=1).double()), ranks)
        batches = load_batches(split, indices, rank=rank, ranks=ranks, budget=budget)
        own = StepTable(len(indices), ["base"])
        run_training_step(parallel, batches, loss=loss, table=own, clip_norm=1e9)
        table.values += own.values
        gradients.append(parallel.gradient)
    return table, torch.stack(gradients).mean(0)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_an_integer_weight_repeats_its_pair(loss: LossConfig) -> None:
    rows = np.repeat(np.arange(PAIRS), WEIGHTS.astype(int))
    weighted, gradient = take_step(build_split(WEIGHTS), np.arange(PAIRS), loss)
    repeated, expected = take_step(take_rows(build_split(), rows), np.arange(len(rows)), loss)
    # A float64 model's norms are float32.
    assert float((gradient - expected).abs().max()) < 1e-6
    plain, other = take_step(build_split(), np.arange(PAIRS), loss)
    assert float((gradient - other).abs().max()) > 1e-3
    metrics = compute_eval_metrics(weighted, FLAGS)
    by_repetition = compute_eval_metrics(repeated, FLAGS)
    for name in metrics.keys() - {"eval/accuracy_interval"}:
        assert metrics[name] == pytest.approx(by_repetition[name], rel=1e-6), name
    assert metrics["eval/loss"] != pytest.approx(compute_eval_metrics(plain, FLAGS)["eval/loss"], rel=1e-3)


def test_weights_count_relative_to_those_of_the_step_however_it_is_split() -> None:
    indices, split = np.array([6, 0, 4, 3, 1]), build_split(WEIGHTS / 3)
    whole, gradient = take_step(split, indices)
    assert whole["pair_weight"].tolist() == pytest.approx((WEIGHTS[indices] * 5 / 9).tolist())
    parts, others = take_step(split, indices, ranks=2, budget=30)
    assert torch.allclose(gradient, others, atol=1e-6)
    ours, theirs = (compute_training_metrics(table, FLAGS) for table in (whole, parts))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_no_weights_are_weights_of_one_bit_for_bit() -> None:
    (plain, gradient), (ones, same) = (
        take_step(build_split(weights), np.arange(PAIRS), budget=40) for weights in (None, np.ones(PAIRS))
    )
    assert torch.equal(plain.values, ones.values)
    assert torch.equal(gradient, same)
    metrics = compute_eval_metrics(ones, FLAGS)
    assert metrics == compute_eval_metrics(plain, FLAGS)
    assert metrics["eval/loss"] == float(plain["loss"].mean())
    assert metrics["eval/logps/chosen"] == float(plain["chosen_logp"].mean())


def test_a_step_of_no_weight_has_no_gradient_and_no_means() -> None:
    table, gradient = take_step(build_split(np.zeros(PAIRS)), np.arange(PAIRS))
    assert float(gradient.abs().max()) == 0
    assert compute_eval_metrics(table, FLAGS) == {}


def test_an_evaluation_weighs_pairs_as_a_step_does() -> None:
    split, indices = build_split(WEIGHTS), np.arange(PAIRS)
    trained, _ = take_step(split, indices)
    parallel = Rank(Scorer(tiny.llama(num_hidden_layers=1).double()))
    batches = load_batches(split, indices, budget=40)
    evaluated = run_evaluation_pass(parallel, batches, loss=LOSSES["rpo"], table=StepTable(PAIRS, ["base"]))
    assert torch.allclose(evaluated.values[:-1], trained.values[:-1], rtol=1e-6)
