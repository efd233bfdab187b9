"""The step table's sums and the held-out metrics, against the definitions written out."""

import math

import numpy as np
import pytest
import torch

from losses.preference import preference_loss
from losses.presets import preset
from losses.scores import PairScores, ReferenceScores
from orchestrator.worker.metrics import (
    MetricFlags,
    StepCost,
    StepTable,
    compute_calibration_error,
    compute_eval_metrics,
    compute_label_nll,
    compute_majority_agreement,
    compute_perf_metrics,
    compute_training_metrics,
)


def scores(seed: int, count: int, kind: type) -> PairScores:
    generator = torch.Generator().manual_seed(seed)
    sums = [-20 * torch.rand(count, generator=generator, dtype=torch.float64) - 1 for _ in range(2)]
    lengths = [torch.randint(3, 20, (count,), generator=generator) for _ in range(2)]
    entropy = [torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(2)]
    return kind(*sums, *lengths, *(entropy if kind is ReferenceScores else []))


def table_of(count: int, *, parts: list[list[int]]) -> tuple[StepTable, PairScores, list[ReferenceScores]]:
    """A table summed over as many ranks as there are parts, each recording its own slots only."""
    policy = scores(0, count, PairScores)
    references = [scores(seed, count, ReferenceScores) for seed in (1, 2)]
    loss = preset("mrpo", soft_label={"type": "geometric"})
    labels = torch.linspace(0.3, 1, count, dtype=torch.float64)
    total = StepTable(count, ["base", "movie"])
    for part in parts:
        at = torch.tensor(part)
        cut = [type(s)(*(v[at] for v in vars(s).values())) for s in (policy, *references)]
        own = StepTable(count, ["base", "movie"])
        output = preference_loss(cut[0], cut[1:], config=loss, soft_labels=labels[at])
        own.record_pairs(
            at, cut[0], cut[1:], output, entropy=torch.full((len(part),), 0.5), soft_labels=labels[at]
        )
        own.add_cost(StepCost(tokens=10, positions=16, flops=100.0, reference_stall=0.5))
        total.values += own.values
    return total, policy, references


def test_ranks_sum_to_the_whole_batch() -> None:
    whole, policy, references = table_of(7, parts=[[0, 1, 2, 3, 4, 5, 6]])
    split, *_ = table_of(7, parts=[[6, 0], [3, 1, 5], [2, 4]])
    assert torch.equal(whole.values[:-1], split.values[:-1])
    metrics = compute_training_metrics(split, MetricFlags(has_dispersion=True, has_reference_weights=True))
    assert metrics["logps/chosen"] == pytest.approx(float(policy.chosen.mean()))
    by_hand = (policy.chosen - references[1].chosen + policy.rejected - references[1].rejected) / 2
    assert metrics["logratio/movie"] == pytest.approx(float(by_hand.mean()))
    assert metrics["weights/base"] + metrics["weights/movie"] == pytest.approx(1)
    assert split.cost == StepCost(tokens=30, positions=48, flops=300.0, reference_stall=1.5)


def test_speed_is_per_second_over_all_ranks() -> None:
    table, *_ = table_of(4, parts=[[0, 1], [2, 3]])
    metrics = compute_perf_metrics(table, seconds=2.0, world_size=2, peak_flops=50.0)
    assert metrics == {
        "perf/tokens_per_second": 10.0,
        "perf/pairs_per_second": 2.0,
        "perf/padding": 1 - 20 / 32,
        "perf/reference_stall": 0.5,
        "perf/mfu": 200 / (2.0 * 50.0 * 2),
    }


def test_accuracy_counts_ties_half_and_leaves_out_pairs_without_majority() -> None:
    table = StepTable(5, [])
    table["primary_gap"][:] = torch.tensor([1.0, -1.0, 0.0, 5.0, -2.0], dtype=torch.float64)
    table["soft_label"][:] = torch.tensor([0.9, 0.9, 0.9, 0.5, 0.2], dtype=torch.float64)
    table["pair_weight"][:] = 1
    assert compute_majority_agreement(table).tolist() == [1.0, 0.0, 0.5, 1.0]
    metrics = compute_eval_metrics(table, MetricFlags())
    assert metrics["eval/accuracy"] == 0.625
    assert metrics["eval/accuracy_interval"] == pytest.approx(1.96 * math.sqrt(0.625 * 0.375 / 4))


