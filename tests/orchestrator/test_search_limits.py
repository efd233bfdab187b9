"""When a search ends because no trial finds room, and when it does not."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.search.limits import SearchLimits


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that tests set."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    return now


def make_limits() -> SearchLimits:
    sweep: Any = SimpleNamespace(time_budget=None, max_failures=None)
    return SearchLimits(sweep, [], SimpleNamespace(interrupted=False), wait_minutes=10)  # type: ignore[arg-type]


def test_a_search_without_room_ends(clock: SimpleNamespace) -> None:
    limits = make_limits()
    for _ in range(599):
        clock.seconds += 1
        assert not limits.stop_all()
    limits.note_running()
    for _ in range(599):
        clock.seconds += 1
        assert not limits.stop_all()
    clock.seconds += 1
    assert limits.stop_all()
    assert "no trial found a place" in str(limits.failure)


def test_a_server_that_kept_the_search_waiting_does_not_end_it(clock: SimpleNamespace) -> None:
    limits = make_limits()
    clock.seconds += 3600
    assert not limits.stop_all()
