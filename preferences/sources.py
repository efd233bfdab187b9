"""Rows as they are written in a file, a folder, a URI or a hub data set, each with the place it came from."""

import csv
import json
import posixpath
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.parquet
from fsspec.implementations.arrow import ArrowFSWrapper

from preferences import buckets
from preferences.config import FIELDS, DataConfig, did_you_mean
from preferences.pairs import BadRow, DataError
from preferences.rows import check_columns, column_of

Placed = tuple[str, dict[str, Any] | BadRow]
"""A place (`train.jsonl:17`) with its row, or with why there is none."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = (
    ".jsonl, .ndjson, .json (an array or lines), .parquet, .csv, .tsv, each also compressed (.gz, .zst, ...)"
)
SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
LONGEST_CSV_CELL = 2**31 - 1
_SAVED = ("state.json", "dataset_dict.json")  # what `datasets.save_to_disk` leaves


def read_rows(source: str, config: DataConfig, *, split: str) -> Iterator[Placed]:
    """Every row of `source`, in order.

    `split` picks one of a hub data set's, or of a folder's that has splits. A row that cannot be read is
    yielded as `BadRow`; what concerns the whole source raises `DataError`.
    """
    filesystem, path = _located(source)
    with _reached(source):
        if filesystem.isdir(path):
            if any(filesystem.exists(posixpath.join(path, name)) for name in _SAVED):
                yield from _saved_dataset(filesystem, path, source, config, split)
            else:
                for file in _data_files(filesystem, path, source, split):
                    place = buckets.join(source, posixpath.relpath(file, path))
                    yield from _file_rows(filesystem, file, place, config)
        elif filesystem.exists(path):
            yield from _file_rows(filesystem, path, source, config)
        elif "://" not in source and _format(source) is None and HUB_ID.fullmatch(source):
            yield from _hub_dataset(source, config, split)
        else:
            raise DataError(
                f"{_shown(source)}: there is no such file or folder; check data.train and data.eval"
            )


def _located(source: str) -> tuple[Any, str]:
    """The filesystem of a source and the path in it: object stores by pyarrow, as runs are kept."""
    if buckets.is_bucket(source):
        with _reached(source):
            store, path = buckets.opened(source)
        return ArrowFSWrapper(store, skip_instance_cache=True), path
    try:
        return fsspec.url_to_fs(source)
    except ImportError as error:
        raise DataError(
            f"{_shown(source)}: a package that reads {source.partition('://')[0]}:// is missing ({error}); "
            "pip install it where the command runs"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{_shown(source)}: cannot be opened ({error}); give a path, an fsspec URI or a hub id"
        ) from error


@contextmanager
def _reached(source: str) -> Iterator[None]:
    """Errors of the store behind a URI as one message with the remedy; those of a folder stay as they are."""
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        if "://" not in source:
            raise
        raise DataError(
            f"{_shown(source)}: cannot be read ({buckets.reason(error)}); {buckets.remedy(source)}"
        ) from error


def _shown(source: str) -> str:
    return buckets.without_options(source) if "://" in source else source


def _format(path: str) -> str | None:
    stem, extension = posixpath.splitext(path)
    if extension in COMPRESSIONS:
        extension = posixpath.splitext(stem)[1]
    return {".jsonl": "json", ".ndjson": "json", ".json": "json"}.get(extension) or (
        extension[1:] if extension in (".parquet", ".csv", ".tsv") else None
    )


def _file_rows(filesystem: Any, path: str, place: str, config: DataConfig) -> Iterator[Placed]:
    """The rows of one file, called `place` in messages."""
    kind, name = _format(path), _shown(place)
    if kind is None:
        raise DataError(f"{name}: cannot tell the format from the name; name it as one of {FORMATS}")
    with _bytes(filesystem, path) as file:
        if kind == "parquet":
            yield from _parquet(file, name, config)
        elif kind == "json":
            yield from _checked(_json(file, name), config)
        else:
            yield from _checked(_csv(file, name, "\t" if kind == "tsv" else ","), config)


def _bytes(filesystem: Any, path: str) -> AbstractContextManager[IO[bytes]]:
    opened: AbstractContextManager[IO[bytes]] = fsspec.core.OpenFile(
        filesystem, path, "rb", compression=fsspec.utils.infer_compression(path)
    )
    return opened


def _checked(rows: Iterator[Placed], config: DataConfig) -> Iterator[Placed]:
    """Rows whose columns are known: each new set of columns is looked at once."""
    seen: set[tuple[str, ...]] = set()
    for place, row in rows:
        if not isinstance(row, BadRow) and (names := tuple(row)) not in seen:
            check_columns(names, place, config)
            seen.add(names)
        yield place, row


# ---- JSON ----


def _json(file: IO[bytes], path: str) -> Iterator[Placed]:
    """JSON lines, or one JSON array, told apart by the first character: both are met under either name."""
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(b"\xef\xbb\xbf").strip()
        if not text:
            continue
        if number == 1 and text.startswith(b"["):
            yield from _json_array(line + file.read(), path)
            return
        yield f"{path}:{number}", _json_row(text, f"{path}:{number}")


def _json_row(text: bytes, place: str) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(text)
    except UnicodeDecodeError as error:
        return BadRow(place, "not UTF-8", f"the line is not UTF-8 text ({error.reason})")
    except json.JSONDecodeError as error:
        return BadRow(
            place, "malformed JSON", f"the line is not valid JSON ({error.msg} at column {error.colno})"
        )
    return _an_object(row, place)


def _json_array(data: bytes, path: str) -> Iterator[Placed]:
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: the file is not UTF-8 text ({error.reason}); convert it to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: the JSON array is not valid ({error.msg} at column {error.colno}); "
            "correct it, or write one JSON object on each line"
        ) from None
    for number, row in enumerate(rows, start=1):
        place = f"{path}:row {number}"
        yield place, _an_object(row, place)


def _an_object(row: Any, place: str) -> dict[str, Any] | BadRow:
    if isinstance(row, dict):
        return row
    return BadRow(
        place,
        "not an object",
        f'a row must be an object like {{"prompt": ..., "chosen": ...}}, got {type(row).__name__}',
    )


# ---- CSV ----


def _csv(file: IO[bytes], path: str, delimiter: str) -> Iterator[Placed]:
    limit = csv.field_size_limit(LONGEST_CSV_CELL)  # the default refuses a response of 128 KiB
    try:
        reader = csv.reader(_lines(file, path), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader, [])]
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise DataError(f"{path}:1: column {twice[0]!r} stands twice in the header; rename one")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield f"{path}:{line}", _csv_row(header, cells, f"{path}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f'{path}:{reader.line_num}: not valid CSV ({error}); quote texts as "..."') from None
    finally:
        csv.field_size_limit(limit)


def _lines(file: IO[bytes], path: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: the line is not UTF-8 text ({error.reason}); convert the file to UTF-8"
            ) from None


def _csv_row(header: list[str], cells: list[str], place: str) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(
            place,
            "wrong number of cells",
            f"the row has {len(cells)} cells, the header {len(header)}; quote texts that hold the delimiter",
        )
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        row[name] = cell or None
        if cell.startswith("[{"):
            try:
                row[name] = json.loads(cell)
            except json.JSONDecodeError as error:
                return BadRow(
                    place,
                    "malformed JSON",
                    f"{name} looks like a message list and is not valid JSON ({error.msg})",
                )
    return row


# ---- columns: Parquet and datasets ----


def _parquet(file: IO[bytes], path: str, config: DataConfig) -> Iterator[Placed]:
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        names = parquet.schema_arrow.names
        check_columns(names, path, config)
        number = 0
        for batch in parquet.iter_batches(columns=_read_columns(names, config)):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", _columnar(row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); write the file again") from error


def _saved_dataset(
    filesystem: Any, path: str, source: str, config: DataConfig, split: str
) -> Iterator[Placed]:
    """Mapped into memory where it lies in a folder; else from a copy that goes when it was read."""
    if "://" not in source:
        yield from _loaded_dataset(path, source, config, split)
        return
    with tempfile.TemporaryDirectory(prefix="polyref-") as copy:
        filesystem.get(path.rstrip("/") + "/", f"{copy}/", recursive=True)
        yield from _loaded_dataset(copy, _shown(source), config, split)


def _loaded_dataset(folder: str, source: str, config: DataConfig, split: str) -> Iterator[Placed]:
    import datasets  # heavy, and needed for this kind of source only

    loaded = datasets.load_from_disk(folder)
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{source}: has no split {split!r}{did_you_mean(split, list(loaded))}; set data.split to "
                f"one of {', '.join(loaded)}"
            )
        loaded = loaded[split]
    yield from _dataset_rows(loaded, source, config)


def _hub_dataset(source: str, config: DataConfig, split: str) -> Iterator[Placed]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, name=config.subset, split=split, revision=config.revision)
    except (FileNotFoundError, ConnectionError) as error:
        raise DataError(
            f"{source}: is neither a file or folder here nor a data set that the hub gives ({error}); check "
            "the name, and the network or the access token"
        ) from error
    except ValueError as error:
        raise DataError(f"{source}: {error}; check data.subset, data.split and data.revision") from error
    yield from _dataset_rows(loaded, f"{source}[{split}]", config)


def _dataset_rows(dataset: Any, name: str, config: DataConfig) -> Iterator[Placed]:
    check_columns(dataset.column_names, name, config)
    for number, row in enumerate(
        dataset.select_columns(_read_columns(dataset.column_names, config)), start=1
    ):
        yield f"{name}:row {number}", _columnar(row)


def _read_columns(names: list[str], config: DataConfig) -> list[str]:
    wanted = {column_of(field, config) for field in FIELDS}
    return [name for name in names if name in wanted]


def _columnar(row: Mapping[str, Any]) -> dict[str, Any]:
    """Columnar files give every message every key that any message has: a null there means absent."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _data_files(filesystem: Any, path: str, source: str, split: str) -> list[str]:
    """The files of a folder, in order of name: those of the split, when their names tell splits apart."""
    files = sorted(file for file in filesystem.find(path) if _format(file) and not _hidden(file, path))
    if not files:
        raise DataError(f"{source}: the folder holds no data file; known are {FORMATS}")
    split_of = {file: _named_split(file, path) for file in files}
    if not any(split_of.values()):
        return files
    mine = [file for file in files if split_of[file] == split]
    if not mine:
        found = sorted({name for name in split_of.values() if name})
        raise DataError(
            f"{source}: has no file of split {split!r}; set data.split to one of {', '.join(found)}"
        )
    return mine


def _hidden(file: str, folder: str) -> bool:
    return any(part.startswith((".", "_")) for part in posixpath.relpath(file, folder).split("/"))


def _named_split(file: str, folder: str) -> str | None:
    words = re.split(r"[^A-Za-z]+", posixpath.relpath(file, folder))
    return next((word for word in words if word in SPLITS), None)
