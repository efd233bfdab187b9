"""The score store: per reference fingerprint a folder of immutable Parquet files, which is read into memory.

In memory a score takes 36 bytes (sorted keys with three columns, found by bisection), a fifth of what a
dictionary of tuples takes: ten million responses fit in 0.4 GB. Scores of this process are first added to a
small dictionary, until there are enough of them to be worth sorting into the rest.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import xxhash
from numpy.typing import ArrayLike, NDArray

from orchestrator.files import describe_free_space, is_disk_full, replace_file
from orchestrator.references.messages import KEY_BYTES, Keys, Score, ScoreKind, Scores, ScoringError
from preferences import buckets

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("logp", pa.float64(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("entropy", pa.float64(), nullable=False),
    ]
)
_FINGERPRINT_KEY = b"polyref.fingerprint"
_MERGE_THRESHOLD = 65536
_READER_THREADS = 8
_CHECKED_PREFIX = "scores-"
"""A file with this prefix has the XXH3 of its bytes in its name; files from before that have random names."""


def digest_response(prompt_ids: ArrayLike, response_ids: ArrayLike) -> bytes:
    """Return the 16 bytes that identify a prompt's response: BLAKE2b of prompt length and all token ids."""
    prompt = np.ascontiguousarray(prompt_ids, dtype="<i4")
    digest = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=KEY_BYTES)
    digest.update(prompt.tobytes())
    digest.update(np.ascontiguousarray(response_ids, dtype="<i4").tobytes())
    return digest.digest()


class ScoreStore:
    """Scores of one reference under `<uri>/scores/<fingerprint>/`.

    Files are named by a digest of their bytes and never changed, so any number of processes may write at the
    same time; a response scored twice is kept once. A file that is not what was written (cut short, a bit
    flipped) is set aside as `<file>.damaged` with a warning and its responses are scored again: recomputing
    scores is cheap, a stopped run is not. For use in one thread, except that `flush` may run in another.

    Args:
        uri: a path or a pyarrow URI.
        fingerprint: the reference's fingerprint.
        kind: what a score is.

    Raises:
        ScoringError: the store cannot be opened.
    """

    def __init__(
        self, uri: str | os.PathLike[str], fingerprint: str, *, kind: ScoreKind = "log-prob"
    ) -> None:
        self._fingerprint, self._kind = fingerprint.encode(), kind
        try:
            self._filesystem, root = buckets.open_bucket(resolve_storage(uri))
            self.folder = f"{root.rstrip('/')}/scores/{fingerprint}"
            parts = self._read_files()
        except (OSError, pa.ArrowException) as error:
            place = buckets.redact_uri(os.fspath(uri))
            raise ScoringError(f"the score store under {place} cannot be opened: {error}") from error
        self._sorted_keys, self._sorted = _merge_columns(parts)
        self._recent: dict[bytes, Score] = {}
        self._unsaved: dict[bytes, Score] = {}
        self._save_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sorted_keys) + len(self._recent)

    @property
    def unsaved(self) -> int:
        """Number of scores that are in no file yet."""
        return len(self._unsaved)

    def find_known(self, keys: Keys) -> NDArray[np.bool_]:
        """(S,): whether each of the keys (S, 16) has a score."""
        return ~self.lookup(keys).missing

    def lookup(self, keys: Keys) -> Scores:
        """Return the scores of the keys (S, 16), NaN where unknown. The caller may write to the arrays."""
        found = Scores.unknown(len(keys))
        strings = _to_strings(keys)
        places = np.searchsorted(self._sorted_keys, strings)
        places[places == len(self._sorted_keys)] = 0
        hits = self._sorted_keys[places] == strings if len(self._sorted_keys) else np.zeros(len(keys), bool)
        for column, source in zip(_get_columns(found), _get_columns(self._sorted), strict=True):
            column[hits] = source[places[hits]]
        if self._recent:
            for index in np.flatnonzero(~hits).tolist():
                score = self._recent.get(keys[index].tobytes())
                if score is not None:
                    found[index] = score
        return found

    def get(self, key: bytes) -> Score | None:
        """Return one score, or None if it is unknown."""
        found = self.lookup(np.frombuffer(key, dtype=np.uint8).reshape(1, KEY_BYTES))
        return None if found.missing[0] else found[0]

    def put(self, key: bytes, score: Score) -> None:
        """Add a score; one that is already known is not changed.

        Raises:
            ScoringError: the score is not finite, or cannot be one of its kind.
        """
        if not _build_columns({key: score})[1].find_possible(self._kind)[0]:
            raise ScoringError(f"a score that cannot be a {self._kind} cannot be stored: {score}")
        if key not in self._recent and self.get(key) is None:
            with self._save_lock:
                self._recent[key] = self._unsaved[key] = score

    def flush(self) -> int:
        """Write the unsaved scores to one new file and return how many. On failure they stay unsaved."""
        with self._save_lock:
            unsaved, self._unsaved = self._unsaved, {}
        if not unsaved:
            return 0
        try:
            self._write_file(unsaved)
        except (OSError, pa.ArrowException) as error:
            with self._save_lock:
                self._unsaved = unsaved | self._unsaved
            if is_disk_full(error):
                free = describe_free_space(Path(self.folder).parents[1])
                raise ScoringError(
                    f"a disk is full: scores cannot be written to {self.folder}; {free}; make room there, "
                    "and the same command resumes"
                ) from error
            raise ScoringError(f"scores cannot be written to {self.folder}: {error}") from error
        return len(unsaved)

    def merge_recent(self) -> None:
        """Sort recent scores into the rest once there are many; does nothing when there are few."""
        if len(self._recent) >= max(_MERGE_THRESHOLD, len(self._sorted_keys) // 4):
            recent = _build_columns(self._recent)
            self._sorted_keys, self._sorted = _merge_columns([(self._sorted_keys, self._sorted), recent])
            self._recent = {}

    def _write_file(self, scores: dict[bytes, Score]) -> None:
        keys, columns = _build_columns(scores)
        buffer = pa.py_buffer(keys.tobytes())
        table = pa.table(
            [
                pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, buffer]),
                columns.logps,
                columns.lengths.astype(np.int32),
                columns.entropies,
            ],
            schema=_SCHEMA.with_metadata({_FINGERPRINT_KEY: self._fingerprint}),
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        content = sink.getvalue()
        name = f"{_CHECKED_PREFIX}{xxhash.xxh3_128_hexdigest(content)}.parquet"
        self._filesystem.create_dir(self.folder, recursive=True)
        if self._filesystem.type_name != "local":
            # An object appears whole or not at all when it is closed, and cannot be renamed.
            with self._filesystem.open_output_stream(f"{self.folder}/{name}") as file:
                file.write(content)
            return
        with replace_file(Path(self.folder, name)) as temporary:
            temporary.write_bytes(content)

    def _read_files(self) -> list[tuple[NDArray[np.bytes_], Scores]]:
        entries = self._filesystem.get_file_info(pafs.FileSelector(self.folder, allow_not_found=True))
        paths = sorted(e.path for e in entries if e.is_file and e.extension == "parquet")
        with ThreadPoolExecutor(_READER_THREADS) as readers:
            return [part for part in readers.map(self._read_file, paths) if part is not None]

    def _read_file(self, path: str) -> tuple[NDArray[np.bytes_], Scores] | None:
        with self._filesystem.open_input_stream(path) as file:
            content = file.read()
        name = path.rpartition("/")[2]
        if name.startswith(_CHECKED_PREFIX) and xxhash.xxh3_128_hexdigest(content) not in name:
            self._set_aside(path, "its bytes are not those that were written")
            return None
        try:
            table = pq.ParquetFile(pa.BufferReader(content)).read()
        except (OSError, pa.ArrowException) as error:
            self._set_aside(path, str(error))
            return None
        metadata = table.schema.metadata or {}
        if not table.schema.equals(_SCHEMA) or metadata.get(_FINGERPRINT_KEY) != self._fingerprint:
            logger.warning(
                "%s is skipped: it does not hold scores of reference %s", path, self._fingerprint.decode()
            )
            return None
        column = table["key"].combine_chunks()
        keys = np.frombuffer(column.buffers()[1], dtype=f"S{KEY_BYTES}")[column.offset :][: len(column)]
        logps, lengths, entropies = (table[name].to_numpy() for name in ("logp", "length", "entropy"))
        scores = Scores(logps, lengths.astype(np.int64), entropies)
        possible = scores.find_possible(self._kind)
        if not possible.all():
            logger.warning("%s: %d scores cannot be right and are made again", path, np.sum(~possible))
        return keys[possible], Scores(*(column[possible] for column in _get_columns(scores)))

    def _set_aside(self, path: str, reason: str) -> None:
        """Rename a damaged file, so that it is read by nobody and can still be looked at."""
        logger.warning("%s is set aside as .damaged and its scores are made again: %s", path, reason)
        try:
            self._filesystem.move(path, f"{path}.damaged")
        except (OSError, pa.ArrowException) as error:  # another process did it, or the store is read-only
            logger.warning("%s cannot be renamed: %s", path, error)


