"""How fast a task is now: its rate over a window of the last minute."""

from collections import deque

WINDOW_S = 60.0
"""A rate follows changes within this time, and is steady enough to read."""
SHORTEST_SPAN_S = 2.0
"""There is no rate before progress was observed for as long."""
_SAMPLE_S = 1.0


class RecentRate:
    """The rate of a task, from what was done in the last `WINDOW_S` seconds, or between its last two reports.

    All times are seconds of one clock. The first report is where counting begins: what was done before it, by
    an earlier process or from a store, is in no rate. Neither is what is done again after a count fell.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()  # (time, done)

    def clear(self) -> None:
        """Forget all reports: the next one is where counting begins."""
        self._samples.clear()

    def observe(self, done: float, now: float) -> None:
        """Note that `done` items are done at time `now`."""
        samples = self._samples
        if samples and done < samples[-1][1]:
            samples.clear()
        if samples and done == samples[-1][1]:
            return
        if len(samples) > 1 and now - samples[-2][0] < _SAMPLE_S:
            samples.pop()  # few samples are kept, however often progress is reported
        samples.append((now, done))
        while len(samples) > 2 and samples[1][0] <= now - WINDOW_S:
            samples.popleft()

    def compute(self, now: float) -> float | None:
        """Return the items per second; None before there is anything to go by.

        The time since the last report counts as soon as it is longer than reports usually take.
        """
        if len(self._samples) < 2:
            return None
        (began, first), (last_report, last) = self._samples[0], self._samples[-1]
        usual_gap = (last_report - began) / (len(self._samples) - 1)
        span = max(last_report - began, now - usual_gap - began)
        return (last - first) / span if span >= SHORTEST_SPAN_S else None
