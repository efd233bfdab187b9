"""Show a run's training while its workers write the metrics file: steps, rates, evaluations, findings."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.tracking.activity import Activity, read_activity
from orchestrator.tracking.metrics_file import FINDING, METRICS_FILE, read_findings, read_new_lines
from orchestrator.tracking.progress import ProgressMeter
from orchestrator.tracking.progress_lines import Unit, count_steps

_TASK = "training"
_LOOK_EVERY_S = 0.5
_STALL_STEPS = 20
"""Steps over which the share of time that waits for references is taken."""
_TRAINING_METRICS = {"loss": "loss", "margin": "rewards/margins"}
_EVALUATION_METRICS = {
    "accuracy": "eval/accuracy",
    "loss": "eval/loss",
    "margin": "eval/rewards/margins",
    "reward": "eval/reward",
}


class TrainingState:
    """What a run's metrics file says of its training, line by line.

    Args:
        lines: what an earlier start has written.
        pairs_per_step: pairs of a step.
    """

    def __init__(self, lines: list[dict[str, Any]], pairs_per_step: int) -> None:
        self.step, self.is_training = 0, False
        """The last step that is done, and whether this start has taken one."""
        self._pairs_per_step = pairs_per_step
        self._newest = 0.0  # time of the newest line
        self._latest: dict[str, float] = {}
        self._stalls: deque[float] = deque(maxlen=_STALL_STEPS)
        self._evaluation: tuple[int, Mapping[str, float]] | None = None
        for line in lines:
            self.add_line(line)
        self.is_training = False
        self._stalls.clear()

    def add_line(self, line: Mapping[str, Any]) -> str | None:
        """Take in a line of metrics, and return what an evaluation that it holds says.

        A line is passed over if it is not newer than the others: a resumed run has cut the file, and its
        earlier lines were read again.
        """
        time = float(line.get("time") or 0.0)
        if time <= self._newest and line["step"] <= self.step:
            return None
        self._newest = time
        evaluation = _pick(line, _EVALUATION_METRICS)
        if evaluation:
            self._evaluation = (line["step"], evaluation)
        if "loss" in line:
            self.step, self.is_training = line["step"], True
            self._latest |= _pick(line, _TRAINING_METRICS)
            self._note_stall(line)
        if not evaluation:
            return None
        values = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.items())
        return f"evaluation at step {line['step']}: {values}"

    def _note_stall(self, line: Mapping[str, Any]) -> None:
        stall, rate = line.get("perf/reference_stall"), line.get("perf/pairs_per_second")
        if stall is not None and rate:
            self._stalls.append(stall * rate / self._pairs_per_step)

    def list_notes(self) -> list[str]:
        """Return the last step's loss and margin, the last evaluation's accuracy and step, and the stall.

        The stall is the share of a step's time that waits for references.
        """
        notes = [] if self.is_training else ["waiting for the first step"]
        notes += [f"{name} {value:.4g}" for name, value in self._latest.items()]
        if self._evaluation is not None:
            step, values = self._evaluation
            name = "accuracy" if "accuracy" in values else next(iter(values))
            shown = name if name == "accuracy" else f"eval {name}"
            notes.append(f"{shown} {values[name]:.4g} @{step}")
        if self._stalls:
            share = min(sum(self._stalls) / len(self._stalls), 1.0)
            notes.append(f"stall {share:.0%}".replace("%", " %"))
        return notes


def _pick(line: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, float]:
    return {name: line[key] for name, key in names.items() if line.get(key) is not None}


@contextlib.contextmanager
def follow_steps(folder: Path, total: int, pairs_per_step: int, console: Console) -> Iterator[None]:
    """Inside the block, show the steps, evaluations and findings that a run's workers write.

    Steps and findings of an earlier start are not shown again, and are in no rate.

    Args:
        folder: the run's, with its metrics file.
        total: steps in all.
        pairs_per_step: pairs of a step.
        console: where progress is shown.
    """
    position, lines = read_new_lines(folder / METRICS_FILE, 0)
    state = TrainingState([line for line in lines if FINDING not in line], pairs_per_step)
    findings = set(read_findings(folder).values())
    stop = threading.Event()
    with ProgressMeter(console, count_steps(pairs_per_step)) as meter:
        activities = _ActivityView(meter, folder)

        def show_news() -> None:
            nonlocal position
            position, news = read_new_lines(folder / METRICS_FILE, position)
            for line in news:
                if FINDING not in line:
                    evaluation = state.add_line(line)
                    if evaluation and not console.is_interactive:
                        console.print(evaluation)
                elif line["message"] not in findings:
                    findings.add(line["message"])
                    console.print(f"watch: {line['message']}")
            meter.update(
                _TASK, state.step, total, state.list_notes(), waits=not state.is_training, notes_below=True
            )
            activities.update()

        thread = threading.Thread(target=_repeat, args=(show_news, stop), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            activities.close()


class _ActivityView:
    """Shows on `meter` what the first worker does between two steps."""

    def __init__(self, meter: ProgressMeter, folder: Path) -> None:
        self._meter, self._folder = meter, folder
        self._shown: Activity | None = None
        self._earlier = read_activity(folder)  # left behind by a worker that was killed

    def update(self) -> None:
        activity = read_activity(self._folder)
        if activity == self._earlier:
            activity = None
        shown = self._shown
        if shown is not None and (activity is None or activity.name != shown.name):
            self._meter.update(shown.name, shown.total, shown.total)  # the worker has gone on
            self.close()
        if activity is not None:
            if self._shown is None:
                self._meter.begin(activity.name, Unit(activity.unit, f"{activity.unit}/s"))
            self._meter.update(activity.name, activity.done, activity.total)
            self._shown = activity

    def close(self) -> None:
        if self._shown is not None:
            self._meter.end(self._shown.name)
            self._shown = None


def _repeat(action: Callable[[], None], stop: threading.Event) -> None:
    """Call `action` now, now and then, and once more after `stop` is set."""
    ended = False
    while not ended:
        action()
        ended = stop.wait(_LOOK_EVERY_S)
    action()
