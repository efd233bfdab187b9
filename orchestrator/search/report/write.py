"""Files of a search's report: its figures as PNG and on one interactive page, its trials as CSV."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.files import replace_file
from orchestrator.search.journal import TrialRecord
from orchestrator.search.report.figures import build_figures
from orchestrator.search.report.html import draw_html_page
from orchestrator.search.report.importance import MIN_POINTS
from orchestrator.search.report.png import draw_png_files
from orchestrator.search.report.search_data import SearchData

if TYPE_CHECKING:
    from orchestrator.config.sweep import Objective

_PAGE = "search.html"
_COLUMNS = ("number", "point_id", "repeat", "control_of", "status", "step", "seconds", "reason", "mlflow_run")


def draw_search(
    records: Iterable[TrialRecord],
    objectives: "Sequence[Objective]",
    folders: Mapping[int, Path],
    to: Path,
    *,
    primary: str | None = None,
) -> list[Path]:
    """Draw a search into the folder `to`: each figure as PNG, and all of them on one page, search.html.

    trials (objectives over steps), history (results in the order they came), parallel (which fields went with
    which results), importance (of the fields), frontier (what was gained at which divergence from `primary`).
    A figure without numbers is left out.

    Args:
        records: all trials; those that are running or failed are drawn as far as they came.
        objectives: the search's objectives, the one it ranks by first.
        folders: the trials' folders by trial number, where their metrics are.
        to: created if it is missing and there is a figure.
        primary: the reference whose divergence is drawn, if it was measured.

    Returns:
        The files written.
    """
    figures = build_figures(SearchData.read(records, objectives, folders, primary))
    if not figures:
        return []
    paths = draw_png_files(figures, to)
    draw_html_page(figures.values(), to / _PAGE)
    return [*paths, to / _PAGE]


def explain_missing_figures(records: Iterable[TrialRecord], objectives: "Sequence[Objective]") -> list[str]:
    """Return a sentence for each figure that `draw_search` leaves out for want of results."""
    count = len(SearchData(list(records), objectives, {}).ranked)
    if count < MIN_POINTS:
        return [f"importance is not drawn: it needs {MIN_POINTS} points with a result, and there are {count}"]
    return []


def write_csv(records: Sequence[TrialRecord], path: Path) -> None:
    """Write a row per trial: its record, the fields it drew, its last metrics."""
    fields = dict.fromkeys(name for record in records for name in record.point)
    metrics = dict.fromkeys(name for record in records for name in record.result)
    with replace_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS, *fields, *metrics])
        for record in sorted(records, key=lambda record: record.number):
            row = [getattr(record, name) for name in _COLUMNS]
            row += [_to_csv_value(record.point.get(name)) for name in fields]
            writer.writerow(row + [record.result.get(name) for name in metrics])


def _to_csv_value(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | dict | bool) else value
