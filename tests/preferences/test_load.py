import csv
import gzip
import json
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pandas
import pytest

from preferences.config import DataConfig
from preferences.load import load_pairs, load_splits
from preferences.pairs import BadRow, DataError
from preferences.tokens.fitting import Readers
from preferences.tokens.pair_files import digest_pair
from preferences.tokens.rendering import Rendering
from tests.support import tiny
from tests.support.bucket import Bucket, object_store

ROWS = [
    {"prompt": f"Question {i}?", "chosen": f'Answer {i}, with "quotes"\nand a line.', "rejected": f"No {i} é"}
    for i in range(5)
]
CHAT = [
    {
        "prompt": [{"role": "system", "content": "Short."}, {"role": "user", "content": f"Q{i}"}],
        "chosen": [{"role": "assistant", "content": "A"}],
        "rejected": [{"role": "assistant", "content": "B"}],
        "soft_label": i / 4,
    }
    for i in range(5)
]


def write_jsonl(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(source, *, completions_only=False, split=None, **config):
    settings = DataConfig(train=str(source), **config)
    (source,) = settings.train_sources
    if split is not None:
        source = source.model_copy(update={"split": split})
    return load_pairs(source, completions_only=completions_only, on_bad_row=settings.on_bad_row)


def list_says(loaded):
    return [digest_pair(pair) for pair in loaded.pairs]


def list_texts(pairs):
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs.pairs]


EXPECTED = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]


# ---- formats ----


def write_csv(path: Path, delimiter=",") -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "lines.json": write_jsonl,
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "array.jsonl": lambda path: path.write_text(json.dumps(ROWS)),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + write_jsonl(path).read_bytes()),
    "a.jsonl.gz": write_gz,
    "a.csv": write_csv,
    "a.tsv": lambda path: write_csv(path, "\t"),
    "a.parquet": lambda path: pandas.DataFrame(ROWS).to_parquet(path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_says_the_same(tmp_path, name):
    WRITERS[name](tmp_path / name)
    loaded = load(tmp_path / name)
    assert list_texts(loaded) == EXPECTED
    assert list_says(loaded) == list_says(load(write_jsonl(tmp_path / "plain.jsonl")))
    assert not loaded.has_soft_labels
    assert (loaded.swapped, sum(loaded.skipped.values())) == (0, 0)


def test_messages_are_the_same_from_columns(tmp_path):
    """Columnar files give every message every key; a null key must not reach the template."""
    rows = json.loads(json.dumps(CHAT))
    rows[0]["prompt"][0]["name"] = "boss"
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    expected = load(write_jsonl(tmp_path / "a.jsonl", rows))
    for source in ("a.parquet", "saved"):
        assert list_texts(load(tmp_path / source)) == list_texts(expected)
    assert [pair.soft_label for pair in expected.pairs] == [1.0, 0.75, 0.5, 0.75, 1.0]
    assert expected.swapped == 2
    assert expected.has_soft_labels


def test_messages_in_csv_are_json(tmp_path):
    rows = [{name: json.dumps(value) for name, value in row.items()} for row in CHAT]
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv")  # with its unnamed index column
    assert list_texts(load(tmp_path / "a.csv")) == list_texts(load(write_jsonl(tmp_path / "a.jsonl", CHAT)))
    pandas.DataFrame(CHAT).to_csv(tmp_path / "b.csv")  # as Python prints them
    with pytest.raises(BadRow, match=r"b.csv:2: prompt looks like a message list and is not valid JSON"):
        load(tmp_path / "b.csv")


def test_uri():
    with fsspec.open("memory://polyref/a.jsonl", "w") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list_texts(load("memory://polyref/a.jsonl")) == EXPECTED
    assert list_texts(load("memory://polyref")) == EXPECTED


@pytest.fixture(scope="module")
def store():
    with object_store() as environment:
        yield environment


@pytest.fixture
def bucket(store, monkeypatch):
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    return Bucket()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.tsv", "a.parquet", "splits"])
def test_an_object_store_says_the_same(bucket, tmp_path, name):
    WRITERS[name](tmp_path / name)
    for file in sorted(path for path in (tmp_path, *tmp_path.rglob("*")) if path.is_file()):
        bucket.put(f"data/{file.relative_to(tmp_path)}", file.read_bytes())
    near, far = load(tmp_path / name), load(f"{bucket.uri}/data/{name}")
    assert list_texts(far) == EXPECTED
    assert list_says(far) == list_says(near)
    places = [pair.source.replace(str(tmp_path), f"{bucket.uri}/data") for pair in near.pairs]
    assert [pair.source for pair in far.pairs] == places


def test_an_object_stores_folder_and_rows_are_named(bucket, tmp_path):
    for number in (1, 0):
        bucket.put(
            f"data/part-{number}.jsonl",
            write_jsonl(tmp_path / "a.jsonl", ROWS[number : number + 1]).read_bytes(),
        )
    loaded = load(f"{bucket.uri}/data?region=us-east-1")
    assert list_texts(loaded) == EXPECTED[:2]
    assert loaded.pairs[0].source == f"{bucket.uri}/data/part-0.jsonl:1"
    bucket.put("data/part-2.jsonl", b'{"prompt": "Q", "chosen": "a", "rejected": "b"}\n{"prompt":\n')
    with pytest.raises(BadRow) as refused:
        load(f"{bucket.uri}/data")
    assert str(refused.value).startswith(f"{bucket.uri}/data/part-2.jsonl:2: the line is not valid JSON")


def test_an_object_store_that_gives_nothing(bucket, monkeypatch):
    with pytest.raises(DataError, match=r"s3://bucket-\w+/train.jsonl: there is no such file or folder"):
        load(f"{bucket.uri}/train.jsonl")
    with pytest.raises(DataError, match=r"s3://no-such-bucket/a.jsonl: there is no such file or folder"):
        load("s3://no-such-bucket/a.jsonl")
    with pytest.raises(
        DataError, match=r"abfss://c/a.jsonl: cannot be read \(.*account name\); check the name"
    ):
        load("abfss://c/a.jsonl")
    with pytest.raises(
        DataError, match=r"az://c/a.jsonl: a package .* is missing \(Install adlfs .*pip install"
    ):
        load("az://c/a.jsonl")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError) as refused:
        load(f"s3://someone:hidden@{bucket.name}/a.jsonl?region=us-east-1")
    assert str(refused.value).startswith(f"{bucket.uri}/a.jsonl: cannot be read (")
    assert "AWS_ACCESS_KEY_ID" in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_folder_of_files_in_order_of_name(tmp_path):
    write_jsonl(tmp_path / "part-1.jsonl", ROWS[2:])
    write_jsonl(tmp_path / "part-0.jsonl", ROWS[:2])
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "_SUCCESS.json").write_text("")
    loaded = load(tmp_path)
    assert list_texts(loaded) == EXPECTED
    assert loaded.pairs[0].source == f"{tmp_path}/part-0.jsonl:1"


