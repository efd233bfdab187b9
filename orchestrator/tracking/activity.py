"""What a worker does between two steps, reported to the command by a small file in the run's folder.

The command sees it where both share that folder, and not where a run is stored on an object store.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.files import replace_text

ACTIVITY_FILE = ".activity.json"
_WRITE_EVERY_S = 0.5


@dataclass(frozen=True)
class Activity:
    """A task of a worker.

    Attributes:
        name: of the task.
        unit: of what is counted, in the plural.
        done, total: items done and in all.
        time: when this was reported, in seconds of the worker's wall clock.
    """

    name: str
    unit: str
    done: int
    total: int
    time: float


class ActivityFile:
    """Writes what a worker does into the run's folder.

    Args:
        folder: the run's; None for workers that report nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / ACTIVITY_FILE
        self._written_at = 0.0

    def report(self, name: str, unit: str, done: int, total: int) -> None:
        """Write how far a task is; a report soon after another one is left out."""
        now = time.monotonic()
        if self._path is not None and now - self._written_at >= _WRITE_EVERY_S:
            self._written_at = now
            activity = Activity(name, unit, min(done, total), total, round(time.time(), 3))
            replace_text(self._path, json.dumps(asdict(activity)))

    def end(self) -> None:
        """Say that the task is over."""
        self._written_at = 0.0
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def read_activity(folder: Path) -> Activity | None:
    """Return what the worker of a run does besides steps; None if it says nothing that can be read."""
    try:
        return Activity(**json.loads((folder / ACTIVITY_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