def test_means_are_weighted_and_percentiles_count_pairs() -> None:
    table, policy, references = table_of(7, parts=[[0, 1, 2, 3, 4, 5, 6]])
    weights = np.array([0.5, 2.0, 0.0, 1.5, 1.0, 0.25, 1.75])
    table["pair_weight"][:] = torch.as_tensor(weights)
    metrics = compute_eval_metrics(
        table, MetricFlags(has_soft_labels=True, has_dispersion=True, has_reference_weights=True)
    )
    columns = ("loss", "chosen_reward", "rejected_reward", "scale", "weight/movie", "soft_label")
    loss, chosen, rejected, scale, alpha, label = (table[name].numpy() for name in columns)
    margin, predicted = chosen - rejected, 1 / (1 + np.exp(rejected - chosen))
    ratio = (policy.chosen - references[1].chosen + policy.rejected - references[1].rejected) / 2
    h = (policy.chosen - policy.rejected - references[0].chosen + references[0].rejected).numpy()
    has_majority = label != 0.5
    gaps, counted = (h * np.sign(label - 0.5))[has_majority], weights[has_majority]
    accuracy = np.average(gaps > 0, weights=counted)
    nll = -(label * np.log(predicted) + (1 - label) * np.log(1 - predicted))
    bins = [np.flatnonzero((predicted * 10).astype(int).clip(0, 9) == number) for number in range(10)]
    error = sum(abs(np.dot(weights[b], predicted[b] - label[b])) for b in bins) / weights.sum()
    effective = counted.sum() ** 2 / np.square(counted).sum()
    expected = {
        "loss": np.average(loss, weights=weights),
        "logps/chosen": np.average(policy.chosen, weights=weights),
        "logps/rejected": np.average(policy.rejected, weights=weights),
        "entropy": 0.5,
        "rewards/chosen": np.average(chosen, weights=weights),
        "rewards/rejected": np.average(rejected, weights=weights),
        "rewards/margins": np.average(margin, weights=weights),
        "rewards/accuracies": np.average(margin > 0, weights=weights),
        "logratio/movie": np.average(ratio, weights=weights),
        "weights/movie": np.average(alpha, weights=weights),
        "dispersion/mean": np.average(scale, weights=weights),
        "dispersion/p10": np.percentile(scale, 10),
        "dispersion/p90": np.percentile(scale, 90),
        "accuracy": accuracy,
        "accuracy_interval": 1.96 * math.sqrt(accuracy * (1 - accuracy) / effective),
        "margin": np.average(gaps, weights=counted),
        "label_nll": np.average(nll, weights=weights),
        "calibration_error": error,
    }
    assert metrics.keys() - {f"eval/{name}" for name in expected} == {
        "eval/logratio/base",
        "eval/weights/base",
    }
    for name, value in expected.items():
        assert metrics[f"eval/{name}"] == pytest.approx(value), name
    assert 0 < accuracy < 1


def test_label_nll_is_cross_entropy_with_the_votes() -> None:
    margins = np.array([-2.0, 0.0, 3.0])
    labels = np.array([0.2, 0.5, 0.9])
    predicted = 1 / (1 + np.exp(-margins))
    expected = -np.mean(labels * np.log(predicted) + (1 - labels) * np.log(1 - predicted))
    nll = compute_label_nll(torch.tensor(margins), torch.tensor(labels), torch.ones(3))
    assert float(nll) == pytest.approx(expected)


def test_calibration_error_by_bins() -> None:
    predicted = torch.tensor([0.05, 0.08, 0.55, 0.58, 1.0], dtype=torch.float64)
    labels = torch.tensor([0.0, 0.1, 0.9, 0.7, 1.0], dtype=torch.float64)
    bins = [[0, 1], [2, 3], [4]]
    expected = sum(
        len(b) / 5 * abs(np.mean([predicted[i] for i in b]) - np.mean([labels[i] for i in b])) for b in bins
    )
    error = compute_calibration_error(predicted, labels, torch.ones(5, dtype=torch.float64))
    assert float(error) == pytest.approx(expected)
