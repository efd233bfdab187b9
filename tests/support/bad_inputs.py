"""What a wrong input costs a user: one line that says where and what to do, exit code 2, and nothing left."""

import json
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
import yaml

from orchestrator.cli.main import run_command_line

LIMIT_S = 30
"""Seconds of wall time after which a refusal counts as a hang."""

ROWS = [{"prompt": f"Film {n} is ", "chosen": "good.", "rejected": "dull!"} for n in range(8)]


class Hang(BaseException):
    """The command did not refuse its input in time; no handler of the product catches this."""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Workplace:
    """A folder with a good run file over tiny models; tests spoil a part of it and run a command."""

    folder: Path
    run: dict[str, Any]

    @property
    def file(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def data(self) -> Path:
        return self.folder / "pairs.jsonl"

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    def write_rows(self, rows: Iterable[object]) -> None:
        """Write the data: objects as JSON, strings as they are."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        self.data.write_text("".join(f"{line}\n" for line in lines))

    def write_run(self, **sections: Any) -> Path:
        """Write the run file with some sections changed; mappings are merged, None removes a section."""
        run = dict(self.run)
        for section, value in sections.items():
            merge = isinstance(value, dict) and isinstance(run.get(section), dict)
            run[section] = run[section] | value if merge else value
        run = {section: value for section, value in run.items() if value is not None}
        self.file.write_text(yaml.safe_dump(run))
        return self.file


class Commands:
    """Runs commands of `polyref` in this process, where none may start Ray."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self._folder, self._monkeypatch, self._capfd = folder, monkeypatch, capfd

    def run(self, *arguments: object) -> Outcome:
        """Run `polyref` with these arguments."""
        self._monkeypatch.setattr(sys, "argv", ["polyref", *map(str, arguments)])
        self._capfd.readouterr()
        code: Any = 0
        try:
            with _bound_time(LIMIT_S):
                run_command_line()
        except SystemExit as left:
            code = left.code or 0
        printed = self._capfd.readouterr()
        return Outcome(code, printed.out, printed.err)

    def refuse(self, *arguments: object, says: Iterable[str]) -> None:
        """Run `polyref` and assert that it refuses in one message with all these words and leaves nothing."""
        before = _list_tree(self._folder)
        outcome = self.run(*arguments)
        assert outcome.code == 2, outcome
        assert "Traceback" not in outcome.err + outcome.out
        assert outcome.err.startswith("polyref: "), outcome.err
        assert outcome.err.count("polyref: ") == 1, outcome.err
        assert len(outcome.err) < 4000, "the message repeats the input"
        missing = [word for word in says if word.lower() not in outcome.err.lower()]
        assert not missing, f"{missing} not in {outcome.err}"
        assert _list_tree(self._folder) == before


@contextmanager
def _bound_time(seconds: int) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise Hang

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def _list_tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
