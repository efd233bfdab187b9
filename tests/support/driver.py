"""A command in a process of its own, which a test can kill as a machine that is taken away would."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


class Driver:
    """`python -m orchestrator COMMAND FILE`, leader of a process group of its own."""

    def __init__(self, command: str, file: Path) -> None:
        # Models of the tests' size are slower on several threads, and sums must not depend on their number.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
        self.log = file.with_suffix(".log")
        with self.log.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", command, str(file)],
                cwd=file.parent,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._family: dict[int, psutil.Process] = {}

    def until(self, met: Callable[[], bool], *, every: float = 0.02) -> None:
        """Wait for something the run does, looking every few seconds; fails if the run ends first."""
        deadline = time.monotonic() + 600
        while not met():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(every)

    def is_running(self) -> bool:
        """Whether the command has not ended yet."""
        return self._process.poll() is None

    def end(self) -> int:
        """Wait for the end; the exit code."""
        return self._process.wait(600)

    def kill(self) -> None:
        """SIGKILL to the command and its process group, as when a machine is taken away."""
        family = self.family()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        _, alive = psutil.wait_procs(family, timeout=60)
        names = [process.name() for process in alive if process.is_running()]
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=30)
        assert names == [], "Ray's processes outlive the command"

    def family(self) -> list[psutil.Process]:
        """The command's descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def interrupt(self, number: int) -> int:
        """Ctrl-C (SIGINT) or a stopped job (SIGTERM): the signal goes to the command alone; its exit code."""
        family = self.family()
        self._process.send_signal(number)
        code = self.end()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert [process.name() for process in alive] == [], "processes outlive the command"
        return code
