"""The score store without Ray: what goes in comes out, whoever writes and whatever files lie there."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.references import store as store_module
from orchestrator.references.messages import Score, ScoringError
from orchestrator.references.store import ScoreStore, digest_response

ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
scores = st.builds(
    Score,
    logp=st.floats(max_value=0, allow_nan=False, allow_infinity=False),
    length=st.integers(0, 2**31 - 1),
    entropy=st.floats(0, 1),
)


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")  # many zero bytes: the hard case for fixed-width strings


def columns(keys: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16)


@given(ids, ids, ids, ids)
@settings(deadline=None, max_examples=200)
def test_keys_are_equal_only_for_equal_prompt_and_response(a, b, c, d):
    assert (digest_response(a, b) == digest_response(c, d)) == ((a, b) == (c, d))


def test_key_sees_the_border_between_prompt_and_response_and_no_dtype():
    assert digest_response([1, 2], [3]) != digest_response([1], [2, 3])
    assert digest_response([1, 2], [3]) == digest_response(
        np.array([1, 2], np.int64), np.array([3], np.uint8)
    )
    assert len(digest_response([], [])) == 16


@given(st.dictionaries(st.binary(min_size=16, max_size=16), scores, max_size=8), st.integers(0, 8))
@settings(deadline=None, max_examples=50)
def test_round_trip_through_memory_and_files(tmp_path_factory, content, flushed):
    folder = tmp_path_factory.mktemp("store")
    store = ScoreStore(folder, "abc")
    for number, (name, score) in enumerate(content.items()):
        if number == flushed:
            store.flush()
        store.put(name, score)
    assert len(store) == len(content)
    assert {name: store.get(name) for name in content} == content
    assert store.flush() <= len(content)
    assert store.unsaved == 0
    again = ScoreStore(folder, "abc")
    assert len(again) == len(content)
    assert {name: again.get(name) for name in content} == content


def test_lookup_mixes_files_memory_and_unknown(tmp_path):
    first = ScoreStore(tmp_path, "abc")
    first.put(key(256), Score(-1.5, 3, 0.5))
    first.flush()
    store = ScoreStore(tmp_path, "abc")
    store.put(key(1), Score(-2.5, 4, 0.25))
    found = store.lookup(columns([key(1), key(0), key(256), key(1)]))
    assert found.missing.tolist() == [False, True, False, False]
    assert found[0] == found[3] == Score(-2.5, 4, 0.25)
    assert found[2] == Score(-1.5, 3, 0.5)
    assert store.find_known(columns([key(7), key(256)])).tolist() == [False, True]
    assert store.get(key(9)) is None


def test_the_first_of_two_scores_is_kept(tmp_path):
    store = ScoreStore(tmp_path, "abc")
    store.put(key(1), Score(-1.0, 1, 0.1))
    store.put(key(1), Score(-2.0, 2, 0.2))
    assert store.get(key(1)) == Score(-1.0, 1, 0.1)
    assert store.flush() == 1


def test_two_writers_merge_and_files_never_change(tmp_path):
    left, right = ScoreStore(tmp_path, "abc"), ScoreStore(tmp_path, "abc")
    for number in (1, 2):
        left.put(key(number), Score(-float(number), number, 0.5))
    for number in (2, 3):
        right.put(key(number), Score(-float(number), number, 0.5))
    left.flush()
    before = {path: path.read_bytes() for path in Path(left.folder).iterdir()}
    right.flush()
    merged = ScoreStore(tmp_path, "abc")
    assert len(merged) == 3
    assert merged.get(key(2)) == Score(-2.0, 2, 0.5)
    assert len(list(Path(left.folder).iterdir())) == 2
    assert all(path.read_bytes() == content for path, content in before.items())


def test_fingerprints_do_not_mix(tmp_path):
    store = ScoreStore(tmp_path, "abc")
    store.put(key(1), Score(-1.0, 1, 0.1))
    store.flush()
    assert len(ScoreStore(tmp_path, "abd")) == 0
    (file,) = Path(store.folder).iterdir()
    assert file.parent == tmp_path / "scores" / "abc"
    assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("damage", ["cut", "empty", "other fingerprint", "other columns"])
def test_a_bad_file_is_skipped_with_a_warning(tmp_path, caplog, damage):
    store = ScoreStore(tmp_path, "abc")
    store.put(key(1), Score(-1.0, 1, 0.1))
    store.flush()
    (good,) = Path(store.folder).iterdir()
    bad = good.with_name("bad.parquet")
    if damage == "cut":  # and of a name without a digest
        bad.write_bytes(good.read_bytes()[:-20])
    elif damage == "empty":
        bad.write_bytes(b"")
    elif damage == "other fingerprint":
        other = ScoreStore(tmp_path, "other")
        other.put(key(2), Score(-1.0, 1, 0.1))
        other.flush()
        next(Path(other.folder).iterdir()).rename(bad)
    else:
        pq.write_table(pq.read_table(good).select(["key", "logp"]), bad)
    with caplog.at_level(logging.WARNING):
        again = ScoreStore(tmp_path, "abc")
    assert len(again) == 1
    assert "bad.parquet" in caplog.text


def test_a_bit_that_flipped_is_noticed_wherever_it_is(tmp_path):
    """Every byte of a file, one at a time: the score is right or unknown, and the file is set aside."""
    store = ScoreStore(tmp_path, "abc")
    store.put(key(1), Score(-1.0, 1, 0.1))
    store.flush()
    (file,) = Path(store.folder).iterdir()
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        assert len(ScoreStore(tmp_path, "abc")) == 0
        assert [path.name for path in Path(store.folder).iterdir()] == [f"{file.name}.damaged"]
    file.write_bytes(content)
    assert ScoreStore(tmp_path, "abc").get(key(1)) == Score(-1.0, 1, 0.1)


def test_scores_in_files_without_a_digest_are_read_and_those_that_cannot_be_are_not(tmp_path):
    store = ScoreStore(tmp_path, "abc")
    store.put(key(1), Score(-1.0, 1, 0.1))
    store.flush()
    (file,) = Path(store.folder).iterdir()
    table = pq.read_table(file)
    columns = {
        "key": [key(number) for number in range(1, 5)],
        "logp": [-1.0, 3.0, -1.0, -1.0],
        "length": [1, 1, 1, -1],
        "entropy": [0.1, 0.1, 1.5, 0.1],
    }
    pq.write_table(pa.table(columns, schema=table.schema), file.with_name("0123.parquet"))
    file.unlink()
    again = ScoreStore(tmp_path, "abc")
    assert (len(again), again.get(key(1))) == (1, Score(-1.0, 1, 0.1))


def test_unfinished_files_of_a_killed_writer_are_not_read(tmp_path, caplog):
    folder = tmp_path / "scores" / "abc"
    folder.mkdir(parents=True)
    (folder / ".0123.parquet.7.part").write_bytes(b"PAR1")
    assert len(ScoreStore(tmp_path, "abc")) == 0
    assert not caplog.records


def test_a_failed_save_keeps_the_scores(tmp_path):
    store = ScoreStore(tmp_path, "abc")
    store.put(key(1), Score(-1.0, 1, 0.1))
    (tmp_path / "scores").write_text("in the way")
    with pytest.raises(ScoringError, match="cannot be written"):
        store.flush()
    assert store.unsaved == 1
    (tmp_path / "scores").unlink()
    assert store.flush() == 1
    assert ScoreStore(tmp_path, "abc").get(key(1)) == Score(-1.0, 1, 0.1)


@pytest.mark.parametrize(
    "score", [Score(float("nan"), 1, 0.1), Score(-1.0, 1, float("inf")), Score(2.0, 1, 0.1)]
)
def test_only_scores_that_can_be_are_stored(tmp_path, score):
    with pytest.raises(ScoringError, match="cannot be"):
        ScoreStore(tmp_path, "abc").put(key(1), score)


def test_uris_are_pyarrows(tmp_path):
    store = ScoreStore(tmp_path.as_uri(), "abc")
    store.put(key(1), Score(-1.0, 1, 0.1))
    store.flush()
    assert ScoreStore(tmp_path, "abc").get(key(1)) == Score(-1.0, 1, 0.1)
    with pytest.raises(ScoringError, match="nosuch://"):
        ScoreStore("nosuch://bucket", "abc")


def test_many_recent_scores_are_sorted_into_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_MERGE_THRESHOLD", 4)
    store = ScoreStore(tmp_path, "abc")
    for number in range(10):
        store.put(key(number * 77), Score(-float(number), number, 0.5))
        store.merge_recent()
    assert len(store) == 10
    assert all(store.get(key(n * 77)) == Score(-float(n), n, 0.5) for n in range(10))
    assert store.flush() == 10
