"""Rows that cannot be used: each is refused by one line that names its file, its line and what is wrong."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from preferences.reading import formats
from tests.support.bad_inputs import ROWS, Commands, Workplace

DEEP = "[" * 3000 + "]" * 3000
HALF = r"\ud83d"
LONG_NUMBER = "9" * 5000


def turn(content: Any, role: Any = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def row(**changes: Any) -> str:
    return json.dumps({"prompt": "Film is ", "chosen": "good.", "rejected": "dull!"} | changes)


def chat(**changes: Any) -> str:
    good = {
        "prompt": [turn("How?")],
        "chosen": [turn("So.", "assistant")],
        "rejected": [turn("No.", "assistant")],
    }
    return json.dumps(good | changes)


def tools(*given: Any) -> str:
    return chat(tools=list(given))


def nest(depth: int) -> Any:
    value: Any = "a"
    for _ in range(depth):
        value = {"a": value}
    return value


ROW_CASES: list[tuple[str, str | bytes, list[str]]] = [
    ("nested 3,000 deep", f'{{"prompt": {DEEP}}}', ["nested"]),
    ("nested 3,000 deep beside the fields", row()[:-1] + f', "other": {DEEP}}}', ["nested"]),
    ("nested 200 deep", row(other=nest(200)), ["nested"]),
    ("a tool nested 200 deep", tools(nest(200)), ["nested"]),
    ("a number of 5,000 digits", f'{{"prompt": {LONG_NUMBER}}}', ["digits"]),
    ("a label of 5,000 digits", row()[:-1] + f', "soft_label": {LONG_NUMBER}}}', ["digits"]),
    ("a label of 4,000 digits", row()[:-1] + f', "soft_label": {LONG_NUMBER[:4000]}}}', ["soft_label"]),
    ("a label of 1e999", row()[:-1] + ', "soft_label": 1e999}', ["soft_label", "inf"]),
    ("a label of Infinity", row()[:-1] + ', "soft_label": -Infinity}', ["soft_label", "inf"]),
    ("a label that is a list", row(soft_label=[1] * 5000), ["soft_label", "[1, 1"]),
    ("a label that is a long text", row(soft_label="x" * 9000), ["soft_label"]),
    ("a label that is true", row(soft_label=True), ["soft_label", "True"]),
    ("votes below 0", row(votes_chosen=-1, votes_rejected=2), ["votes_chosen", "-1"]),
    (
        "votes of 4,000 digits",
        row(votes_rejected=1)[:-1] + f', "votes_chosen": {LONG_NUMBER[:4000]}}}',
        ["votes"],
    ),
    ("half a votes", row(votes_chosen=0.5, votes_rejected=2), ["votes_chosen", "0.5"]),
    ("half a character in the prompt", row().replace("Film", HALF), [r"\ud83d", "half"]),
    ("half a character in a response", row().replace("good", HALF), [r"\ud83d", "half"]),
    ("half a character in a message", chat(chosen=[turn("X", "assistant")]).replace("X", HALF), ["half"]),
    ("half a character in a role", chat(prompt=[turn("a", "X")]).replace("X", HALF), ["half"]),
    ("half a character in a column's name", row(X=1).replace("X", HALF), ["half"]),
    ("half a character in a tool", tools({"name": "X"}).replace("X", HALF), ["half"]),
    ("the second half of a character", row().replace("good", r"\udc00"), [r"\udc00"]),
    ("a key twice", row()[:-1] + ', "chosen": "bad."}', ["'chosen'", "twice"]),
    (
        "a key twice in a message",
        chat().replace('"role": "user"', '"role": "user", "role": "x"', 1),
        ["'role'", "twice"],
    ),
    ("a byte that is not UTF-8", row().encode().replace(b"Film", b"\xff"), ["UTF-8"]),
    ("a BOM in the middle", b"\xef\xbb\xbf" + row().encode(), ["JSON"]),
    ("a surrogate in UTF-8", row().encode().replace(b"Film", b"\xed\xa0\x80"), ["UTF-8"]),
    ("UTF-16", row().encode("utf-16-be"), ["not"]),
    ("NUL bytes", bytes(40), ["not"]),
    ("two objects", row() + row(), ["JSON", "Extra data"]),
    ("cut", row()[:30], ["JSON", "column"]),
    ("single quotes", str(json.loads(row())), ["JSON", "quotes"]),
    ("a trailing comma", row()[:-1] + ",}", ["JSON"]),
    ("a comment", "// a comment", ["JSON"]),
    ("a text", '"text"', ["object"]),
    ("a number", "7", ["object"]),
    ("null", "null", ["object"]),
    ("nothing in it", "{}", ["chosen"]),
    ("all null", row(prompt=None, chosen=None, rejected=None), ["chosen"]),
    ("blanks only", row(prompt="  "), ["prompt"]),
    ("a prompt that is a number", row(prompt=5), ["prompt", "int"]),
    (
        "a response that is a number of 4,000 digits",
        row()[:-1].replace('"good."', LONG_NUMBER[:4000]) + "}",
        ["chosen"],
    ),
    ("a response that is a mapping", row(chosen={"a": 1}), ["chosen", "role"]),
    ("no message", chat(prompt=[]), ["prompt"]),
    ("a message that is a text", chat(prompt=["Why?"]), ["prompt[0]"]),
    ("a message without a role", chat(prompt=[{"content": "a"}]), ["prompt[0]", "role"]),
    ("a role that is a number", chat(prompt=[turn("a", 1)]), ["prompt[0]", "role"]),
    ("content that is a number", chat(prompt=[turn(1)]), ["prompt[0]", "content"]),
    (
        "content of an image",
        chat(prompt=[turn([{"type": "image_url", "image_url": "a"}])]),
        ["image_url", "text only"],
    ),
    ("content that is a mapping", chat(prompt=[turn({"a": 1})]), ["prompt[0]", "content"]),
    ("an answer by the user", chat(chosen=[turn("a")]), ["chosen", "assistant"]),
    ("an empty answer", chat(chosen=[turn(" ", "assistant")]), ["chosen", "empty"]),
    ("the prompt ends with the assistant", chat(prompt=[turn("a", "assistant")]), ["prompt", "assistant"]),
    ("tools that are a text", chat(tools="look"), ["tools"]),
    ("tools that are JSON nested deeply", chat(tools=DEEP), ["tools", "nested"]),
    ("tools that are JSON with half a character", chat(tools='[{"a": "\\ud800"}]'), ["tools", "half"]),
    ("tools that are numbers", tools(1, 2), ["tools"]),
    ("tools on text", row(tools=[{"name": "a"}]), ["tools", "messages"]),
    ("completions that are a text", row(completions="a", chosen=None, rejected=None), ["completions"]),
    ("one completion", row(completions=["a"], chosen=None, rejected=None), ["completions", "two"]),
    (
        "ranks that are texts",
        row(completions=["a", "b"], ranks=["x", "y"], chosen=None, rejected=None),
        ["ranks"],
    ),
    ("a list of everything", json.dumps([json.loads(row())]), ["object"]),
    ("a column's name of 10,000 letters", row(chosen=None, **{"x" * 10_000: 1}), ["chosen"]),
]


@pytest.mark.parametrize(("bad", "says"), [pytest.param(*case[1:], id=case[0]) for case in ROW_CASES])
def test_a_bad_row_is_refused_before_anything_else(
    workplace: Workplace, commands: Commands, bad: str | bytes, says: list[str]
) -> None:
    content = bad.encode() if isinstance(bad, str) else bad
    good = [json.dumps(each).encode() for each in ROWS]
    workplace.data.write_bytes(b"\n".join([*good[:2], content, *good[3:]]) + b"\n")
    commands.refuse("check", workplace.file, says=["pairs.jsonl:3: ", "on_bad_row: skip", *says])


TEXTS = {"prompt": "Film is ", "chosen": "good.", "rejected": "dull!"}
NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
)

FAR = pyarrow.array([2**62]).cast(pyarrow.timestamp("us"))
MAP = pyarrow.array([[("a", "b")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
ONE = pyarrow.array([1], pyarrow.decimal128(5, 2))

CELLS: list[tuple[str, Mapping[str, Any], list[str]]] = [
    ("bytes that are not UTF-8", {"chosen": NOT_UTF8}, ["row 1", "utf-8"]),
    (
        "a time beyond the calendar",
        {"soft_label": FAR},
        ["row 1"],
    ),
    ("bytes", {"chosen": [b"good."]}, ["chosen", "bytes"]),
    ("a number", {"prompt": [1.5]}, ["prompt", "float"]),
    ("a time", {"prompt": pyarrow.array([0]).cast(pyarrow.timestamp("s"))}, ["prompt", "datetime"]),
    ("a list of numbers", {"chosen": [[1, 2]]}, ["chosen[0]", "int"]),
    ("an empty list", {"chosen": pyarrow.array([[]], pyarrow.list_(pyarrow.string()))}, ["chosen"]),
    ("a mapping", {"chosen": [{"text": "good."}]}, ["chosen", "role"]),
    (
        "a map",
        {"chosen": MAP},
        ["chosen"],
    ),
    ("nulls", {"chosen": pyarrow.nulls(1)}, ["chosen", "missing"]),
    ("a label that is NaN", {"soft_label": [float("nan")]}, ["soft_label", "nan"]),
    (
        "a label that is a decimal",
        {"soft_label": ONE},
        ["soft_label"],
    ),
    ("text tools nested deeply", {"tools": [DEEP]}, ["tools", "nested"]),
]


@pytest.mark.parametrize(("columns", "says"), [pytest.param(*case[1:], id=case[0]) for case in CELLS])
def test_a_bad_cell_of_a_column_is_refused(
    workplace: Workplace, commands: Commands, columns: Mapping[str, Any], says: list[str]
) -> None:
    table = pyarrow.table({name: [text] for name, text in TEXTS.items()} | dict(columns))
    pyarrow.parquet.write_table(table, workplace.folder / "a.parquet")
    workplace.write_run(data={"train": "a.parquet"})
    commands.refuse("check", workplace.file, says=["a.parquet:row 1: ", *says])


CSV_CELLS = [
    ("JSON nested deeply", '[{"a":' * 2000, ["chosen", "nested"]),
    ("JSON that is cut", '[{"role": "assist', ["chosen", "JSON"]),
    ("JSON with half a character", '[{"role": "assistant", "content": "\\ud800"}]', ["chosen", "half"]),
    ("JSON with a key twice", '[{"role": "user", "role": "assistant"}]', ["chosen", "twice"]),
    ("JSON with a long number", f"[{{{LONG_NUMBER}", ["chosen"]),
    ("blanks", "   ", ["chosen", "empty"]),
]


@pytest.mark.parametrize(("cell", "says"), [pytest.param(*case[1:], id=case[0]) for case in CSV_CELLS])
def test_a_bad_cell_of_a_csv_file_is_refused(
    workplace: Workplace, commands: Commands, cell: str, says: list[str]
) -> None:
    quoted = cell.replace('"', '""')
    (workplace.folder / "a.csv").write_text(f'prompt,chosen,rejected\na,b,c\nd,"{quoted}",e\n')
    workplace.write_run(data={"train": "a.csv"})
    commands.refuse("check", workplace.file, says=["a.csv:3: ", *says])


def test_a_line_without_end_is_refused(
    workplace: Workplace, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "LONGEST_LINE", 1 << 20)
    with workplace.data.open("ab") as file:
        file.write(b" " * (1 << 20))
    commands.refuse("check", workplace.file, says=["pairs.jsonl:9", "longer than 1 MiB", "each line"])
