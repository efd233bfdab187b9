"""What `make install` installs: one version of everything, each file with its hash."""

import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
ENTRY = re.compile(r"^([\w.-]+)==([^\s;]+)(.*(?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+)", re.MULTILINE)


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    text = (ROOT / "constraints.hashed.txt").read_text()
    entries = {normalize(name): version for name, version, _ in ENTRY.findall(text)}
    assert len(entries) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE)), "an entry has no hash"
    return entries


@pytest.fixture(scope="module")
def installer() -> ModuleType:
    loader = SourceFileLoader("install", str(ROOT / ".ci" / "install"))
    spec = spec_from_loader("install", loader)
    assert spec is not None
    loader.exec_module(module := module_from_spec(spec))
    return module


def test_both_locks_have_the_same_versions(locked: dict[str, str]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    plain = dict(line.split("==") for line in lines if not line.startswith("#"))
    other = {
        name: (version, locked[normalize(name)])
        for name, version in plain.items()
        if normalize(name) in locked
    }
    assert len(other) > 150
    assert {name: versions for name, versions in other.items() if len(set(versions)) > 1} == {}


def test_all_that_is_asked_for_is_locked(locked: dict[str, str], installer: ModuleType) -> None:
    asked = {normalize(re.match(r"[\w.-]+", each)[0]) for each in installer.list_requirements()}
    assert asked - set(locked) == set()
    assert {"pip", "hatchling", "bitsandbytes"} <= set(locked)


def test_pip_refuses_another_file(tmp_path: Path, installer: ModuleType) -> None:
    (tmp_path / "wheels").mkdir()
    name = re.sub(r"==(\S+) .*", r"-\1-py3-none-any.whl", installer.find_lines("pip").splitlines()[0])
    (tmp_path / "wheels" / name).write_bytes(b"PK another")
    (tmp_path / "pip.txt").write_text(installer.find_lines("pip"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "--isolated",
        "download",
        "--no-deps",
        "--no-index",
        "--require-hashes",
    ]
    command += ["--find-links", "wheels", "--requirement", "pip.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


def test_another_torch_is_refused_and_one_of_another_index_told_of(
    installer: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(version: str, digest: str) -> list[dict]:
        archive = {"url": "https://there", "archive_info": {"hashes": {"sha256": digest}}}
        return [{"metadata": {"version": version}, "download_info": archive}]

    digest = re.findall(r"sha256:(\w+)", installer.find_lines("torch"))[-1]
    installer.check_torch(report("2.13.0", digest))
    assert capsys.readouterr().out == ""
    installer.check_torch(report("2.13.0+cu130", "f" * 64))
    assert "its file (SHA-256 ffff" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not the file that was locked"):
        installer.check_torch(report("2.13.0", "f" * 64))