def test_folder_with_splits(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train-00000.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "data" / "test-00000.jsonl", ROWS[3:])
    assert list_texts(load(tmp_path)) == EXPECTED[:3]
    assert list_texts(load(tmp_path, split="test")) == EXPECTED[3:]
    with pytest.raises(DataError, match=r"has no file of split 'val'; set data.split to one of test, train"):
        load(tmp_path, split="val")


def test_hub_id(monkeypatch):
    received = {}

    def load_dataset(path, **kwargs):
        received.update(kwargs, path=path)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load("org/prefs", subset="en", revision="abc", split="train[:5]")
    assert received == {"path": "org/prefs", "name": "en", "split": "train[:5]", "revision": "abc"}
    assert list_texts(loaded) == EXPECTED
    assert loaded.pairs[2].source == "org/prefs[train[:5]]:row 3"


def test_places(tmp_path):
    rows = "\n".join(["", json.dumps(ROWS[0]), "", json.dumps(ROWS[1])])
    (tmp_path / "a.jsonl").write_text(rows)
    assert [pair.source for pair in load(tmp_path / "a.jsonl").pairs] == [
        f"{tmp_path}/a.jsonl:{n}" for n in (2, 4)
    ]
    write_csv(tmp_path / "a.csv")  # every row takes two lines
    assert [pair.source for pair in load(tmp_path / "a.csv").pairs] == [
        f"{tmp_path}/a.csv:{n}" for n in (2, 4, 6, 8, 10)
    ]


