"""Read the rows of a file, a folder, a URI or a hub data set, each with the place it came from."""

import hashlib
import posixpath
import re
import tempfile
from collections.abc import Iterator
from itertools import islice
from typing import Any

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper

from preferences import buckets
from preferences.config import SourceConfig
from preferences.naming import suggest_name
from preferences.pairs import BadRow, DataError
from preferences.reading.files import (
    COMPRESSIONS,
    format_source,
    open_file,
    refuse_special_files,
    translate_read_errors,
)
from preferences.reading.formats import (
    PlacedRow,
    RowChunk,
    read_csv,
    read_dataset,
    read_json,
    read_parquet,
)

FORMATS = (
    ".jsonl, .ndjson, .json (an array or lines), .parquet, .csv, .tsv, each also compressed (.gz, .zst, ...)"
)
SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")  # written by `datasets.save_to_disk`


def read_rows(config: SourceConfig) -> Iterator[PlacedRow]:
    """Yield every row of a source, in order.

    A row that cannot be read is yielded as `BadRow`; an error of the whole source raises `DataError`.
    """
    for chunk in read_chunks(config):
        yield from chunk.parse_checked_rows(config)


def read_sample(config: SourceConfig, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a source that can be read, with all of their columns."""
    rows = (row for chunk in _read_all_chunks(config, None) for _, row in chunk.parse_rows())
    return list(islice((row for row in rows if not isinstance(row, BadRow)), count))


def read_chunks(config: SourceConfig) -> Iterator[RowChunk]:
    """Yield the rows of a source in chunks, of sources stored by column those that the settings read.

    Raises:
        DataError: the source cannot be read, or has unknown columns that are known before its rows.
    """
    return _read_all_chunks(config, config)


def digest_source(config: SourceConfig) -> str:
    """Return a digest that changes with the content of a source.

    Local files are read as a whole; of an object store's, names, sizes and times of change are enough.
    """
    digest = hashlib.blake2b(digest_size=16)
    place = _find_place(config)
    if place is None:
        digest.update(_load_hub_dataset(config)._fingerprint.encode())
        return digest.hexdigest()
    filesystem, path = place
    for file in _list_files(filesystem, path, config.source):
        with translate_read_errors(_name_file(config.source, path, file)):
            digest.update(f"{file}\0{_digest_file(filesystem, file)}\n".encode())
    return digest.hexdigest()


def _list_files(filesystem: Any, path: str, source: str) -> list[str]:
    """List the files that a source consists of in order of name, and refuse what is none."""
    with translate_read_errors(source):
        files = sorted(filesystem.find(path)) if filesystem.isdir(path) else [path]
    refuse_special_files(filesystem, files)
    return files


def _name_file(source: str, path: str, file: str) -> str:
    """Return what a file of a source at `path` is called."""
    return source if file == path else buckets.join_path(source, posixpath.relpath(file, path))


def _digest_file(filesystem: Any, path: str) -> str:
    """Return what tells a file's content: where a store keeps it, its size and time of change."""
    info = filesystem.info(path)
    stamps = [info.get(name) for name in ("ETag", "etag", "mtime", "LastModified", "last_modified")]
    if "file" not in filesystem.protocol and any(stamps):
        return f"{info.get('size')} {stamps}"
    with filesystem.open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def is_hub_name(source: str) -> bool:
    """Whether a source that is no file or folder here is the name of a data set on the hub."""
    return "://" not in source and _detect_format(source) is None and HUB_ID.fullmatch(source) is not None


def _find_place(config: SourceConfig) -> tuple[Any, str] | None:
    """Return the filesystem and path of a source; None if it is the name of a data set on the hub."""
    source = config.source
    if not source.strip():
        raise DataError("the name of the source is empty; give a file, a folder, a URI or a hub id")
    filesystem, path = _open_filesystem(source)
    with translate_read_errors(source):
        if filesystem.exists(path):
            return filesystem, path
    if is_hub_name(source):
        return None
    raise DataError(
        f"{format_source(source)}: there is no such file or folder; check data.train and data.eval"
    )


def _read_all_chunks(config: SourceConfig, checked: SourceConfig | None) -> Iterator[RowChunk]:
    """Yield the chunks of a source; `checked` refuses its unknown columns and leaves out what is not read."""
    source, place = config.source, _find_place(config)
    if place is None:
        yield from read_dataset(_load_hub_dataset(config), f"{source}[{config.split}]", checked)
        return
    filesystem, path = place
    files = _list_files(filesystem, path, source)
    with translate_read_errors(source):
        if any(filesystem.exists(posixpath.join(path, name)) for name in _SAVED_DATASET_FILES):
            yield from _read_saved_dataset(filesystem, path, config, checked)
            return
    for file in files if files == [path] else _choose_data_files(files, path, source, config.split):
        yield from _read_file(filesystem, file, _name_file(source, path, file), checked)


def _open_filesystem(source: str) -> tuple[Any, str]:
    """Return the filesystem of a source and the path in it; pyarrow opens object stores, as for runs."""
    if buckets.is_bucket(source):
        with translate_read_errors(source):
            store, path = buckets.open_bucket(source)
        return ArrowFSWrapper(store, skip_instance_cache=True), path
    try:
        return fsspec.url_to_fs(source)
    except ImportError as error:
        raise DataError(
            f"{format_source(source)}: a package that reads {source.partition('://')[0]}:// is missing "
            f"({error}); pip install it where the command runs"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{format_source(source)}: cannot be opened ({error}); give a path, an fsspec URI or a hub id"
        ) from error


def _detect_format(path: str) -> str | None:
    stem, extension = posixpath.splitext(path)
    if extension in COMPRESSIONS:
        extension = posixpath.splitext(stem)[1]
    return {".jsonl": "json", ".ndjson": "json", ".json": "json"}.get(extension) or (
        extension[1:] if extension in (".parquet", ".csv", ".tsv") else None
    )


def _read_file(filesystem: Any, path: str, place: str, checked: SourceConfig | None) -> Iterator[RowChunk]:
    """Yield the rows of one file, called `place` in messages."""
    kind, name = _detect_format(path), format_source(place)
    if kind is None:
        raise DataError(f"{name}: cannot tell the format from the name; name it as one of {FORMATS}")
    with translate_read_errors(place), open_file(filesystem, path) as file:
        if kind == "parquet":
            yield from read_parquet(file, name, checked)
        elif kind == "json":
            yield from read_json(file, name)
        else:
            yield from read_csv(file, name, "\t" if kind == "tsv" else ",")


def _read_saved_dataset(
    filesystem: Any, path: str, config: SourceConfig, checked: SourceConfig | None
) -> Iterator[RowChunk]:
    """Yield the rows of a local folder, mapped into memory, or of a temporary copy of a remote one."""
    if "://" not in config.source:
        yield from read_dataset(_load_saved_dataset(path, config), config.source, checked)
        return
    with tempfile.TemporaryDirectory(prefix="polyref-") as copy:
        filesystem.get(path.rstrip("/") + "/", f"{copy}/", recursive=True)
        yield from read_dataset(_load_saved_dataset(copy, config), format_source(config.source), checked)


def _load_saved_dataset(folder: str, config: SourceConfig) -> Any:
    import datasets  # heavy, and needed for this kind of source only

    try:
        loaded = datasets.load_from_disk(folder)
    except Exception as error:  # datasets checks no file, and what then fails may be anything
        raise DataError(
            f"{format_source(config.source)}: cannot be read as a data set of save_to_disk "
            f"({type(error).__name__}: {error!s:.300}); save it again"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    split = config.split
    if split not in loaded:
        raise DataError(
            f"{format_source(config.source)}: has no split {split!r}{suggest_name(split, list(loaded))}; "
            f"set data.split to one of {', '.join(loaded)}"
        )
    return loaded[split]


def _load_hub_dataset(config: SourceConfig) -> Any:
    import datasets

    source = config.source
    try:
        return datasets.load_dataset(source, name=config.subset, split=config.split, revision=config.revision)
    except (FileNotFoundError, ConnectionError) as error:
        raise DataError(
            f"{source}: is neither a file or folder here nor a data set that the hub gives ({error}); check "
            "the name, and the network or the access token"
        ) from error
    except ValueError as error:
        raise DataError(f"{source}: {error}; check data.subset, data.split and data.revision") from error


def _choose_data_files(files: list[str], path: str, source: str, split: str) -> list[str]:
    """Choose the data files of a folder: those of the split, if file names contain splits."""
    files = [file for file in files if _detect_format(file) and not _is_hidden(file, path)]
    source = format_source(source)
    if not files:
        raise DataError(f"{source}: the folder holds no data file; known are {FORMATS}")
    first_of = {_detect_format(file): posixpath.relpath(file, path) for file in reversed(files)}
    if len(first_of) > 1:
        raise DataError(
            f"{source}: the folder holds several formats, such as {' and '.join(first_of.values())}, "
            "and may say the same twice; name one of the files, or move those of one format elsewhere"
        )
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
