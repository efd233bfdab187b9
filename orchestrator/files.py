"""Atomic writes of files and versioned JSON records, and helpers for folders."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")


class RecordError(ValueError):
    """A record cannot be read; the message says why in one clause."""


def dump_record(record: Any, *, version: int) -> str:
    """Return a dataclass as JSON text, with the version of its fields."""
    return json.dumps({"version": version, **asdict(record)}, indent=1)


def load_record(
    kind: type[Record],
    text: str,
    *,
    version: int,
    convert: Callable[[int, dict[str, Any]], Mapping[str, Any]] = lambda _, fields: fields,
) -> Record:
    """Read a record that `dump_record` wrote, in this version or an older one.

    Args:
        kind: the dataclass.
        text: the JSON text. A record without a version has version 1, which was written without one.
        version: today's version of the fields of `kind`.
        convert: turns (version, fields) as they were written into today's fields.

    Raises:
        RecordError: the text is not such a record, or its version is newer.
    """
    try:
        fields = dict(json.loads(text))
        written = int(fields.pop("version", 1))
        if written > version:
            raise RecordError(
                f"it has version {written} and this polyref reads up to {version}: "
                "use the polyref that wrote it"
            )
        return kind(**convert(written, fields))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"it is damaged or of another program: {error}") from error


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which becomes `path` if the block ends without an error.

    The folder is created if it is missing. A reader sees the old file or the new one, never a part of it.
    Only one process at a time may replace a file: the temporary name is fixed, so that killed processes leave
    at most one temporary file behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder(*names: str) -> Path:
    """Return a folder of this machine's cache, which is `$POLYREF_CACHE` or `~/.cache/polyref`."""
    root = os.environ.get("POLYREF_CACHE") or "~/.cache/polyref"
    return Path(root).expanduser().absolute().joinpath(*names)


def digest_folder(folder: Path, suffix: str = "") -> str:
    """Return the SHA-256 over names and contents of all files below that end with `suffix`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(f"*{suffix}") if p.is_file()):
        with path.open("rb") as file:
            file_digest = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{file_digest}  {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder with hard links where the file system allows them, because weights are large."""

    def link_or_copy(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)

    shutil.copytree(source, target, copy_function=link_or_copy, dirs_exist_ok=True)