def test_a_response_may_be_longer_than_csvs_own_limit(tmp_path):
    limit = csv.field_size_limit()
    pandas.DataFrame([{**ROWS[0], "chosen": "x" * 200_000}]).to_csv(tmp_path / "a.csv", index=False)
    assert len(load(tmp_path / "a.csv").pairs[0].chosen) == 200_000
    assert csv.field_size_limit() == limit


# ---- columns ----


def test_columns_are_mapped(tmp_path):
    rows = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "id": 1} for row in ROWS]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert list_texts(load(write_jsonl(tmp_path / "a.jsonl", rows), columns=columns)) == EXPECTED
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    assert list_texts(load(tmp_path / "a.parquet", columns=columns)) == EXPECTED


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_a_misspelt_field_stops_with_every_way_out(tmp_path, name):
    rows = [{**row, "soft_lable": 0.7, "score_chosen": 3, "model": "x"} for row in ROWS]
    writers = {".jsonl": lambda p: write_jsonl(p, rows), ".parquet": pandas.DataFrame(rows).to_parquet}
    writers[".csv"] = lambda p: pandas.DataFrame(rows).to_csv(p, index=False)
    path = tmp_path / name
    writers[path.suffix](path)
    with pytest.raises(DataError) as refused:
        load(path, on_bad_row="skip")  # the remedy is in the run file: skipping rows would hide it
    message = str(refused.value)
    assert message.startswith(str(path))
    assert "column 'soft_lable' is nearly 'soft_label'" in message
    assert "data.columns: {soft_label: soft_lable}" in message
    assert "data.ignore: [soft_lable]" in message
    assert list_texts(load(path, ignore="soft_l*")) == EXPECTED
    assert load(path, columns={"soft_label": "soft_lable"}).pairs[0].soft_label == 0.7


def test_columns_that_carry_no_field_pass(tmp_path):
    others = ["id", "prompt_id", "source", "_row", "messages", "score_chosen", "rejected_score", "ranking"]
    others += ["chosen_model", "chosen-rating", "rationale", "completion_a", "tool", "content", "label"]
    rows = [{**row, **dict.fromkeys(others, "x")} for row in ROWS]
    assert list_texts(load(write_jsonl(tmp_path / "a.jsonl", rows))) == EXPECTED


# ---- refusals ----

GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", f"{GOOD}\n{{'prompt'", "a.jsonl:2: the line is not valid JSON (Expecting property name"),
        ("a.jsonl", f"{GOOD}\n[1]\n", "a.jsonl:2: a row must be an object like"),
        ("a.jsonl", GOOD.encode() + b'\n{"prompt": "\xff"}', "a.jsonl:2: the line is not UTF-8 text"),
        ("a.jsonl", f'{GOOD}\n\n{{"prompt": "Q", "chosen": "a"}}', "a.jsonl:3: rejected is missing or empty"),
        (
            "a.json",
            f'[{GOOD}, {{"prompt": "Q", "chosen": "a", "rejected": "a"}}]',
            "a.json:row 2: chosen and rejected",
        ),
        ("a.csv", "prompt,chosen,rejected\nQ,a,b\nQ,a\n", "a.csv:3: the row has 2 cells, the header 3"),
        ("a.csv", "prompt,chosen,rejected\nQ,a,b\nQ,,b\n", "a.csv:3: chosen is missing or empty"),
        (
            "a.csv",
            "prompt,chosen,rejected,soft_label\nQ,a,b,\nQ,a,b,2\n",
            "a.csv:3: soft_label must be a number from 0 to 1",
        ),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadRow) as refused:
        load(path)
    assert str(refused.value).startswith(f"{tmp_path}/{message}")
    assert str(refused.value).endswith("fix the row, or set data.on_bad_row: skip to leave such rows out")
    skipping = load(path, on_bad_row="skip")
    assert len(skipping.pairs) == 1
    assert list(skipping.skipped.values()) == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"prompt,chosen,rejected\n", "holds no rows"),
        ("a.json", b'[\n{"prompt": 1,\n}]', ":3: the JSON array is not valid"),
        ("a.json", b'[\n"\xff"]', ":2: the file is not UTF-8 text"),
        ("a.csv", b'prompt,chosen,rejected\nQ,"a" b,c\n', ":2: not valid CSV"),
        ("a.csv", b"prompt,chosen,rejected\nQ,a,\xff\n", ":2: the line is not UTF-8 text"),
        ("a.csv", b"prompt,chosen,chosen\nQ,a,b\n", ":1: column 'chosen' appears twice"),
        ("a.parquet", b"PAR1 not really", "cannot be read as Parquet"),
        ("a.txt", b"words", "cannot tell the format from the name"),
    ],
)
def test_a_source_that_cannot_be_used_stops_in_any_case(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        load(path, on_bad_row="skip")
    assert str(refused.value).startswith(str(path))
    assert message in str(refused.value)


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"train.jsonl: there is no such file or folder"):
        load(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="cannot be opened"):
        load("nonsense://x/y.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no data file"):
        load(tmp_path / "empty")
    WRITERS["splits"](tmp_path / "splits")
    with pytest.raises(
        DataError, match=r"has no split 'tests' \(did you mean 'test'\?\); set data.split to one of"
    ):
        load(tmp_path / "splits", split="tests")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match="no-such/prefs: is neither a file or folder here nor a data set that the hub"
    ):
        load("no-such/prefs")


