"""Limits that end a search: time, failed trials, no room on the cluster."""

import time
from typing import Any, Protocol

from ray.tune import Stopper

from orchestrator.config.sweep import SweepConfig
from orchestrator.search.journal import Journal

LONGEST_PAUSE_S = 30.0
"""Most of the time between two checks that counts as waiting for room."""


class InterruptibleSearch(Protocol):
    """A searcher that can be interrupted: trials that end from then on have been cut off, not finished."""

    interrupted: bool

    def change_point(self, number: int, point: dict[str, Any]) -> None:
        """Record that a scheduler changed a trial's fields."""


class SearchLimits(Stopper):
    """Tune's stopper: ends a search when its time is up, too many trials failed, or no trial finds room.

    Trials that it ends stay unfinished in the journal, and resume with the next call.

    Attributes:
        reason: why it ended the search, None if it did not.
        failure: the same reason if it makes the search fail, else None.
    """

    def __init__(
        self, sweep: SweepConfig, journal: Journal, search: InterruptibleSearch, *, wait_minutes: float
    ) -> None:
        self.reason: str | None = None
        self.failure: str | None = None
        self._budget, self._max_failures = sweep.time_budget, sweep.max_failures
        self._journal, self._search, self._wait_minutes = journal, search, wait_minutes
        self._started_at = time.monotonic()
        self._checked_at, self._waited_s = self._started_at, 0.0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: no trial is ended alone."""
        return False

    def note_running(self) -> None:
        """Note that some trial has room and runs now."""
        self._waited_s = 0.0

    def stop_all(self) -> bool:
        """Return whether a limit is reached, and mark the search as interrupted if so."""
        if self.reason is None:
            self.reason = self._check_time() or self._check_failures() or self._check_placement()
        self._search.interrupted = self.reason is not None
        return self.reason is not None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def _check_time(self) -> str | None:
        if self._budget is None or time.monotonic() - self._started_at < 60 * self._budget:
            return None
        return f"the time budget of {self._budget:g} minutes is used up"

    def _check_failures(self) -> str | None:
        failed = [record for record in self._journal if record.status == "failed"]
        if self._max_failures is None or len(failed) <= self._max_failures:
            return None
        self.failure = (
            f"{len(failed)} trials failed, and max_failures is {self._max_failures}; "
            f"the last: {failed[-1].reason}. "
            "Finished trials are kept: --retry-failed tries the failed ones again"
        )
        return self.failure

    def _check_placement(self) -> str | None:
        # Tune asks several times a second. When it did not, a server kept it waiting, and no trial waited for
        # room because of that.
        now = time.monotonic()
        self._waited_s += min(now - self._checked_at, LONGEST_PAUSE_S)
        self._checked_at = now
        if self._waited_s < 60 * self._wait_minutes:
            return None
        self.failure = (
            f"no trial found a place on the cluster within {self._wait_minutes:g} minutes, although one "
            "would fit if nothing else ran: free resources, or raise placement.wait_minutes"
        )
        return self.failure
