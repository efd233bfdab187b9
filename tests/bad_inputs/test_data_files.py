"""Data files and folders that cannot be read as they are named: each is refused by one line."""

import bz2
import gzip
import json
import lzma
import os
import socket
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.support.bad_inputs import ROWS, Commands, Workplace

GOOD = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
LONG = "x" * 300


def write_parquet(file: Path, table: pyarrow.Table | None = None) -> bytes:
    table = pyarrow.Table.from_pylist(ROWS) if table is None else table
    pyarrow.parquet.write_table(table, file, compression="none", write_page_checksum=True)
    return file.read_bytes()


def flip(content: bytes, place: int) -> bytes:
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def spoil_parquet(file: Path, spoil: Callable[[bytes], bytes]) -> None:
    file.write_bytes(spoil(write_parquet(file)))


def save_dataset(folder: Path, spoil: Callable[[Path], object]) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    spoil(folder)


def find_arrow(folder: Path) -> Path:
    return next(folder.glob("*.arrow"))


def cut(file: Path, share: float = 0.5) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def bind_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # a socket's whole path may have 108 characters
    try:
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
        server.close()
    finally:
        os.close(folder)


def link_in_a_circle(folder: Path) -> None:
    (folder / "a.jsonl").symlink_to("b.jsonl")
    (folder / "b.jsonl").symlink_to("a.jsonl")


def fill_folder(folder: Path, **files: bytes) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)


Spoil = Callable[[Path], object]

