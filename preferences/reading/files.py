"""Open the files of a source, whatever their compression, and say why one cannot be read."""

import bz2
import gzip
import io
import lzma
import posixpath
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow

from preferences import buckets
from preferences.pairs import DataError

_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")),
}
COMPRESSIONS = tuple(_DECOMPRESSORS)
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
_LONGEST_NAME = 500


@contextmanager
def open_file(filesystem: Any, path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading; one that is named as compressed is decompressed on the way."""
    decompress = _DECOMPRESSORS.get(posixpath.splitext(path)[1])
    with filesystem.open(path, "rb") as file:
        if decompress is None:
            yield file
        else:
            with decompress(file) as decompressed:
                yield decompressed


def refuse_special_files(filesystem: Any, files: Iterable[str]) -> None:
    """Refuse pipes, sockets and devices, which may have no end, and names that are no text.

    Raises:
        DataError: one of the local files is none.
    """
    if "file" not in filesystem.protocol:
        return
    for file in files:
        name = format_source(file)
        if not name.isprintable():
            raise DataError(f"{name!r}: the name is no text that can be written; rename it")
        with translate_read_errors(file):
            mode = Path(file).stat().st_mode
        if not stat.S_ISREG(mode):
            raise DataError(
                f"{name}: is neither a file nor a folder (but a pipe, a socket or a device); copy what it "
                "gives into a file"
            )


@contextmanager
def translate_read_errors(source: str) -> Iterator[None]:
    """Turn errors of reading a source into a `DataError` with the remedy."""
    try:
        yield
    except _READ_ERRORS as error:
        if "://" in source:
            reason, remedy = buckets.describe_error(error), buckets.suggest_remedy(source)
        else:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            named = isinstance(error, OSError) and error.errno is not None
            remedy = "check the name and who may read it" if named else "copy or write it again"
        raise DataError(f"{format_source(source)}: cannot be read ({reason}); {remedy}") from error


def format_source(source: str) -> str:
    """Return the name of a source as messages show it: without secrets, and not without end."""
    name = buckets.redact_uri(source) if "://" in source else source
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}...{name[-half:]}"
