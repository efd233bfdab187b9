"""Read the rows of a file, a folder, a URI or a hub data set, each with the place it came from."""

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
from preferences.config import FIELDS, DataConfig, suggest_name
from preferences.pairs import BadRow, DataError
from preferences.rows import check_columns, get_column

PlacedRow = tuple[str, dict[str, Any] | BadRow]
"""A place (`train.jsonl:17`) with its row, or with the error of a row that cannot be read."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = (
    ".jsonl, .ndjson, .json (an array or lines), .parquet, .csv, .tsv, each also compressed (.gz, .zst, ...)"
)
SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
LONGEST_CSV_CELL = 2**31 - 1
_SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")  # written by `datasets.save_to_disk`


def read_rows(source: str, config: DataConfig, *, split: str) -> Iterator[PlacedRow]:
    """Yield every row of `source`, in order.

    `split` selects a split of a hub data set, or of a folder that has splits. A row that cannot be read is
    yielded as `BadRow`; an error of the whole source raises `DataError`.
    """
    filesystem, path = _open_filesystem(source)
    with _translate_store_errors(source):
        if filesystem.isdir(path):
            if any(filesystem.exists(posixpath.join(path, name)) for name in _SAVED_DATASET_FILES):
                yield from _read_saved_dataset(filesystem, path, source, config, split)
            else:
                for file in _list_data_files(filesystem, path, source, split):
                    place = buckets.join_path(source, posixpath.relpath(file, path))
                    yield from _read_file(filesystem, file, place, config)
        elif filesystem.exists(path):
            yield from _read_file(filesystem, path, source, config)
        elif "://" not in source and _detect_format(source) is None and HUB_ID.fullmatch(source):
            yield from _read_hub_dataset(source, config, split)
        else:
            raise DataError(
                f"{_redact_source(source)}: there is no such file or folder; check data.train and data.eval"
            )


def _open_filesystem(source: str) -> tuple[Any, str]:
    """Return the filesystem of a source and the path in it; pyarrow opens object stores, as for runs."""
    if buckets.is_bucket(source):
        with _translate_store_errors(source):
            store, path = buckets.open_bucket(source)
        return ArrowFSWrapper(store, skip_instance_cache=True), path
    try:
        return fsspec.url_to_fs(source)
    except ImportError as error:
        raise DataError(
            f"{_redact_source(source)}: a package that reads {source.partition('://')[0]}:// is missing "
            f"({error}); pip install it where the command runs"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{_redact_source(source)}: cannot be opened ({error}); give a path, an fsspec URI or a hub id"
        ) from error


@contextmanager
def _translate_store_errors(source: str) -> Iterator[None]:
    """Turn errors of the store behind a URI into a `DataError` with the remedy; leave local errors alone."""
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        if "://" not in source:
            raise
        raise DataError(
            f"{_redact_source(source)}: cannot be read ({buckets.describe_error(error)}); "
            f"{buckets.suggest_remedy(source)}"
        ) from error


def _redact_source(source: str) -> str:
    return buckets.redact_uri(source) if "://" in source else source


def _detect_format(path: str) -> str | None:
    stem, extension = posixpath.splitext(path)
    if extension in COMPRESSIONS:
        extension = posixpath.splitext(stem)[1]
    return {".jsonl": "json", ".ndjson": "json", ".json": "json"}.get(extension) or (
        extension[1:] if extension in (".parquet", ".csv", ".tsv") else None
    )


def _read_file(filesystem: Any, path: str, place: str, config: DataConfig) -> Iterator[PlacedRow]:
    """Yield the rows of one file, called `place` in messages."""
    kind, name = _detect_format(path), _redact_source(place)
    if kind is None:
        raise DataError(f"{name}: cannot tell the format from the name; name it as one of {FORMATS}")
    with _open_file(filesystem, path) as file:
        if kind == "parquet":
            yield from _read_parquet(file, name, config)
        elif kind == "json":
            yield from _check_row_columns(_read_json(file, name), config)
        else:
            yield from _check_row_columns(_read_csv(file, name, "\t" if kind == "tsv" else ","), config)


def _open_file(filesystem: Any, path: str) -> AbstractContextManager[IO[bytes]]:
    opened: AbstractContextManager[IO[bytes]] = fsspec.core.OpenFile(
        filesystem, path, "rb", compression=fsspec.utils.infer_compression(path)
    )
    return opened


def _check_row_columns(rows: Iterator[PlacedRow], config: DataConfig) -> Iterator[PlacedRow]:
    """Yield the rows, and refuse unknown columns: each new set of columns is checked once."""
    seen: set[tuple[str, ...]] = set()
    for place, row in rows:
        if not isinstance(row, BadRow) and (names := tuple(row)) not in seen:
            check_columns(names, place, config)
            seen.add(names)
        yield place, row


# ---- JSON ----


def _read_json(file: IO[bytes], path: str) -> Iterator[PlacedRow]:
    """Yield rows of JSON lines or of one JSON array, by the first character: both occur under either name."""
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(b"\xef\xbb\xbf").strip()
        if not text:
            continue
        if number == 1 and text.startswith(b"["):
            yield from _read_json_array(line + file.read(), path)
            return
        yield f"{path}:{number}", _parse_json_row(text, f"{path}:{number}")


def _parse_json_row(text: bytes, place: str) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(text)
    except UnicodeDecodeError as error:
        return BadRow(place, "not UTF-8", f"the line is not UTF-8 text ({error.reason})")
    except json.JSONDecodeError as error:
        return BadRow(
            place, "malformed JSON", f"the line is not valid JSON ({error.msg} at column {error.colno})"
        )
    return _check_object(row, place)


def _read_json_array(data: bytes, path: str) -> Iterator[PlacedRow]:
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
        yield place, _check_object(row, place)


def _check_object(row: Any, place: str) -> dict[str, Any] | BadRow:
    if isinstance(row, dict):
        return row
    return BadRow(
        place,
        "not an object",
        f'a row must be an object like {{"prompt": ..., "chosen": ...}}, got {type(row).__name__}',
    )


# ---- CSV ----


def _read_csv(file: IO[bytes], path: str, delimiter: str) -> Iterator[PlacedRow]:
    limit = csv.field_size_limit(LONGEST_CSV_CELL)  # the default refuses a response over 128 KiB
    try:
        reader = csv.reader(_decode_lines(file, path), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader, [])]
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise DataError(f"{path}:1: column {twice[0]!r} appears twice in the header; rename one")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield f"{path}:{line}", _parse_csv_row(header, cells, f"{path}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f'{path}:{reader.line_num}: not valid CSV ({error}); quote texts as "..."') from None
    finally:
        csv.field_size_limit(limit)


def _decode_lines(file: IO[bytes], path: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: the line is not UTF-8 text ({error.reason}); convert the file to UTF-8"
            ) from None


def _parse_csv_row(header: list[str], cells: list[str], place: str) -> dict[str, Any] | BadRow:
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


def _read_parquet(file: IO[bytes], path: str, config: DataConfig) -> Iterator[PlacedRow]:
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        names = parquet.schema_arrow.names
        check_columns(names, path, config)
        number = 0
        for batch in parquet.iter_batches(columns=_select_columns(names, config)):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", _clean_columnar_row(row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); write the file again") from error


def _read_saved_dataset(
    filesystem: Any, path: str, source: str, config: DataConfig, split: str
) -> Iterator[PlacedRow]:
    """Yield the rows of a local folder, mapped into memory, or of a temporary copy of a remote one."""
    if "://" not in source:
        yield from _read_dataset_folder(path, source, config, split)
        return
    with tempfile.TemporaryDirectory(prefix="polyref-") as copy:
        filesystem.get(path.rstrip("/") + "/", f"{copy}/", recursive=True)
        yield from _read_dataset_folder(copy, _redact_source(source), config, split)


def _read_dataset_folder(folder: str, source: str, config: DataConfig, split: str) -> Iterator[PlacedRow]:
    import datasets  # heavy, and needed for this kind of source only

    loaded = datasets.load_from_disk(folder)
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{source}: has no split {split!r}{suggest_name(split, list(loaded))}; set data.split to "
                f"one of {', '.join(loaded)}"
            )
        loaded = loaded[split]
    yield from _read_dataset(loaded, source, config)


def _read_hub_dataset(source: str, config: DataConfig, split: str) -> Iterator[PlacedRow]:
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
    yield from _read_dataset(loaded, f"{source}[{split}]", config)


def _read_dataset(dataset: Any, name: str, config: DataConfig) -> Iterator[PlacedRow]:
    check_columns(dataset.column_names, name, config)
    for number, row in enumerate(
        dataset.select_columns(_select_columns(dataset.column_names, config)), start=1
    ):
        yield f"{name}:row {number}", _clean_columnar_row(row)


def _select_columns(names: list[str], config: DataConfig) -> list[str]:
    wanted = {get_column(field, config) for field in FIELDS}
    return [name for name in names if name in wanted]


def _clean_columnar_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Drop nulls within values: columnar files give every message every key that any message has."""
    return {name: _drop_nulls(value) for name, value in row.items()}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _drop_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_drop_nulls(part) for part in value]
    return value


def _list_data_files(filesystem: Any, path: str, source: str, split: str) -> list[str]:
    """List the files of a folder in order of name: those of the split, if file names contain splits."""
    files = sorted(
        file for file in filesystem.find(path) if _detect_format(file) and not _is_hidden(file, path)
    )
    if not files:
        raise DataError(f"{source}: the folder holds no data file; known are {FORMATS}")
    split_of = {file: _find_split_in_name(file, path) for file in files}
    if not any(split_of.values()):
        return files
    mine = [file for file in files if split_of[file] == split]
    if not mine:
        found = sorted({name for name in split_of.values() if name})
        raise DataError(
            f"{source}: has no file of split {split!r}; set data.split to one of {', '.join(found)}"
        )
    return mine


def _is_hidden(file: str, folder: str) -> bool:
    return any(part.startswith((".", "_")) for part in posixpath.relpath(file, folder).split("/"))


def _find_split_in_name(file: str, folder: str) -> str | None:
    words = re.split(r"[^A-Za-z]+", posixpath.relpath(file, folder))
    return next((word for word in words if word in SPLITS), None)