def test_skipped_rows_are_counted_by_reason(tmp_path):
    rows = [*ROWS, {"prompt": "Q", "chosen": "a"}, {**ROWS[0], "chosen": ""}, {**ROWS[0], "chosen": " "}]
    loaded = load(write_jsonl(tmp_path / "a.jsonl", rows), on_bad_row="skip")
    assert dict(loaded.skipped) == {"missing field": 1, "empty text": 2}
    with pytest.raises(
        DataError, match=r"no row is left, all were skipped \(2 empty text, 1 missing field\)"
    ):
        load(write_jsonl(tmp_path / "b.jsonl", rows[5:]), on_bad_row="skip")


# ---- digest and splits ----

TOKENIZER = tiny.byte_tokenizer()


def splits(path, folder, seed=0, **config):
    settings = DataConfig(train=path if isinstance(path, list) else str(path), **config)
    readers = Readers(settings, Rendering(TOKENIZER), {})
    return load_splits(readers, completions_only=False, seed=seed, folder=folder)


def read_prompts(loaded):
    return [TOKENIZER.decode(prompt) for prompt in loaded.split.policy.prompts]


def test_the_digest_is_of_content_and_order(tmp_path):
    def digest(name, rows):
        return splits(write_jsonl(tmp_path / name, rows), tmp_path / "cache")[0].digest

    expected = digest("a.jsonl", ROWS)
    assert digest("moved.jsonl", ROWS) == expected
    assert digest("c.jsonl", ROWS[::-1]) != expected
    assert digest("d.jsonl", ROWS[:-1]) != expected
    assert digest("e.jsonl", [*ROWS[:-1], {**ROWS[-1], "soft_label": 0.9}]) != expected
    shifted = [
        {"prompt": "ab", "chosen": "c", "rejected": "d"},
        {"prompt": "a", "chosen": "bc", "rejected": "d"},
    ]
    first, second = (splits(write_jsonl(tmp_path / "f.jsonl", [row]), tmp_path)[0] for row in shifted)
    assert first.digest != second.digest
    assert first.token_digests != second.token_digests


def test_a_fraction_is_held_out_by_prompt(tmp_path):
    rows = [{"prompt": f"Q{i % 20}", "chosen": f"a{i}", "rejected": "b"} for i in range(100)]
    train, held = splits(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, eval_fraction=0.2)
    assert len(held.split) == 20
    assert len(train.split) + len(held.split) == 100
    assert not set(read_prompts(train)) & set(read_prompts(held))
    again = splits(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), tmp_path, eval_fraction=0.2)[1]
    assert set(read_prompts(again)) == set(read_prompts(held))
    other = splits(tmp_path / "a.jsonl", tmp_path, seed=1, eval_fraction=0.2)[1]
    assert set(read_prompts(other)) != set(read_prompts(held))
    assert len({train.digest, held.digest, other.digest}) == 3


def test_held_out_prompts_need_two(tmp_path):
    rows = [{"prompt": "Q", "chosen": f"a{i}", "rejected": "b"} for i in range(4)]
    with pytest.raises(DataError, match=r"eval_fraction: all pairs have the same prompt, .* data.eval"):
        splits(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, eval_fraction=0.5)


