"""Random rows and damaged files: whatever they hold, they are read, or refused by an error with a message.

In CI each test takes some seconds. To search for ten minutes by hand, give each test more examples:

    POLYREF_FUZZ_EXAMPLES=20000 python -m pytest tests/bad_inputs/test_fuzz_rows.py --timeout 0

What a search finds is added to the test as an `@example`, and the reader mended.
"""

import gzip
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from models.config import ModelConfig, ModelError
from models.load import load_tokenizer, locate_model
from models.verify import verify_vocabulary, verify_weights
from preferences.config import SourceConfig
from preferences.load import load_pairs
from preferences.pairs import DataError
from preferences.tokens.pair_files import build_batch
from preferences.tokens.rendering import Rendering
from preferences.tokens.tokenize import TokenizationSettings, tokenize_pairs
from tests.support import tiny
from tests.support.bad_inputs import ROWS

FACTOR = int(os.environ.get("POLYREF_FUZZ_EXAMPLES", "0"))


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Return the settings of a fuzzing test that runs this many examples in CI."""
    return settings(
        max_examples=FACTOR or examples,
        deadline=None,
        derandomize=not FACTOR,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


TOKENIZATION = TokenizationSettings({"the policy": Rendering(tiny.byte_tokenizer())}, on_bad_row="skip")


def check_message(error: Exception, name: str) -> None:
    """Assert that a message names the file and can be printed."""
    message = str(error)
    assert name in message
    assert message.encode()


def read_source(name: str, content: bytes) -> None:
    """Read a file, and tokenise and store its pairs, as a run does; an error must be one with a message."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        for on_bad_row in ("stop", "skip"):
            try:
                pairs = load_pairs(SourceConfig(source=str(path)), on_bad_row=on_bad_row).pairs
                tokens = tokenize_pairs(pairs, TOKENIZATION, examined=range(len(pairs)))
                build_batch(pairs, tokens, completions_only=False)
            except DataError as error:
                check_message(error, name)


# ---- rows ----

FIELDS = """prompt chosen rejected context completion completions ranks scores soft_label votes_chosen
votes_rejected tools system input role content name x"""
NAMES = st.sampled_from(FIELDS.split())
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["good.", "\ud800", "\0", "[{", "1e400", "nan", " "]))
LEAVES = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.integers(min_value=2**64), TEXTS)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), LEAVES),
            "content": TEXTS,
        }
    ),
    max_size=3,
)
VALUES = st.one_of(
    TEXTS,
    MESSAGES,
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
        max_leaves=8,
    ),
)
RANDOM_ROWS = st.lists(st.dictionaries(NAMES, VALUES, max_size=6), min_size=1, max_size=4)


@fuzz(60)
@given(RANDOM_ROWS)
@example([{"prompt": "a", "chosen": "\ud800", "rejected": "b"}])
@example([{"prompt": "a", "chosen": "b", "rejected": "c", "soft_label": 10**400}])
def test_random_rows_of_json(rows: list[dict[str, Any]]) -> None:
    read_source("a.jsonl", "\n".join(json.dumps(row) for row in rows).encode())


@fuzz(40)
@given(st.lists(st.one_of(st.binary(max_size=40), st.just(json.dumps(ROWS[0]).encode())), max_size=4))
@example([b"\xff\xfe{\0}\0"])
@example([b"[" * 3000])
@example([b'{"chosen":' * 400 + b"1" + b"}" * 400])
@example([b'{"prompt": ' + b"9" * 5000 + b"}"])
def test_random_lines(lines: list[bytes]) -> None:
    read_source("a.jsonl", b"\n".join(lines))


@fuzz(40)
@given(st.lists(st.one_of(TEXTS, st.sampled_from(['"', '""', ",", "\r", '[{"role": "user"}]'])), max_size=12))
@example(["a,b\n", '"'])
@example(["prompt,chosen,rejected\n", "a,[{" * 3])
def test_random_csv(parts: list[str]) -> None:
    read_source("a.csv", "".join(["prompt,chosen,rejected\n", *parts]).encode("utf-8", "surrogatepass"))


@fuzz(40)
@given(RANDOM_ROWS)
@example([{"chosen": [{"role": "user", "content": "a"}], "rejected": []}])
def test_random_columns_of_parquet(rows: list[dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
        return  # rows that Parquet cannot hold
    read_source("a.parquet", buffer.getvalue())


# ---- damaged files ----


def damage(content: bytes, place: int, kind: str, filler: bytes) -> bytes:
    """Cut a file at a place, flip a byte there, insert bytes, or put them over what is there."""
    place %= len(content) + 1
    if kind == "cut":
        return content[:place]
    if kind == "flip" and place < len(content):
        return content[:place] + bytes([content[place] ^ (filler[0] | 1)]) + content[place + 1 :]
    kept = place + len(filler) if kind == "overwrite" else place
    return content[:place] + filler + content[kept:]


DAMAGE = st.tuples(
    st.integers(0, 1 << 20),
    st.sampled_from(["cut", "flip", "insert", "overwrite"]),
    st.binary(min_size=1, max_size=9),
)


def make_parquet(**options: Any) -> bytes:
    buffer = io.BytesIO()
    rows = [row | {"soft_label": 0.75, "tags": [{"a": "b"}]} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


GOOD_FILES = {
    "a.parquet": make_parquet(),
    "plain.parquet": make_parquet(compression="none", use_dictionary=False),
    "a.jsonl.gz": gzip.compress("\n".join(map(json.dumps, ROWS)).encode(), mtime=0),
    "a.jsonl.zst": pyarrow.compress("\n".join(map(json.dumps, ROWS)).encode(), "zstd", asbytes=True),
    "a.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
}


@pytest.mark.parametrize("name", GOOD_FILES)
@fuzz(50)
@given(DAMAGE)
@example((526, "flip", b"\x80"))
@example((2496, "flip", b"\x80"))
def test_a_damaged_data_file(name: str, spoilt: tuple[int, str, bytes]) -> None:
    read_source(name, damage(GOOD_FILES[name], *spoilt))


@pytest.fixture(scope="module")
def model_copy(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(tiny_llama_folder, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("model.safetensors", 30),
        ("config.json", 30),
        ("tokenizer.json", 20),
        ("tokenizer_config.json", 20),
    ],
)
def test_a_damaged_model_file(name: str, examples: int, model_copy: Path) -> None:
    file = model_copy / name
    content = file.read_bytes()
    # Of the weights, only the header is read before training.
    length = 8 + int.from_bytes(content[:8], "little") if name.endswith("safetensors") else len(content)

    @fuzz(examples)
    @given(DAMAGE)
    def find_model(spoilt: tuple[int, str, bytes]) -> None:
        place, kind, filler = spoilt
        file.write_bytes(damage(content, place % length, kind, filler))
        config = ModelConfig(model=str(model_copy))
        try:
            located = locate_model(config)
            token_ids = verify_weights(located, config)
            tokenizer = load_tokenizer(located, config)
            verify_vocabulary(tokenizer, token_ids, config)
            rendering = Rendering(tokenizer)
            rendering.encode(["Film is good."])
        except (ModelError, DataError) as error:
            check_message(error, str(model_copy))

    try:
        find_model()
    finally:
        file.write_bytes(content)
