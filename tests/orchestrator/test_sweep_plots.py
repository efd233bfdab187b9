"""A search's pictures show what was measured, and no more."""

import json
import random
import re
import struct
from pathlib import Path

import pytest

from orchestrator.search.journal import TrialRecord
from orchestrator.search.report.figures import LineFigure, build_figures
from orchestrator.search.report.importance import estimate_importance
from orchestrator.search.report.labels import ABSENT
from orchestrator.search.report.parallel_axes import build_parallel_axes
from orchestrator.search.report.search_data import SearchData, compute_frontier
from orchestrator.search.report.write import draw_search, explain_missing_figures
from tests.support import searches
from tests.support.searches import ACCURACY, KL

ALL = ["trials.png", "history.png", "parallel.png", "importance.png", "frontier.png", "search.html"]


def _decodes(path: Path) -> bool:
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return data.startswith(b"\x89PNG") and min(width, height) > 300


def test_pictures_of_a_whole_search(tmp_path: Path) -> None:
    records, folders = searches.search(
        tmp_path / "trials", points=9, repeats=2, controls=True, failed=[3], kl=True, seed=1
    )
    drawn = draw_search(records, [ACCURACY, KL], folders, tmp_path / "plots", primary="base")
    assert [path.name for path in drawn] == ALL
    assert all(_decodes(path) for path in drawn[:-1])
    assert not list(tmp_path.rglob("*.part"))
    page = drawn[-1].read_text()
    assert page.count("Plotly.newPlot(") == 5
    assert not re.search(r"<script[^>]+src=", page)  # nothing is beside it or fetched
    last = records[0].result["eval/accuracy"]
    assert str(last) in page
    for record in records:
        assert f"trial {record.number}" in page
    assert explain_missing_figures(records, [ACCURACY, KL]) == []


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    records, folders = searches.search(tmp_path / "trials", points=3)
    names = [path.name for path in draw_search(records, [ACCURACY], folders, tmp_path)]
    assert names == ["trials.png", "history.png", "parallel.png", "search.html"]
    assert explain_missing_figures(records, [ACCURACY]) == [
        "importance is not drawn: it needs 8 points with a result, and there are 3"
    ]
    pending = [TrialRecord(number=1, point_id=1)]
    assert draw_search(pending, [ACCURACY], {1: tmp_path / "0001"}, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_best_controls_and_failures_stand_out(tmp_path: Path) -> None:
    records, folders = searches.search(tmp_path, points=9, controls=True, failed=[3], kl=True, seed=1)
    data = SearchData.read(records, [ACCURACY], folders, "base")
    figures = build_figures(data)
    trials, frontier = figures["trials"], figures["frontier"]
    assert isinstance(trials, LineFigure)
    assert isinstance(frontier, LineFigure)
    *curves, best, failed = trials.panels[0].series
    controls = sum(record.control_of is not None for record in records)
    assert sum(series.style.line == "dashed" for series in curves) == controls > 0
    assert best.style.width > max(series.style.width for series in curves)
    assert data.best is not None
    assert best.hover[-1].startswith(f"trial {data.best.point_id}\nloss ")
    assert (failed.group, list(failed.x), failed.style.marker) == ("failed", [20], "x")
    assert list(trials.legend)[-3:-1] == ["control", "failed"]
    assert sum(series.style.hollow for series in frontier.panels[0].series) == controls


def test_best_so_far_is_of_points_in_the_order_they_ended(tmp_path: Path) -> None:
    ends = {1: (30, 0.6, None), 2: (10, 0.7, None), 3: (20, 0.9, 1), 4: (40, 0.8, None)}
    records, folders = [], {}
    for number, (end, value, control_of) in ends.items():
        result = {"eval/accuracy": value}
        records.append(
            TrialRecord(
                number=number, point_id=number, control_of=control_of, status="finished", result=result
            )
        )
        folders[number] = tmp_path / str(number)
        folders[number].mkdir()
        lines = [{"step": 0, "time": 5.0 + number}, {"step": 9, "time": 6.0 + end, **result}]
        (folders[number] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = SearchData.read(records, [ACCURACY], folders).list_ended_trials(ACCURACY)
    assert [(one.record.number, one.seconds, one.best) for one in ended] == [
        (2, 10, 0.7),
        (3, 20, 0.7),
        (1, 30, 0.7),
        (4, 40, 0.8),
    ]


def test_no_point_reaches_the_frontier_with_less_divergence() -> None:
    points = [(0.0, 0.5), (2.0, 0.6), (1.0, 0.55), (1.5, 0.52), (3.0, 0.6), (2.0, 0.58)]
    assert compute_frontier(points) == [(0.0, 0.5), (1.0, 0.55), (2.0, 0.6)]


def test_axes_hold_every_value_and_keep_their_order(tmp_path: Path) -> None:
    records, folders = searches.search(tmp_path, points=20)
    search = SearchData.read(records, [ACCURACY], folders)
    axes = {axis.label: axis for axis in build_parallel_axes(search)}
    assert axes["margin"].ticks[0][1] == "not set"
    for axis in axes.values():
        assert all(-1e-9 <= place <= 1 + 1e-9 for place in axis.positions)
    drawn = [one.point["loss.beta"] for one in search.ranked]
    assert sorted(drawn) == [
        value for _, value in sorted(zip(axes["beta (log)"].positions, drawn, strict=True))
    ]
    assert axes["accuracy"].positions == sorted(axes["accuracy"].positions, reverse=True)
    labels = [label for _, label in sorted(axes["loss"].ticks)]
    assert set(labels) == {one.point["loss.preset"] for one in search.ranked}


def test_dpo_and_the_best_keep_a_colour_of_their_own() -> None:
    families = [f"loss-{i}" for i in range(9)] + ["dpo"]
    records = [
        TrialRecord(
            number=i,
            point_id=i,
            status="finished",
            point={"loss.preset": family},
            result={"eval/accuracy": 1 - i / 100},
        )
        for i, family in enumerate(families, start=1)
    ]
    shown = SearchData(records, [ACCURACY], {}).families
    own = [loss for loss, family in shown.items() if family.label == loss]
    assert own == [*families[:6], "dpo"]
    assert {shown[loss].label for loss in families[6:9]} == {"3 others"}
    assert len({(family.colour, family.marker) for family in shown.values()}) == 8


def test_importance_finds_the_field_that_decided() -> None:
    rng = random.Random(0)
    drawn = [
        {"loss.preset": rng.choice("abc"), "x": rng.random(), **({"only": 1.0} if rng.random() < 0.5 else {})}
        for _ in range(30)
    ]
    decided = estimate_importance(
        drawn, ["abc".index(point["loss.preset"]) + rng.gauss(0, 0.05) for point in drawn]
    )
    assert decided is not None
    assert next(iter(decided.shares)) == "loss.preset"
    assert decided.shares["loss.preset"] > 0.7
    assert max(abs(decided.shares[field]) for field in ("x", "only")) < 0.05
    assert decided.explained > 0.9
    set_or_not = estimate_importance(drawn, [point.get("only", 0.0) for point in drawn])
    assert set_or_not is not None
    assert next(iter(set_or_not.shares)) == "only"
    noise = estimate_importance(drawn, [rng.random() for _ in drawn])
    assert noise is not None
    assert "chance" in noise.explanation
    assert estimate_importance(drawn[:7], [1.0, 2.0] * 3 + [1.0]) is None
    assert estimate_importance(drawn, [1.0] * 30) is None


@pytest.mark.parametrize("value", ["a <b> & $x$", ["base", "movie-sft"], None, True, 3])
def test_any_value_can_be_drawn(tmp_path: Path, value: object) -> None:
    records, folders = searches.search(tmp_path / "trials", points=3)
    records[0].point = {**records[0].point, "training.what": value}
    search = SearchData.read(records, [ACCURACY], folders)
    axes = {axis.label: axis for axis in build_parallel_axes(search)}
    assert {label for _, label in axes["what"].ticks} >= {"not set"}
    assert ABSENT not in {label for _, label in axes["what"].ticks}
    (page,) = [p for p in draw_search(records, [ACCURACY], folders, tmp_path) if p.suffix == ".html"]
    assert "<b>" not in page.read_text()[-60_000:]
