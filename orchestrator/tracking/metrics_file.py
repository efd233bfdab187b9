"""Reading and cutting of a run's `metrics.jsonl` and `dispersion.json`.

A line of `metrics.jsonl` is the metrics of a step, or a finding of the numerical watch: its name and message.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from orchestrator.files import replace_text

METRICS_FILE, SCALES_FILE = "metrics.jsonl", "dispersion.json"
FINDING = "finding"
"""The key of a finding's name, in a line that has no metrics but a `message`."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of `metrics.jsonl` in order, without a last line that a crash left incomplete."""
    return [line for line in _read_lines(folder) if FINDING not in line]


def read_findings(folder: Path) -> dict[str, str]:
    """Return the messages of the findings in `metrics.jsonl`, by name."""
    return {line[FINDING]: line["message"] for line in _read_lines(folder) if FINDING in line}


def _read_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def cut_metrics_after(path: Path, step: int) -> None:
    """Remove the lines of a `metrics.jsonl` after `step`: a resumed run writes them again."""
    lines = [line for line in _read_lines(path.parent) if line["step"] <= step]
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_scales(folder: Path) -> list[float]:
    """Return the dispersion scales that `Tracker.log_scales` wrote."""
    path = folder / SCALES_FILE
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def drop_torn_line(path: Path) -> None:
    """Remove a last line that a crash left incomplete."""
    data = path.read_bytes()
    os.truncate(path, data.rfind(b"\n") + 1)


def read_new_lines(path: Path, position: int) -> tuple[int, list[dict[str, Any]]]:
    """Read the lines after byte `position`, from the start if a resumed run has cut the file.

    Returns the position after the last line read, and the lines.
    """
    if not path.exists():
        return 0, []
    with path.open("rb") as file:
        file.seek(0 if path.stat().st_size < position else position)
        lines = []
        for line in iter(file.readline, b""):
            with contextlib.suppress(ValueError):  # a crash left it incomplete
                lines.append(json.loads(line))
        return file.tell(), lines
