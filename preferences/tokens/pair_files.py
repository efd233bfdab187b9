"""Build the file of a source's tokenised pairs in all cores, and find it again while nothing has changed."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import loky
import pyarrow
import pyarrow.ipc
import xxhash

from preferences.config import SourceConfig
from preferences.pairs import BadRow, DataError, Pair
from preferences.reading.formats import RowChunk
from preferences.reading.rows import build_pairs
from preferences.reading.sources import digest_source, read_chunks
from preferences.tokens.tables import DIGEST, IDS, PairFile, digest_tokens
from preferences.tokens.tokenize import TokenizationSettings, TokenizedPairs, tokenize_pairs

KEPT_DAYS = 30
PARALLEL_FROM = 4
"""Chunks that this process tokenises by itself before it starts others, which takes some seconds."""
MOST_PROCESSES = 32
"""However many cores there are: a process takes 100 MB."""

Progress = Callable[[int], None]
"""Called with the number of rows read so far."""


@dataclass(frozen=True)
class FileSettings:
    """Everything that the file of a source's pairs depends on, besides the source's content.

    Attributes:
        source: the source and how its rows are read.
        tokenization: the models' renderings and limits.
        completions_only: whether rejected responses are left out.
    """

    source: SourceConfig
    tokenization: TokenizationSettings
    completions_only: bool

    def digest(self, content: str) -> str:
        """Return a digest of the settings, the content, and the code that makes tokens of them."""
        tokenization = self.tokenization
        source = self.source.model_dump(mode="json", exclude={"name", "share", "count", "cap"})
        parts = [
            content,
            source,
            self.completions_only,
            tokenization.on_bad_row,
            tokenization.truncate_to,
            tokenization.template_kwargs,
            [rendering.identity for rendering in tokenization.renderings.values()],
            [[number, size] for number, (_, size) in sorted(tokenization.vocabularies.items())],
            _digest_code(),
        ]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass
class FileReport:
    """What was counted while the rows of a source were read.

    Attributes:
        rows: rows read.
        skipped: rows left out, by reason, because they make no pair.
        first_skipped: what is wrong with the first of them, by reason.
        examined: pairs examined for a token over the boundary of prompt and response.
        boundary_merges: by rendering's place, the pairs among them that have one.
    """

    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)
    examined: int = 0
    boundary_merges: dict[str, list[str]] = field(default_factory=dict)

    def add(self, other: "FileReport") -> None:
        """Add what was counted in another part of the source."""
        self.rows += other.rows
        self.skipped += other.skipped
        self.first_skipped = other.first_skipped | self.first_skipped
        self.examined += other.examined
        for key, places in other.boundary_merges.items():
            self.boundary_merges.setdefault(key, []).extend(places)


@dataclass(frozen=True)
class BuiltFile:
    """The tokenised pairs of a source: where the file is, what is in it, and what was counted."""

    path: Path
    checksum: str
    pairs: PairFile
    report: FileReport


def open_pair_file(settings: FileSettings, folder: Path, *, progress: Progress | None = None) -> BuiltFile:
    """Return the file of a source's tokenised pairs; it is built unless the folder has it.

    Files that nothing has opened for `KEPT_DAYS` are deleted when another is built.

    Raises:
        DataError: the source cannot be read, or has no usable row.
        BadRow: the first row that cannot be used, unless such rows are skipped.
    """
    path = folder / f"{settings.digest(digest_source(settings.source))}.arrow"
    built = _read_built_file(path)
    if built is None:
        folder.mkdir(parents=True, exist_ok=True)
        # Two commands may build the same file at once; whichever ends last replaces an equal one.
        temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.part")
        try:
            report = _write_pairs(settings, temporary, progress)
            checksum = compute_checksum(temporary)
            report_text = json.dumps({"checksum": checksum, **vars(report)})
            temporary.replace(path)
            temporary.write_text(report_text)
            temporary.replace(path.with_suffix(".json"))
        finally:
            temporary.unlink(missing_ok=True)
        built = BuiltFile(path, checksum, open_pairs(path), report)
        _delete_unused_files(folder)
    os.utime(path)
    return built


def _delete_unused_files(folder: Path) -> None:
    # A killed command leaves a part; one that is written changes every few seconds.
    oldest_days = dict.fromkeys(folder.glob("*.arrow"), KEPT_DAYS) | dict.fromkeys(folder.glob(".*.part"), 1)
    for path, days in oldest_days.items():
        with contextlib.suppress(FileNotFoundError):  # another command deletes too
            if path.stat().st_mtime < time.time() - days * 86_400:
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink()


def _read_built_file(path: Path) -> BuiltFile | None:
    """Read a file of pairs and its report; None if there is none, or it is not what was written."""
    try:
        fields = json.loads(path.with_suffix(".json").read_text())
        checksum = fields.pop("checksum")
        if checksum != compute_checksum(path):
            return None
        report = FileReport(**fields | {"skipped": Counter(fields["skipped"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return BuiltFile(path, checksum, open_pairs(path), report)


def compute_checksum(path: Path) -> str:
    """Return a fast checksum of a file's content, which shows damage."""
    checksum = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum.update(block)
    return checksum.hexdigest()


