"""Pictures show what the run recorded, and no more."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from orchestrator.tracking.plots import _collect_series, _compute_running_mean, draw_run


def _write(folder: Path, lines: list[dict[str, Any]], scales: list[float] | None = None) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if scales is not None:
        (folder / "dispersion.json").write_text(json.dumps(scales))
    return folder


def _size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _line(step: int, **more: float | None) -> dict[str, Any]:
    return {"step": step, "time": 1.0, "loss": 0.7 - step / 1000, "rewards/margins": step / 100, **more}


def test_all_pictures_of_a_full_run(tmp_path: Path) -> None:
    lines = [
        _line(step, **{"logratio/base": -step, "weights/base": 0.4, "grad_norm": 1.0, "learning_rate": 1e-6})
        for step in range(1, 100)
    ]
    lines += [
        {"step": s, "eval/loss": 0.7, "eval/accuracy": 0.5, "eval/accuracy_interval": 0.1} for s in (0, 99)
    ]
    drawn = draw_run(_write(tmp_path, lines, [0.5, 1.0, 1.5, 9.0]))
    assert [p.name for p in drawn] == ["learning.png", "references.png", "dispersion.png", "optimizer.png"]
    assert all(p.parent == tmp_path / "plots" for p in drawn)
    assert all(_size(p)[0] > 800 for p in drawn)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("lines", "scales", "names"),
    [
        ([], None, []),
        ([_line(1)], None, ["learning.png"]),
        ([_line(1, learning_rate=0.0)], None, ["learning.png", "optimizer.png"]),
        ([_line(1, **{"logratio/base": 0.0})], None, ["learning.png", "references.png"]),
        ([{"step": 0, "time": 1.0, "eval/accuracy": 0.5}], [], ["learning.png"]),
        ([], [1.0, 1.0], ["dispersion.png"]),
        ([], [0.0], ["dispersion.png"]),
    ],
)
def test_no_picture_of_what_is_absent(
    tmp_path: Path, lines: list[dict[str, Any]], scales: list[float] | None, names: list[str]
) -> None:
    assert [p.name for p in draw_run(_write(tmp_path, lines, scales), tmp_path / "to")] == names


def test_panels_only_for_what_is_there(tmp_path: Path) -> None:
    (one,) = draw_run(_write(tmp_path, [{"step": 1, "loss": 0.7}]))
    height = _size(one)[1]
    (three,) = draw_run(_write(tmp_path, [_line(1, **{"eval/accuracy": 0.5})]))
    assert _size(three)[1] > 2 * height


def test_a_folder_without_metrics(tmp_path: Path) -> None:
    assert draw_run(tmp_path) == []
    assert not (tmp_path / "plots").exists()


def test_values_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    lines = [_line(1), _line(2, loss=None), _line(3)]
    series = _collect_series(lines)
    assert series["loss"].steps == [1, 3]
    assert draw_run(_write(tmp_path, lines))


def test_the_bold_line_is_the_running_mean() -> None:
    assert _compute_running_mean([1, 2, 3, 4, 10], 3) == pytest.approx([2, 3, 17 / 3])
