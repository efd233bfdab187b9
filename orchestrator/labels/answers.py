"""Answers of an endpoint, kept in a file: what was paid for once is not asked again."""

import hashlib
import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orchestrator.errors import RunFailed

logger = logging.getLogger(__name__)


class AnswerFile:
    """A file of lines of JSON, one answer each, which is only ever added to.

    A last line that a killed command left incomplete is ignored, and its question asked again.

    Args:
        path: the file; its folder is created.

    Raises:
        RunFailed: it cannot be read or created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._answers = _read_lines(path) if path.exists() else {}
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunFailed(f"{path}: answers cannot be kept there: {error}") from error
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def get_answer(self, key: str) -> Any:
        """Return an answer that is known."""
        return self._answers[key]

    def add_answer(self, key: str, answer: Any) -> None:
        """Add an answer, and write it before this returns."""
        self._answers[key] = answer
        self._file.write(json.dumps({"key": key, "answer": answer}) + "\n")
        self._file.flush()


def digest_question(*parts: Any) -> str:
    """Return the digest of everything that an answer depends on."""
    return hashlib.blake2b(json.dumps(parts, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def _read_lines(path: Path) -> dict[str, Any]:
    answers, damaged = {}, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            answers[record["key"]] = record["answer"]
        except (ValueError, TypeError, KeyError):
            damaged += bool(line.strip())
    if damaged > 1:
        logger.warning("%s: %d lines are damaged, and their questions are asked again", path, damaged)
    return answers
