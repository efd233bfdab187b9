"""Files of tokenised pairs: built in several processes, found again, and never trusted when damaged."""

import json
import os
from pathlib import Path
from typing import Any

import loky
import numpy as np
import pytest

from preferences.config import DataConfig
from preferences.load import LoadedSplit, load_splits
from preferences.pairs import BadRow
from preferences.reading import formats
from preferences.tokens import pair_files
from preferences.tokens.fitting import Readers
from preferences.tokens.pair_files import is_examined
from preferences.tokens.rendering import Rendering
from tests.support import tiny

COUNT = 60


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    rows = rows or [
        {
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "chosen": [{"role": "assistant", "content": f"Yes {i}"}],
            "rejected": [{"role": "assistant", "content": "No"}],
            "soft_label": (i % 11) / 10,
        }
        for i in range(COUNT)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, folder: Path, *, template: str | None = None, **settings: Any) -> LoadedSplit:
    rendering = Rendering(tiny.byte_tokenizer(), chat_template=template)
    readers = Readers(DataConfig(train=str(path), **settings), rendering, {"base": rendering})
    return load_splits(readers, completions_only=False, seed=0, folder=folder)[0]


def read_all(loaded: LoadedSplit) -> list[Any]:
    split = loaded.split
    return [
        [
            split.places[i],
            split.soft_labels[i],
            split.policy[i].prompt.tolist(),
            split.policy[i].chosen.tolist(),
            split.references["base"][i].rejected.tolist(),  # type: ignore[union-attr]
        ]
        for i in range(len(split))
    ]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of 8 rows, of which other processes tokenise those after the first; returns their numbers."""
    started: list[int] = []
    real = loky.ProcessPoolExecutor

    def start(processes: int, **settings: Any) -> Any:
        started.append(processes)
        return real(processes, **settings)

    monkeypatch.setattr(formats, "CHUNK_ROWS", 8)
    monkeypatch.setattr(pair_files, "PARALLEL_FROM", 1)
    monkeypatch.setattr(loky, "cpu_count", lambda: 2)
    monkeypatch.setattr(loky, "ProcessPoolExecutor", start)
    return started


def refuse_to_tokenize(*_: Any) -> Any:
    raise AssertionError("the file was there")


def test_several_processes_build_what_one_does(tmp_path: Path, small_chunks: list[int]) -> None:
    path = write_rows(tmp_path / "a.jsonl")
    several = load(path, tmp_path / "several")
    assert small_chunks == [2]
    pair_files.PARALLEL_FROM = COUNT  # which the fixture puts back
    one = load(path, tmp_path / "one")
    assert small_chunks == [2]
    assert read_all(several) == read_all(one)
    assert (several.digest, several.token_digests) == (one.digest, one.token_digests)
    assert several.counts == one.counts
    assert len(several.split) == COUNT


def test_the_first_bad_row_is_named_whichever_process_meets_it(
    tmp_path: Path, small_chunks: list[int]
) -> None:
    rows = [{"prompt": f"Q{i}", "chosen": "a", "rejected": "a" if i in (30, 50) else "b"} for i in range(60)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(BadRow, match=r"a\.jsonl:31: chosen and rejected are the same"):
        load(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())  # nothing half-written
    skipped = load(path, tmp_path / "cache", on_bad_row="skip")
    assert skipped.counts["skipped"] == {"chosen equals rejected": 2}
    assert len(skipped.split) == 58


def test_a_second_start_tokenises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl")
    first = load(path, tmp_path / "cache")
    monkeypatch.setattr(pair_files, "tokenize_pairs", refuse_to_tokenize)
    again = load(path, tmp_path / "cache")
    assert read_all(again) == read_all(first)
    assert again.counts == first.counts
    # Limits that cut nothing, the seed and the share held out choose among the rows of the same file.
    assert len(load(path, tmp_path / "cache", max_length=800, eval_fraction=0.5).split) == COUNT // 2


@pytest.mark.parametrize(
    "change",
    [
        {"template": tiny.CHATML.replace("user", "User").replace("assistant", "Assistant")},
        {"on_long_row": "truncate"},
        {"columns": {"soft_label": None}},
        {"chat_template_kwargs": {"mood": "good"}},
        {"on_bad_row": "skip"},
        "content",
    ],
)
def test_whatever_tokens_depend_on_makes_another_file(tmp_path: Path, change: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl")
    load(path, tmp_path / "cache")
    if change == "content":
        path.write_text(path.read_text().replace("Yes 7", "Yes 8"))
    load(path, tmp_path / "cache", **({} if change == "content" else change))
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


def test_a_damaged_file_is_built_again(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl")
    expected = read_all(load(path, tmp_path / "cache"))
    (file,) = (tmp_path / "cache").glob("*.arrow")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()  # the mapping of the first file stays as it is
    file.write_bytes(data)
    assert read_all(load(path, tmp_path / "cache")) == expected
    file.with_suffix(".json").write_text("{")
    assert read_all(load(path, tmp_path / "cache")) == expected


def test_files_that_nobody_opens_are_deleted_in_time(tmp_path: Path) -> None:
    old, read = write_rows(tmp_path / "old.jsonl"), write_rows(tmp_path / "read.jsonl")
    for path in (old, read):
        load(path, tmp_path / "cache")
    for file in (tmp_path / "cache").iterdir():
        os.utime(file, (0, 0))
    load(read, tmp_path / "cache")
    load(write_rows(tmp_path / "new.jsonl"), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 4  # two files and their reports


def test_a_long_file_is_examined_sparsely_from_end_to_end() -> None:
    numbers = np.array([number for number in range(1, 1_000_001) if is_examined(number)])
    assert 450 <= len(numbers) <= 520
    assert (numbers > 500_000).sum() > 20
    assert numbers[:50].tolist() == list(range(1, 51))
