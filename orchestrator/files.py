"""Atomic writes of files and versioned JSON records, and helpers for folders."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CACHE_VARIABLE, DEFAULT_CACHE = "POLYREF_CACHE", "~/.cache/polyref"
"""The variable that names this machine's cache, and the folder without it."""
Record = TypeVar("Record", bound="DataclassInstance")

DIGESTS_FILE = "SHA256SUMS"
_DIGEST_KEY = "sha256"


class RecordError(ValueError):
    """A record cannot be read; the message says why in one clause."""


def dump_record(record: Any, *, version: int) -> str:
    """Return a dataclass as JSON text, with the version of its fields and a digest of them."""
    fields = json.loads(json.dumps({"version": version, **asdict(record)}))
    return json.dumps(fields | {_DIGEST_KEY: _digest_fields(fields)}, indent=1)


def load_record(
    kind: type[Record],
    text: str | bytes,
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
        RecordError: the text is not such a record, has values of other types or others than were written, or
            its version is newer.
    """
    try:
        fields = dict(json.loads(text, object_pairs_hook=_refuse_duplicates))
        digest = fields.pop(_DIGEST_KEY, None)  # records from before there were digests have none
        is_changed = digest is not None and digest != _digest_fields(fields)
        written = int(fields.pop("version", 1))
        if written > version:
            raise RecordError(
                f"it has version {written} and this polyref reads up to {version}: "
                "use the polyref that wrote it"
            )
        fields = dict(convert(written, fields))
        if unknown := sorted(set(fields) - {field.name for field in dataclasses.fields(kind)}):
            raise RecordError(f"it has fields of another program: {', '.join(unknown)[:200]}")
        record = TypeAdapter(kind).validate_python(fields)
        if is_changed:
            raise RecordError("it is not what was written: its digest is another one")
        return record
    except RecordError:
        raise
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise RecordError(f"it is damaged or of another program: {place}: {problem['msg']}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RecordError(f"it is damaged or of another program: {str(error)[:200]}") from error


def _digest_fields(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RecordError(f"it has a field twice, one of {', '.join(fields)[:200]}")
    return fields


def read_regular_file(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> bytes:
    """Read a file, but neither a folder nor a pipe or a device, which may never end.

    Raises:
        OSError: there is no such file, or it is too large; `strerror` says why.
    """
    try:
        found = os.stat(path)  # noqa: PTH116
    except ValueError:  # a NUL byte
        raise FileNotFoundError(errno.ENOENT, "its name has a NUL byte", str(path)) from None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    if max_bytes is not None and found.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", str(path))
    return Path(path).read_bytes()


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which becomes `path` if the block ends without an error.

    The folder is created if it is missing. A reader sees the old file or the new one, never a part of it, and
    after a power failure too.
    Only one process at a time may replace a file: the temporary name is fixed, so that killed processes leave
    at most one temporary file behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        sync_to_disk(temporary)
        temporary.replace(path)
        sync_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, which safetensors does not raise as an OSError, says that a disk is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    in_text = any(f"os error {number}" in str(error) for number in full)
    return in_text or (isinstance(error, OSError) and error.errno in full)


def measure_folder(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe_free_space(*folders: str | os.PathLike[str]) -> str:
    """Return how much space is left for each folder, for messages."""
    free = {os.fspath(folder): shutil.disk_usage(folder).free / 2**20 for folder in folders}
    return ", ".join(f"{folder} has {space:,.0f} MiB free" for folder, space in free.items())


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of every file below a folder into `SHA256SUMS`, which `sha256sum --check` reads."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS_FILE)
    lines = [f"{digest_file(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    replace_text(folder / DIGESTS_FILE, "".join(lines))


def find_changed_file(folder: Path) -> str | None:
    """Return a file that is missing or not what `write_digests` saw; None if there is none, or no digests."""
    if not (folder / DIGESTS_FILE).exists():
        return None
    for line in (folder / DIGESTS_FILE).read_text().splitlines():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file() or digest_file(folder / name) != digest:
            return name
    return None


def cache_folder(*names: str) -> Path:
    """Return a folder of this machine's cache, which is `$POLYREF_CACHE` or `~/.cache/polyref`."""
    root = os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE
    home = os.path.expanduser(root)  # noqa: PTH111  # Path's raises where there is no such user
    return Path(home).absolute().joinpath(*names)


def digest_folder(folder: Path, suffix: str = "") -> str:
    """Return the SHA-256 over names and contents of all files below that end with `suffix`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(f"*{suffix}") if p.is_file()):
        digest.update(f"{digest_file(path)}  {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder with hard links where the file system allows them, because weights are large."""

    def link_or_copy(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)

    shutil.copytree(source, target, copy_function=link_or_copy, dirs_exist_ok=True)