def open_pairs(path: Path) -> PairFile:
    """Map a file of tokenised pairs into memory."""
    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
    batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    return PairFile(batches, completions_only="rejected_0" not in reader.schema.names)


def _write_pairs(settings: FileSettings, path: Path, progress: Progress | None) -> FileReport:
    """Write the pairs of a source and return what was counted."""
    schema = _build_schema(len(settings.tokenization.renderings), completions_only=settings.completions_only)
    report, pairs = FileReport(), 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        for batch, counted in _tokenize_chunks(settings, read_chunks(settings.source)):
            report.add(counted)
            pairs += batch.num_rows
            if batch.num_rows:
                writer.write_batch(batch)
            if progress is not None:
                progress(report.rows)
    if not pairs:
        reason = describe_skipped(report.skipped) or "holds no rows; check data.train and data.eval"
        raise DataError(f"{settings.source.source}: {reason}")
    return report


def _build_schema(renderings: int, *, completions_only: bool) -> pyarrow.Schema:
    columns = {
        "place": pyarrow.string(),
        "pair_digest": DIGEST,
        "prompt_digest": DIGEST,
        "soft_label": pyarrow.float64(),
        "weight": pyarrow.float64(),
        "swapped": pyarrow.bool_(),
        "truncated": pyarrow.bool_(),
        "problem": pyarrow.string(),
    }
    texts = ("prompt", "chosen") if completions_only else ("prompt", "chosen", "rejected")
    for number in range(renderings):
        columns |= {f"{text}_{number}": IDS for text in texts} | {f"digest_{number}": DIGEST}
    return pyarrow.schema(list(columns.items()))


# ---- chunks, in this process or others ----


def _tokenize_chunks(
    settings: FileSettings, chunks: Iterator[RowChunk]
) -> Iterator[tuple[pyarrow.RecordBatch, FileReport]]:
    """Yield the tokenised pairs of every chunk in order; a long source is tokenised in all cores."""
    yield from (tokenize_chunk(settings, chunk) for chunk in islice(chunks, PARALLEL_FROM))
    processes = min(loky.cpu_count(), MOST_PROCESSES)
    if processes == 1 or (chunk := next(chunks, None)) is None:
        yield from (tokenize_chunk(settings, chunk) for chunk in chunks)
        return
    executor = loky.ProcessPoolExecutor(processes, initializer=_start_process, initargs=(settings,))
    waiting: deque[Future[tuple[pyarrow.RecordBatch, FileReport]]] = deque()
    try:
        for later in chain([chunk], chunks):
            waiting.append(executor.submit(_tokenize_in_process, later))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(kill_workers=True)


_settings_of_process: FileSettings | None = None


def _start_process(settings: FileSettings) -> None:
    global _settings_of_process  # set once, when a process starts
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _settings_of_process = settings


