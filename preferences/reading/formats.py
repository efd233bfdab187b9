"""Read rows in chunks from files of every format, and from data sets stored by column."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from preferences.config import SourceConfig
from preferences.pairs import BadRow, DataError
from preferences.reading.json_text import JsonError, parse_json
from preferences.reading.rows import check_columns, list_columns_read

PlacedRow = tuple[str, dict[str, Any] | BadRow]
"""A place (`train.jsonl:17`) with its row, or with the error of a row that cannot be read."""

LONGEST_CSV_CELL = 2**31 - 1
LONGEST_LINE = 1 << 28
"""Bytes of a line of JSON; one of this size is no row, but a file without line ends."""
CHUNK_ROWS = 1024
"""Rows that are parsed and tokenised together."""


@dataclass(frozen=True)
class RowChunk:
    """Consecutive rows of a source, left unparsed where another process can parse them.

    Attributes:
        name: the file or data set, for places.
        first: number of the first row in it, from 1.
        rows: lines of JSON, parsed rows with their places, or a table.
    """

    name: str
    first: int
    rows: list[bytes] | list[PlacedRow] | pyarrow.Table

    def __len__(self) -> int:
        return len(self.rows)

    def parse_rows(self) -> Iterator[PlacedRow]:
        """Yield the rows in order; one that cannot be parsed is yielded as `BadRow`."""
        if isinstance(self.rows, pyarrow.Table):
            yield from _parse_table(self.rows, self.name, self.first)
            return
        for number, row in enumerate(self.rows, start=self.first):
            if isinstance(row, tuple):
                yield row
            elif text := row.strip():
                yield f"{self.name}:{number}", _parse_json_row(text, f"{self.name}:{number}")

    def parse_checked_rows(self, config: SourceConfig) -> Iterator[PlacedRow]:
        """Yield the rows in order, and refuse unknown columns: each new set of columns is checked once."""
        seen: set[tuple[str, ...]] = set()
        for place, row in self.parse_rows():
            if not isinstance(row, BadRow) and (names := tuple(row)) not in seen:
                check_columns(names, place, config)
                seen.add(names)
            yield place, row


def _group_rows(rows: Iterator[PlacedRow], name: str) -> Iterator[RowChunk]:
    """Yield rows that are parsed already in chunks."""
    first = 1
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield RowChunk(name, first, chunk)
        first += len(chunk)


# ---- JSON ----


def read_json(file: IO[bytes], path: str) -> Iterator[RowChunk]:
    """Yield rows of JSON lines or of one JSON array, by the first character: both occur under either name."""
    first_line = file.readline(LONGEST_LINE).removeprefix(b"\xef\xbb\xbf")
    if first_line.lstrip().startswith(b"["):
        yield from _group_rows(_read_json_array(first_line + file.read(), path), path)
        return
    _refuse_long_line(first_line, f"{path}:1")
    lines, number = chain([first_line], _read_lines(file, path)), 1
    while chunk := list(islice(lines, CHUNK_ROWS)):
        yield RowChunk(path, number, chunk)
        number += len(chunk)


def _read_lines(file: IO[bytes], path: str) -> Iterator[bytes]:
    """Yield the lines that follow the first."""
    number = 2
    while line := file.readline(LONGEST_LINE):
        _refuse_long_line(line, f"{path}:{number}")
        yield line
        number += 1


def _refuse_long_line(line: bytes, place: str) -> None:
    if len(line) == LONGEST_LINE:
        raise DataError(
            f"{place}: the line is longer than {LONGEST_LINE >> 20} MiB; write one JSON object on each line"
        )


def _parse_json_row(text: bytes, place: str) -> dict[str, Any] | BadRow:
    try:
        row = parse_json(text.decode())
    except UnicodeDecodeError as error:
        return BadRow(place, "not UTF-8", f"the line is not UTF-8 text ({error.reason})")
    except JsonError as error:
        return BadRow(place, error.reason, f"the line is {error.detail}")
    return _check_object(row, place)


def _read_json_array(data: bytes, path: str) -> Iterator[PlacedRow]:
    try:
        rows = parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: the file is not UTF-8 text ({error.reason}); convert it to UTF-8"
        ) from None
    except JsonError as error:
        place = path if error.line is None else f"{path}:{error.line}"
        raise DataError(
            f"{place}: the JSON array is {error.detail}; correct it, or write one JSON object on each line"
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


def read_csv(file: IO[bytes], path: str, delimiter: str) -> Iterator[RowChunk]:
    """Yield the rows under a header; quoted texts may span lines."""
    yield from _group_rows(_parse_csv(file, path, delimiter), path)


def _parse_csv(file: IO[bytes], path: str, delimiter: str) -> Iterator[PlacedRow]:
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
        if b"\0" in line:
            raise DataError(
                f"{path}:{number}: the line has a NUL byte, which no text has; convert the file to UTF-8"
            )
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
                row[name] = parse_json(cell)
            except JsonError as error:
                return BadRow(place, error.reason, f"{name} looks like a message list and is {error.detail}")
    return row


# ---- columns: Parquet and datasets ----


def read_parquet(file: IO[bytes], path: str, checked: SourceConfig | None) -> Iterator[RowChunk]:
    """Yield the rows of a Parquet file; `checked` are settings that choose its columns, None reads all."""
    try:
        parquet = pyarrow.parquet.ParquetFile(_make_seekable(file), page_checksum_verification=True)
        names = _select_columns(parquet.schema_arrow.names, path, checked)
        first = 1
        for batch in parquet.iter_batches(CHUNK_ROWS, columns=names):
            yield RowChunk(path, first, pyarrow.Table.from_batches([batch]))
            first += len(batch)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # names of columns are texts too
        raise DataError(
            f"{path}: cannot be read as Parquet ({error!s:.300}); write the file again"
        ) from error


def _make_seekable(file: IO[bytes]) -> IO[bytes]:
    """Return a file that can be read from its end, as Parquet is; decompressed ones are read into memory."""
    return file if file.seekable() else io.BytesIO(file.read())


def read_dataset(dataset: Any, name: str, checked: SourceConfig | None) -> Iterator[RowChunk]:
    """Yield the rows of a data set of `datasets`; `checked` as for Parquet."""
    rows = dataset.select_columns(_select_columns(dataset.column_names, name, checked)).with_format("arrow")
    for first in range(0, len(rows), CHUNK_ROWS):
        table = rows[first : first + CHUNK_ROWS]
        try:
            table.validate(full=True)  # damaged offsets would end the process
        except pyarrow.ArrowException as error:
            raise DataError(
                f"{name}:row {first + 1}: cannot be read as Arrow ({error!s:.300}); save the data set again"
            ) from error
        yield RowChunk(name, first + 1, table)


def _select_columns(names: list[str], place: str, checked: SourceConfig | None) -> list[str]:
    """Return the columns to read: all of them for a sample, else those of the settings."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{place}: column {twice[0]!r} is there twice; rename one")
    if checked is None:
        return names
    check_columns(names, place, checked)
    return list_columns_read(names, checked)


def _parse_table(table: pyarrow.Table, name: str, first: int) -> Iterator[PlacedRow]:
    """Yield the rows of a table, one by one where a value in it is nothing that Python can hold."""
    errors = (ValueError, OverflowError, pyarrow.ArrowException)
    try:
        rows = table.to_pylist()
    except errors as error:
        if len(table) == 1:
            place = f"{name}:row {first}"
            yield place, BadRow(place, "unreadable value", f"a value cannot be read ({error!s:.300})")
            return
        for number in range(len(table)):
            yield from _parse_table(table.slice(number, 1), name, first + number)
        return
    for number, row in enumerate(rows, start=first):
        yield f"{name}:row {number}", {name: _drop_nulls(value) for name, value in row.items()}


def _drop_nulls(value: Any) -> Any:
    """Drop nulls within a value: columnar files give every message every key that any message has."""
    if isinstance(value, Mapping):
        return {name: _drop_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_drop_nulls(part) for part in value]
    return value
