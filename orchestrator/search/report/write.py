"""Pictures of a search, as PNG and on a page to point at: what was not measured is not drawn."""

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.search.journal import TrialRecord
from orchestrator.search.report import html as sweep_html
from orchestrator.search.report import png as sweep_png
from orchestrator.search.report.figures import Search
from orchestrator.search.report.importance import MIN_POINTS

if TYPE_CHECKING:
    from orchestrator.config.sweep import Objective


def draw_search(
    records: Iterable[TrialRecord],
    objectives: "Sequence[Objective]",
    folders: Mapping[int, Path],
    to: Path,
    *,
    primary: str | None = None,
) -> list[Path]:
    """Draw a search into the folder `to`: each picture as PNG, and all of them on one page, search.html.

    trials (objectives over steps), history (results in the order they came), parallel (which fields went with
    which results), importance (of the fields), frontier (what was gained at which divergence from `primary`).

    Args:
        records: all trials; those that run or failed are in the pictures as far as they came.
        objectives: what the search was for, the first first.
        folders: of the trials, by number: where their metrics are.
        to: made if it is not there.
        primary: the reference whose divergence is drawn, if it was measured.

    Returns:
        The files written.
    """
    search = Search.read(records, objectives, folders, primary)
    return [*sweep_png.draw(search, to), *sweep_html.draw(search, to)]


def explain_missing_figures(records: Iterable[TrialRecord], objectives: "Sequence[Objective]") -> list[str]:
    """Which pictures `draw` leaves out for want of results, and why; each a sentence."""
    with_result = len(Search(list(records), objectives, {}).ranked)
    if with_result < MIN_POINTS:
        return [
            f"importance is not drawn: it needs {MIN_POINTS} points with a result, and there are {with_result}"
        ]
    return []


def write_csv(records: Sequence[TrialRecord], path: Path) -> None:
    """Every trial in one row: its record, the fields it drew, its last metrics."""
    kept = ("number", "point_id", "repeat", "control_of", "status", "step", "seconds", "reason", "mlflow_run")
    fields = dict.fromkeys(name for record in records for name in record.point)
    metrics = dict.fromkeys(name for record in records for name in record.result)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*kept, *fields, *metrics])
        for record in sorted(records, key=lambda record: record.number):
            row = [getattr(record, name) for name in kept]
            row += [_csv_value(record.point.get(name)) for name in fields]
            writer.writerow(row + [record.result.get(name) for name in metrics])
    os.replace(part, path)


def _csv_value(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | dict | bool) else value
