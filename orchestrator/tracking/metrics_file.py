"""Reading and cutting of a run's `metrics.jsonl` and `dispersion.json`.

A line of `metrics.jsonl` is the metrics of a step, or a finding of the numerical watch: its name and message.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.files import replace_text

log = logging.getLogger(__name__)

METRICS_FILE, SCALES_FILE = "metrics.jsonl", "dispersion.json"
FINDING = "finding"
"""The key of a finding's name, in a line that has no metrics but a `message`."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of `metrics.jsonl` in order, without lines that a crash left incomplete."""
    return [line for line in _read_lines(folder) if FINDING not in line]


def read_findings(folder: Path) -> dict[str, str]:
    """Return the messages of the findings in `metrics.jsonl`, by name."""
    return {line[FINDING]: line["message"] for line in _read_lines(folder) if FINDING in line}


def _read_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    with path.open("rb") as file:
        whole = [line for line in file if line.endswith(b"\n")]
    lines = parse_lines(whole)
    if len(lines) < len(whole):
        log.warning("%s: %d damaged lines are passed over", path, len(whole) - len(lines))
    return lines


def parse_lines(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return the lines that are of a metrics file; a full disk or a crash may have damaged others."""
    parsed = []
    for text in lines:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                parsed.append(line)
    return parsed


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
        lines = parse_lines(iter(file.readline, b""))
        return file.tell(), lines
