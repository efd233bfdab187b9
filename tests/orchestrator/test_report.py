"""A search's tables say what its records say, with intervals computed by hand."""

import csv
import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from orchestrator.search.journal import TrialRecord
from orchestrator.search.report.labels import format_trial_numbers, format_value, shorten_field_names
from orchestrator.search.report.ranking import Estimate, compare_with_controls, rank_points
from orchestrator.search.report.tables import build_live_table, build_ranking_table, build_summary
from orchestrator.search.report.write import write_csv
from tests.support import searches
from tests.support.searches import ACCURACY, KL


def _trial(number: int, accuracy: float | None = None, **more: object) -> TrialRecord:
    given = {} if accuracy is None else {"eval/accuracy": accuracy, "eval/accuracy_interval": 0.03}
    settings = {"number": number, "point_id": number, "status": "finished", "step": 10, "result": given}
    return TrialRecord(**{**settings, **more})  # type: ignore[arg-type]


def _text(table: object, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_means_over_repeats_have_students_interval() -> None:
    records = [_trial(n, a, point_id=1, repeat=n - 1) for n, a in ((1, 0.6), (2, 0.7), (3, 0.8))]
    estimate = rank_points(records, [ACCURACY])[0].estimates["eval/accuracy"]
    # Standard error 0.1 / sqrt(3), and Student's t at 0.975 with 2 degrees of freedom: 4.302653.
    assert (estimate.mean, estimate.count) == (pytest.approx(0.7), 3)
    assert estimate.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)


def test_one_trial_has_the_interval_of_its_held_out_pairs() -> None:
    (ranked,) = rank_points([_trial(1, 0.6), _trial(2, None, point_id=1, status="failed")], [ACCURACY])
    assert ranked.estimates["eval/accuracy"] == Estimate(0.6, 0.03, 1)


def test_ranking() -> None:
    failed = _trial(4, 0.99, status="failed", reason="the loss is not finite")
    running = _trial(5, 0.98, status="running")
    records = [_trial(1, 0.6), _trial(2, 0.8), _trial(3, 0.7, control_of=2), failed, running]
    ranked = rank_points(records, [ACCURACY])
    assert [(one.rank, one.point_id) for one in ranked] == [(1, 2), (2, 3), (3, 1), (None, 4), (None, 5)]


def test_points_that_none_is_better_than_in_all_objectives_come_first() -> None:
    values = {1: (0.9, 9.0), 2: (0.7, 3.0), 3: (0.8, 9.5), 4: (0.6, 1.0), 5: (0.5, 1.0)}
    records = [
        _trial(number, result={"eval/accuracy": accuracy, "eval/kl/base": kl})
        for number, (accuracy, kl) in values.items()
    ]
    ranked = rank_points(records, [ACCURACY, KL])
    assert [(one.point_id, one.front) for one in ranked] == [
        (1, True),
        (2, True),
        (4, True),
        (3, False),
        (5, False),
    ]
    assert "* no other" in _text(build_ranking_table(ranked, [ACCURACY, KL]))


def test_differences_are_of_the_seeds_that_both_have() -> None:
    pairs = [(0.70, 0.60), (0.80, 0.72), (0.75, 0.63)]
    records = [_trial(1 + i, a, point_id=1, repeat=i) for i, (a, _) in enumerate(pairs)]
    records += [_trial(4 + i, b, point_id=4, repeat=i, control_of=1) for i, (_, b) in enumerate(pairs)]
    records[-1].status = "failed"
    (compared,) = compare_with_controls(rank_points(records, [ACCURACY]), [ACCURACY])
    estimate = compared.estimates["eval/accuracy"]
    # 0.10 and 0.08 are left: mean 0.09, standard error 0.01, t with one degree of freedom 12.7062.
    assert (estimate.mean, estimate.half_width) == (pytest.approx(0.09), pytest.approx(0.127062, rel=1e-5))
    assert compared.paired
    alone = [_trial(1, 0.7), _trial(2, 0.6, control_of=1)]
    (compared,) = compare_with_controls(rank_points(alone, [ACCURACY]), [ACCURACY])
    assert compared.estimates["eval/accuracy"].half_width == pytest.approx(0.03 * 2**0.5)
    assert not compared.paired


