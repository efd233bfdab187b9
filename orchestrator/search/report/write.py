"""Pictures of a search, as PNG and on a page to point at: what was not measured is not drawn."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.search.journal import TrialRecord
from orchestrator.search.report import html as sweep_html
from orchestrator.search.report import png as sweep_png
from orchestrator.search.report.figures import Search
from orchestrator.search.report.importance import LEAST

if TYPE_CHECKING:
    from orchestrator.config.sweep import Objective


def draw(
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


def not_drawn(records: Iterable[TrialRecord], objectives: "Sequence[Objective]") -> list[str]:
    """Which pictures `draw` leaves out for want of results, and why; each a sentence."""
    with_result = len(Search(list(records), objectives, {}).ranked)
    if with_result < LEAST:
        return [
            f"importance is not drawn: it needs {LEAST} points with a result, and there are {with_result}"
        ]
    return []
