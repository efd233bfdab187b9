"""Files and records that are written whole or not at all."""

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
    """Write a dataclass as JSON text with the version of its fields."""
    return json.dumps({"version": version, **asdict(record)}, indent=1)


def load_record(
    kind: type[Record],
    text: str,
    *,
    version: int,
    convert: Callable[[int, dict[str, Any]], Mapping[str, Any]] = lambda _, fields: fields,
) -> Record:
    """Read what `dump_record` wrote, in this version or an older one.

    Args:
        kind: the dataclass.
        text: the JSON text. A record without a version is of version 1, which was not written down.
        version: of the fields that `kind` has now.
        convert: (version, fields) as they were written -> today's fields.

    Raises:
        RecordError: the text is not such a record, or it is of a newer version.
    """
    try:
        fields = dict(json.loads(text))
        written = int(fields.pop("version", 1))
        if written > version:
            raise RecordError(
                f"it has version {written} and this polyref reads up to {version}: use the polyref that wrote it"
            )
        return kind(**convert(written, fields))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"it is damaged or of another program: {error}") from error


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one move."""
    with replace_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which becomes `path` if the block ends without an error.

    The folder is created if it is missing. A reader sees the old file or the new one, never a part of it. One
    process at a time may replace a file, so that a killed one leaves at most one part behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def cache_folder(*names: str) -> Path:
    """Return a folder for copies that polyref keeps on this machine, in `$POLYREF_CACHE` or `~/.cache/polyref`."""
    root = os.environ.get("POLYREF_CACHE") or "~/.cache/polyref"
    return Path(root).expanduser().absolute().joinpath(*names)


def digest_folder(folder: Path, suffix: str = "") -> str:
    """SHA-256 over the names and contents of all files below, or of those whose name ends with `suffix`."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(f"*{suffix}") if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{content}  {path.relative_to(folder).as_posix()}\n".encode())
    return whole.hexdigest()


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder, by hard links where the file system has them: weights are large."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
