"""Limits that end a search: time, failures, no room."""

import time
from typing import Any, Protocol

from ray.tune import Stopper

from orchestrator.config.sweep import SweepConfig
from orchestrator.search.journal import Journal


class InterruptibleSearch(Protocol):
    """A search that can be told that trials which end from now on were ended by us."""

    cut_short: bool

    def change_point(self, number: int, point: dict[str, Any]) -> None:
        """A scheduler changed a trial's fields."""


class SearchLimits(Stopper):
    """Ends the search: its time is up, too many trials failed, or none finds a place.

    Trials that it ends stay unfinished in the journal, and go on with the next call.

    Attributes:
        reason: why it ended the search, if it did.
        failed: the reason where that is a failure.
    """

    def __init__(
        self, sweep: SweepConfig, trials: Journal, search: InterruptibleSearch, *, wait_minutes: float
    ) -> None:
        self.reason: str | None = None
        self.failed: str | None = None
        self._budget, self._most = sweep.time_budget, sweep.max_failures
        self._journal, self._search, self._wait_minutes = trials, search, wait_minutes
        self._began = time.monotonic()
        self._ran = self._began

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is ended alone."""
        return False

    def note_running(self) -> None:
        """Some trial has found its place."""
        self._ran = time.monotonic()

    def stop_all(self) -> bool:
        """Whether a limit is reached."""
        if self.reason is None:
            self.reason = self._check_time() or self._check_failures() or self._check_placement()
        self._search.cut_short = self.reason is not None
        return self.reason is not None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def _check_time(self) -> str | None:
        if self._budget is None or time.monotonic() - self._began < 60 * self._budget:
            return None
        return f"the time budget of {self._budget:g} minutes is used up"

    def _check_failures(self) -> str | None:
        failed = [record for record in self._journal if record.status == "failed"]
        if self._most is None or len(failed) <= self._most:
            return None
        self.failed = (
            f"{len(failed)} trials failed, and max_failures is {self._most}; the last: {failed[-1].reason}. "
            "Finished trials are kept: --retry-failed tries the failed ones again"
        )
        return self.failed

    def _check_placement(self) -> str | None:
        if time.monotonic() - self._ran < 60 * self._wait_minutes:
            return None
        self.failed = (
            f"no trial found a place on the cluster within {self._wait_minutes:g} minutes, although one "
            "would fit if nothing else ran: free resources, or raise placement.wait_minutes"
        )
        return self.failed