def resolve_storage(uri: str | os.PathLike[str]) -> str:
    """Return a URI unchanged, and a path made absolute here, because actors run in other working folders."""
    text = os.fspath(uri)
    return text if "://" in text else str(Path(text).resolve())


def _to_strings(keys: Keys) -> NDArray[np.bytes_]:
    """Convert (S, 16) bytes to (S,) fixed-width strings, which numpy sorts and bisects (with zero bytes)."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").reshape(-1)


def _get_columns(scores: Scores) -> tuple[NDArray, NDArray, NDArray]:
    return scores.logps, scores.lengths, scores.entropies


def _build_columns(scores: dict[bytes, Score]) -> tuple[NDArray[np.bytes_], Scores]:
    keys = np.frombuffer(b"".join(scores), dtype=f"S{KEY_BYTES}")
    logps, lengths, entropies = zip(*scores.values(), strict=True)
    columns = Scores(np.array(logps), np.array(lengths, dtype=np.int64), np.array(entropies))
    return keys, columns


def _merge_columns(parts: Iterable[tuple[NDArray[np.bytes_], Scores]]) -> tuple[NDArray[np.bytes_], Scores]:
    """Merge parts into one, sorted by key; the first score of a key that occurs twice is kept."""
    parts = [(np.zeros(0, dtype=f"S{KEY_BYTES}"), Scores.unknown(0)), *parts]
    keys, first = np.unique(np.concatenate([keys for keys, _ in parts]), return_index=True)
    columns = zip(*(_get_columns(scores) for _, scores in parts), strict=True)
    return keys, Scores(*(np.concatenate(column)[first] for column in columns))