def test_one_control_serves_all_points_it_is_equal_to() -> None:
    dpo = {"loss.preset": "dpo", "loss.beta": 0.05}
    drawn = [{"loss.preset": family, "loss.beta": 0.1} for family in ("gdpo", "mallows_theta", "simpo")]
    records = [_trial(i, 0.7, point=point) for i, point in enumerate(drawn, start=1)]
    records.append(_trial(4, 0.6, point=dpo, control_of=1))
    ranked = rank_points(records, [ACCURACY])
    compared = compare_with_controls(
        ranked, [ACCURACY], lambda point: None if point["loss.preset"] == "simpo" else dpo
    )
    assert [(one.point.point_id, one.control.point_id) for one in compared] == [(1, 4), (2, 4)]


@pytest.mark.parametrize("width", [80, 160])
def test_everything_is_readable_in_few_columns(tmp_path: Path, width: int) -> None:
    records, _ = searches.search(tmp_path, points=9, repeats=3, controls=True, failed=[2], kl=True, seed=1)
    text = _text(build_summary(records, [ACCURACY, KL], primary="base", width=width), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    for one in rank_points(records, [ACCURACY, KL]):
        assert f"{one.estimates['eval/accuracy'].mean:.3f} ± " in text
        assert format_trial_numbers(one.trials) in text
    words = " ".join(text.split())
    assert "Point less its control" in words
    assert "the loss is not finite at step 23; lower training.learning_rate [pairs train.jsonl:7]" in words
    assert "KL to base" in words
    assert "movie-sft" not in lines[1]


def test_what_runs_is_shown_first_and_a_line_per_trial() -> None:
    point = {"loss.preset": "gdpo", "references.use": ["base", "movie-sft"], "loss.beta": 0.123456}
    records = [_trial(n, n / 10, point={**point, "training.learning_rate": 1e-6 * n}) for n in range(1, 7)]
    records[1].status, records[4].status, records[5].status = "running", "failed", "pending"
    records[5].result = {}
    text = _text(build_live_table(records, [ACCURACY], max_steps=100, rows=5))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["2", "4", "3", "1", "5"]
    assert "10/100" in lines[1]
    assert "lr 2e-6" in lines[1]
    assert lines[-1].strip() == "1 running, 3 finished, 1 failed, 1 pending"


def test_a_search_without_results_has_tables() -> None:
    records = [_trial(1, status="failed", reason=None), _trial(2, status="pending")]
    assert "no reason was recorded" in _text(build_summary(records, [ACCURACY]))
    assert isinstance(build_live_table([], [ACCURACY]), Table)


def test_csv_has_every_trial(tmp_path: Path) -> None:
    records, _ = searches.search(tmp_path / "trials", points=4, failed=[2])
    write_csv(records, tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[1]["reason"] == records[1].reason
    assert json.loads(rows[0]["references.use"]) == records[0].point["references.use"]
    assert float(rows[0]["eval/accuracy"]) == records[0].result["eval/accuracy"]
    assert float(rows[0]["loss.beta"]) == records[0].point["loss.beta"]


def test_names_are_as_short_as_distinguishes_them() -> None:
    fields = ["loss.preset", "loss.dispersion.type", "references.use", "loss.references.weights"]
    fields += ["policy.adapter.r", "training.learning_rate", "loss.link.alpha", "policy.adapter.alpha"]
    assert list(shorten_field_names(fields).values()) == [
        "loss",
        "dispersion",
        "references",
        "weights",
        "adapter.r",
        "lr",
        "link.alpha",
        "adapter.alpha",
    ]
    values = [1e-6, 0.30000001, True, None, ["base", "sft"], "dpo", 8]
    assert [format_value(value) for value in values] == [
        "1e-6",
        "0.3",
        "yes",
        "none",
        "base+sft",
        "dpo",
        "8",
    ]
    assert format_trial_numbers([_trial(n) for n in (3, 1, 2, 7)]) == "1–3, 7"