def _tokenize_in_process(chunk: RowChunk) -> tuple[pyarrow.RecordBatch, FileReport]:
    assert _settings_of_process is not None
    return tokenize_chunk(_settings_of_process, chunk)


def tokenize_chunk(settings: FileSettings, chunk: RowChunk) -> tuple[pyarrow.RecordBatch, FileReport]:
    """Parse, check, render and tokenise the rows of a chunk."""
    report = FileReport(rows=len(chunk))
    pairs: list[Pair] = []
    examined: list[int] = []
    for number, (place, row) in enumerate(chunk.parse_checked_rows(settings.source), start=chunk.first):
        try:
            if isinstance(row, BadRow):
                raise row
            if is_examined(number):
                examined.append(len(pairs))
            pairs += build_pairs(row, place, settings.source, completions_only=settings.completions_only)
        except BadRow as bad:
            if settings.tokenization.on_bad_row == "stop":
                raise
            report.skipped[bad.reason] += 1
            report.first_skipped.setdefault(bad.reason, f"{bad.place}: {bad.detail}")
    examined = [index for index in examined if index < len(pairs)]
    tokenized = tokenize_pairs(pairs, settings.tokenization, examined=examined)
    report.examined = len(examined)
    report.boundary_merges = {
        str(number): places for number, places in enumerate(tokenized.boundary_merges.values()) if places
    }
    return build_batch(pairs, tokenized, completions_only=settings.completions_only), report


def is_examined(number: int) -> bool:
    """Return whether the pair of this row of a file, counted from 1, is one of a sample of its pairs.

    The first 64 are, and 32 of every doubling after that: about 500 of a million.
    """
    return number % (1 << max(0, number.bit_length() - 6)) == 0


def build_batch(
    pairs: Sequence[Pair], tokenized: TokenizedPairs, *, completions_only: bool
) -> pyarrow.RecordBatch:
    """Build the columns of a `PairFile` for these pairs."""
    columns: dict[str, Any] = {
        "place": [pair.source for pair in pairs],
        "pair_digest": [digest_pair(pair) for pair in pairs],
        "prompt_digest": [_digest_json(pair.prompt) for pair in pairs],
        "soft_label": [pair.soft_label for pair in pairs],
        "weight": [pair.weight for pair in pairs],
        "swapped": [pair.swapped for pair in pairs],
        "truncated": [index in tokenized.truncated for index in range(len(pairs))],
        "problem": tokenized.problems,
    }
    for number, (prompts, chosen, rejected) in enumerate(tokenized.columns.values()):
        texts = {"prompt": prompts, "chosen": chosen} | ({} if completions_only else {"rejected": rejected})
        columns |= {f"{name}_{number}": ids for name, ids in texts.items()}
        rows = zip(*texts.values(), strict=True)
        columns[f"digest_{number}"] = [digest_tokens(prompt, responses) for prompt, *responses in rows]
    schema = _build_schema(len(tokenized.columns), completions_only=completions_only)
    return pyarrow.record_batch([pyarrow.array(columns[f.name], f.type) for f in schema], schema=schema)


def digest_pair(pair: Pair) -> bytes:
    """Return a digest of what a pair says: texts, label, tools and weight, whatever its place."""
    return _digest_json([pair.prompt, pair.chosen, pair.rejected, pair.soft_label, pair.tools, pair.weight])


def _digest_json(value: Any) -> bytes:
    # ASCII, because a lone surrogate, which JSON input may contain, has no UTF-8 encoding
    return hashlib.blake2b(json.dumps(value, separators=(",", ":")).encode(), digest_size=16).digest()


def describe_skipped(skipped: Counter[str]) -> str | None:
    """Say that no row is left and why; None if no row was skipped."""
    if not skipped:
        return None
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    return f"no row is left, all were skipped ({reasons}); data.on_bad_row: stop shows the first one in full"


@cache
def _digest_code() -> str:
    """Return a digest of the code that makes tokens of rows: this package, and the libraries' versions."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("transformers", "tokenizers", "jinja2"):
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