FILES: list[tuple[str, str, Spoil, list[str]]] = [
    # name, source in the working folder, how it is made there, words of the message
    ("missing", "none.jsonl", lambda f: None, ["none.jsonl", "no such file or folder"]),
    ("empty", "a.jsonl", lambda f: f.write_bytes(b""), ["a.jsonl", "no row"]),
    ("blank lines", "a.jsonl", lambda f: f.write_bytes(b"\n \n\n"), ["a.jsonl", "no row"]),
    ("UTF-16", "a.jsonl", lambda f: f.write_bytes(GOOD.decode().encode("utf-16")), ["a.jsonl", "UTF-8"]),
    (
        "UTF-16 CSV",
        "a.csv",
        lambda f: f.write_bytes("prompt,chosen\n".encode("utf-16")),
        ["a.csv:1", "UTF-8"],
    ),
    ("zeros", "a.jsonl", lambda f: f.write_bytes(bytes(100)), ["a.jsonl"]),
    ("PNG", "a.jsonl", lambda f: f.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)), ["a.jsonl", "UTF-8"]),
    ("array cut", "a.json", lambda f: f.write_bytes(b'[{"prompt": "a"'), ["a.json:1", "not valid"]),
    ("array nested", "a.json", lambda f: f.write_bytes(b"[" * 100_000), ["a.json", "nested"]),
    ("array UTF-16", "a.json", lambda f: f.write_bytes("[1]".encode("utf-16")), ["a.json", "UTF-8"]),
    (
        "array with a long number",
        "a.json",
        lambda f: f.write_bytes(b"[" + b"9" * 5000 + b"]"),
        ["a.json", "digits"],
    ),
    ("text named gz", "a.jsonl.gz", lambda f: f.write_bytes(GOOD), ["a.jsonl.gz", "gzip"]),
    ("text named bz2", "a.jsonl.bz2", lambda f: f.write_bytes(GOOD), ["a.jsonl.bz2"]),
    ("text named xz", "a.jsonl.xz", lambda f: f.write_bytes(GOOD), ["a.jsonl.xz"]),
    ("text named zst", "a.jsonl.zst", lambda f: f.write_bytes(GOOD), ["a.jsonl.zst"]),
    ("text named lz4", "a.jsonl.lz4", lambda f: f.write_bytes(GOOD), ["a.jsonl.lz4", "name it"]),
    ("text named zip", "a.jsonl.zip", lambda f: f.write_bytes(GOOD), ["a.jsonl.zip", "name it"]),
    ("cut gz", "a.jsonl.gz", lambda f: (f.write_bytes(gzip.compress(GOOD)), cut(f)), ["a.jsonl.gz"]),
    ("cut bz2", "a.jsonl.bz2", lambda f: (f.write_bytes(bz2.compress(GOOD)), cut(f)), ["a.jsonl.bz2"]),
    ("cut xz", "a.jsonl.xz", lambda f: (f.write_bytes(lzma.compress(GOOD)), cut(f)), ["a.jsonl.xz"]),
    (
        "gz with a flipped byte",
        "a.jsonl.gz",
        lambda f: f.write_bytes(flip(gzip.compress(GOOD), 30)),
        ["a.jsonl.gz"],
    ),
    (
        "gz with a wrong checksum",
        "a.jsonl.gz",
        lambda f: f.write_bytes(flip(gzip.compress(GOOD), -6)),
        ["a.jsonl.gz"],
    ),
    ("gz of a Parquet", "a.jsonl.gz", lambda f: f.write_bytes(gzip.compress(b"PAR1\xff")), ["a.jsonl.gz"]),
    ("empty gz", "a.csv.gz", lambda f: f.write_bytes(b""), ["a.csv.gz", "no row"]),
    (
        "CSV with an open quote",
        "a.csv",
        lambda f: f.write_text('prompt,chosen\n"a,b\nc,d\n'),
        ["a.csv", "CSV"],
    ),
    ("CSV with a NUL", "a.csv", lambda f: f.write_bytes(b"prompt,chosen\na,b\0\n"), ["a.csv:2", "NUL"]),
    ("CSV header with a NUL", "a.csv", lambda f: f.write_bytes(b"prompt,ch\0\na,b\n"), ["a.csv:1", "NUL"]),
    ("CSV of one column", "a.csv", lambda f: f.write_bytes(b"text\na\nb\n"), ["a.csv", "chosen"]),
    ("CSV without a name", "a.csv", lambda f: f.write_bytes(b",,\na,b,c\n"), ["a.csv:1"]),
    ("Parquet, empty", "a.parquet", lambda f: f.write_bytes(b""), ["a.parquet", "Parquet"]),
    ("Parquet, text", "a.parquet", lambda f: f.write_bytes(GOOD), ["a.parquet", "Parquet"]),
    ("Parquet, cut", "a.parquet", lambda f: (write_parquet(f), cut(f)), ["a.parquet", "Parquet"]),
    (
        "Parquet, flipped in the footer",
        "a.parquet",
        lambda f: spoil_parquet(f, lambda c: flip(c, -8 - int.from_bytes(c[-8:-4], "little"))),
        ["a.parquet", "Parquet"],
    ),
    (
        "Parquet, flipped length of the footer",
        "a.parquet",
        lambda f: spoil_parquet(f, lambda c: flip(c, -6)),
        ["a.parquet", "Parquet"],
    ),
    (
        "Parquet, flipped in a page",
        "a.parquet",
        lambda f: spoil_parquet(f, lambda c: flip(c, c.index(b"good."))),
        ["a.parquet", "Parquet"],
    ),
    (
        "Parquet, no rows",
        "a.parquet",
        lambda f: write_parquet(f, pyarrow.Table.from_pylist(ROWS)[:0]),
        ["a.parquet", "no row"],
    ),
    (
        "Parquet, no columns",
        "a.parquet",
        lambda f: write_parquet(f, pyarrow.table({})),
        ["a.parquet", "no row"],
    ),
    (
        "Parquet of numbers",
        "a.parquet",
        lambda f: write_parquet(f, pyarrow.table({"prompt": [1], "chosen": [2], "rejected": [3]})),
        ["a.parquet", "no row"],
    ),
    (
        "Parquet of bytes",
        "a.parquet",
        lambda f: write_parquet(
            f, pyarrow.table({"prompt": [b"a"], "chosen": [b"\xff"], "rejected": [b"c"]})
        ),
        ["a.parquet", "no row"],
    ),
    (
        "Parquet with a column twice",
        "a.parquet",
        lambda f: write_parquet(
            f, pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["chosen", "chosen", "rejected"])
        ),
        ["a.parquet", "'chosen'", "twice"],
    ),
    (
        "save_to_disk without its arrow file",
        "saved",
        lambda f: save_dataset(f, lambda g: find_arrow(g).unlink()),
        ["saved"],
    ),
    (
        "save_to_disk with a cut arrow file",
        "saved",
        lambda f: save_dataset(f, lambda g: cut(find_arrow(g))),
        ["saved"],
    ),
    (
        "save_to_disk with an empty arrow file",
        "saved",
        lambda f: save_dataset(f, lambda g: find_arrow(g).write_bytes(b"")),
        ["saved"],
    ),
    (
        "save_to_disk with a text as arrow file",
        "saved",
        lambda f: save_dataset(f, lambda g: find_arrow(g).write_bytes(GOOD)),
        ["saved"],
    ),
    (
        "save_to_disk with a broken state.json",
        "saved",
        lambda f: save_dataset(f, lambda g: (g / "state.json").write_text('{"_data')),
        ["saved"],
    ),
    (
        "save_to_disk with an empty state.json",
        "saved",
        lambda f: save_dataset(f, lambda g: (g / "state.json").write_text("{}")),
        ["saved"],
    ),
    (
        "save_to_disk with a list as state.json",
        "saved",
        lambda f: save_dataset(f, lambda g: (g / "state.json").write_text("[]")),
        ["saved"],
    ),
    (
        "save_to_disk without dataset_info.json",
        "saved",
        lambda f: save_dataset(f, lambda g: (g / "dataset_info.json").unlink()),
        ["saved"],
    ),
    (
        "save_to_disk with a broken dataset_info.json",
        "saved",
        lambda f: save_dataset(f, lambda g: (g / "dataset_info.json").write_text("{")),
        ["saved"],
    ),
    (
        "save_to_disk of splits that are not there",
        "saved",
        lambda f: fill_folder(f, dataset_dict_json=b'{"splits": ["train"]}'.replace(b"_", b"_")),
        ["saved"],
    ),
    ("link that points to itself", "a.jsonl", lambda f: f.symlink_to(f), ["a.jsonl"]),
    ("links in a circle", "a.jsonl", lambda f: link_in_a_circle(f.parent), ["a.jsonl"]),
    ("link to nothing", "a.jsonl", lambda f: f.symlink_to("nothing"), ["a.jsonl", "no such file"]),
    ("folder that links to itself", "loop", lambda f: (f.mkdir(), (f / "loop").symlink_to(f)), ["loop"]),
    ("empty folder", "folder", lambda f: f.mkdir(), ["folder", "no data file"]),
    ("folder of other files", "folder", lambda f: fill_folder(f, readme_md=b"", a_txt=b""), ["no data file"]),
    (
        "folder of mixed formats",
        "folder",
        lambda f: fill_folder(f, a_jsonl=GOOD, b_csv=b"prompt,chosen,rejected\na,b,c\n"),
        ["folder", "a.jsonl", "b.csv"],
    ),
    ("folder with an empty file", "folder", lambda f: fill_folder(f, a_jsonl=b"", b_jsonl=b""), ["no row"]),
    ("FIFO", "a.jsonl", os.mkfifo, ["a.jsonl", "pipe"]),
    ("FIFO as Parquet", "a.parquet", os.mkfifo, ["a.parquet", "pipe"]),
    (
        "FIFO in a folder",
        "folder",
        lambda f: (f.mkdir(), os.mkfifo(f / "a.jsonl")),
        ["a.jsonl", "pipe"],
    ),
    ("socket", "a.jsonl", bind_socket, ["a.jsonl", "socket"]),
    ("link to /dev/zero", "a.jsonl", lambda f: f.symlink_to("/dev/zero"), ["a.jsonl", "device"]),
    ("link to /dev/null", "a.jsonl", lambda f: f.symlink_to("/dev/null"), ["a.jsonl", "device"]),
    ("/dev/zero", "/dev/zero", lambda f: None, ["/dev/zero", "device"]),
    ("/dev/stdin", "/dev/tty", lambda f: None, ["/dev/tty"]),
    ("without an extension", "a", lambda f: f.write_bytes(GOOD), ["cannot tell the format"]),
    ("folder named .jsonl", "a.jsonl", lambda f: f.mkdir(), ["a.jsonl", "no data file"]),
    ("name of 300 characters", f"{LONG}.jsonl", lambda f: None, ["no such file"]),
    ("path of 5,000 characters", f"/{'x/' * 2500}a.jsonl", lambda f: None, ["no such file"]),
    ("NUL in the path", "a\0.jsonl", lambda f: None, ["no such file"]),
    ("home of nobody", "~nouser/a.jsonl", lambda f: None, ["~nouser"]),
    ("file below a file", "b.jsonl/a.jsonl", lambda f: f.parent.write_bytes(GOOD), ["b.jsonl/a.jsonl"]),
    ("empty name", "", lambda f: None, ["empty"]),
    ("blank name", " ", lambda f: None, ["empty"]),
    ("unknown scheme", "gopher://host/a.jsonl", lambda f: None, ["gopher"]),
    ("Windows path", r"C:\data\pairs.jsonl", lambda f: None, [r"C:\data"]),
    ("URL without a host", "http://", lambda f: None, ["http://"]),
    ("control characters", "a\x1b[31m.jsonl", lambda f: None, ["a"]),
]


@pytest.mark.parametrize(("source", "make", "says"), [pytest.param(*case[1:], id=case[0]) for case in FILES])
def test_data_files_are_refused(
    workplace: Workplace, commands: Commands, source: str, make: Spoil, says: list[str]
) -> None:
    make(workplace.folder / source)
    commands.refuse("data", "show", source, says=says)


def test_an_unreadable_file(workplace: Workplace, commands: Commands) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    workplace.data.chmod(0)
    commands.refuse("data", "show", workplace.data, says=["pairs.jsonl", "permission"])