def test_held_out_pairs_by_name(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    expected = [row["prompt"] for row in ROWS]
    assert splits(path, tmp_path)[1] is None
    held = splits(path, tmp_path, eval=str(write_jsonl(tmp_path / "b.jsonl", ROWS[:2])))[1]
    assert read_prompts(held) == expected[:2]
    WRITERS["splits"](tmp_path / "splits")
    train, held = splits(tmp_path / "splits", tmp_path, eval_split="test")
    assert (read_prompts(train), read_prompts(held)) == (expected, expected[:1])


def test_named_sets_are_held_out_one_after_the_other(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    sets = {"first": str(write_jsonl(tmp_path / "b.jsonl", ROWS[:2])), "all": {"source": str(path)}}
    _, held = splits(path, tmp_path, eval=sets)
    assert held.split.source_names == ("first", "all")
    assert held.split.source_index.tolist() == [0, 0] + [1] * len(ROWS)
    assert held.split.places[0] == f"{tmp_path}/b.jsonl:1"
    assert held.split.places[2] == f"{path}:1"
    assert held.counts["sources"] == {"first": 2, "all": len(ROWS)}


# ---- mixtures ----


def write_source(path, count):
    rows = [{"prompt": f"{path.stem} {i}", "chosen": f"a{i}", "rejected": "b"} for i in range(count)]
    return str(write_jsonl(path, rows))


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        (({}, {}), (60, 30)),
        (({"share": 1}, {"share": 1}), (30, 30)),
        (({"share": 0.8}, {"share": 0.2}), (60, 15)),
        (({"share": 3}, {"share": 1, "cap": 10}), (30, 10)),
        (({"count": 7}, {"cap": 20}), (7, 20)),
        (({"count": 7}, {}), (7, 30)),
    ],
)
def test_a_mixture_takes_of_each_source_what_its_settings_say(tmp_path, settings, taken):
    sources = [
        {"source": write_source(tmp_path / f"{name}.jsonl", count), **own}
        for name, count, own in zip("xy", (60, 30), settings, strict=True)
    ]
    train, _ = splits(sources, tmp_path)
    assert tuple(np.bincount(train.split.source_index)) == taken
    prompts = read_prompts(train)
    assert len(set(prompts)) == len(prompts)  # none twice
    assert [prompt[0] for prompt in prompts] == ["x"] * taken[0] + ["y"] * taken[1]
    assert train.counts["sources"] == dict(zip("xy", taken, strict=True))


def test_which_pairs_a_mixture_takes_depends_on_the_seed_and_not_on_their_order(tmp_path):
    path = tmp_path / "x.jsonl"
    sources = [{"source": write_source(path, 50), "count": 20}]
    first, again, other = (set(read_prompts(splits(sources, tmp_path, seed)[0])) for seed in (0, 0, 1))
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert first == again == set(read_prompts(splits(sources, tmp_path)[0]))
    assert first != other


def test_more_pairs_than_a_source_has_are_refused(tmp_path):
    sources = [{"source": write_source(tmp_path / "x.jsonl", 5), "count": 6}]
    with pytest.raises(DataError, match="x has 5 pairs that can be used, and count asks for 6"):
        splits(sources, tmp_path)


def test_a_source_may_read_its_columns_in_its_own_way(tmp_path):
    odd = [{"prompt": "p", "better": "a", "worse": "b"}]
    sources = [
        write_source(tmp_path / "x.jsonl", 2),
        {
            "source": str(write_jsonl(tmp_path / "odd.jsonl", odd)),
            "columns": {"chosen": "better", "rejected": "worse"},
        },
    ]
    assert read_prompts(splits(sources, tmp_path)[0]) == ["x 0", "x 1", "p"]


def test_weights_are_read_and_not_all_zero(tmp_path):
    rows = [{**row, "n": i} for i, row in enumerate(ROWS)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert splits(path, tmp_path, weight="n")[0].split.weights.tolist() == [0, 1, 2, 3, 4]
    assert splits(path, tmp_path)[0].split.weights is None
    with pytest.raises(DataError, match=r"b\.jsonl: all weights \(n, data.weight\) are 0"):
        splits(path, tmp_path, weight="n", eval=str(write_jsonl(tmp_path / "b.jsonl", rows[:1])))
