"""Where a copy of a registered version may come."""

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.registry import download
from orchestrator.registry.download import ResolvedModel, copy_version


@pytest.fixture
def model(tmp_path: Path) -> ResolvedModel:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return ResolvedModel(tmp_path / "model", "tiny", 1, run_id=None, digest=None)


def test_the_folder_one_is_in_is_refused(
    model: ResolvedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match=r"a new one in it, e\.g\. --to model"):
        copy_version(model, Path())
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "full folder", "link to a folder", "link to nothing"])
def test_what_is_there_is_left_as_it_is(model: ResolvedModel, tmp_path: Path, kind: str) -> None:
    to = tmp_path / "to"
    if kind == "file":
        to.write_text("mine")
    elif kind == "full folder":
        to.mkdir()
        (to / "mine").write_text("mine")
    else:
        to.symlink_to(tmp_path / ("elsewhere" if kind == "link to a folder" else "nowhere"))
        (tmp_path / "elsewhere").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"to is (not an empty folder|a link): give --to a new"):
        copy_version(model, to)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert to.is_symlink() == kind.startswith("link")


def test_what_comes_while_it_is_copied_is_left_as_it_is(
    model: ResolvedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arrive(*_: object, **__: object) -> None:
        (tmp_path / "to").mkdir()
        (tmp_path / "to" / "mine").write_text("mine")

    monkeypatch.setattr(download, "check_digest", arrive)
    with pytest.raises(UsageError, match="was filled meanwhile"):
        copy_version(model, tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "to"]


def test_an_empty_folder_keeps_its_permissions(model: ResolvedModel, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir(mode=0o700)
    copy_version(model, tmp_path / "to")
    assert (tmp_path / "to" / "config.json").exists()
    assert (tmp_path / "to").stat().st_mode & 0o777 == 0o700


def test_a_killed_copy_leaves_a_folder_of_our_name(model: ResolvedModel, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from orchestrator.registry import download\n"
        "download.check_digest = lambda *_, **__: os._exit(9)\n"
        "model = download.ResolvedModel(Path(sys.argv[1]), 'tiny', 1, None, None)\n"
        "download.copy_version(model, Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, str(model.folder), str(tmp_path / "to")]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 9
    assert not (tmp_path / "to").exists()
    assert len(list(tmp_path.glob(".to.polyref-*/config.json"))) == 1


@pytest.mark.parametrize("link", ["file outside", "folder outside", "folder it is in", "file beside it"])
def test_a_versions_links_do_not_lead_to_the_users_files(
    model: ResolvedModel, tmp_path: Path, link: str
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    targets = {
        "file outside": "../private/key",
        "folder outside": str(tmp_path / "private"),
        "folder it is in": ".",
        "file beside it": "config.json",
    }
    (model.folder / "README.md").symlink_to(targets[link])
    if link == "file beside it":
        copy_version(model, tmp_path / "to")
        assert (tmp_path / "to" / "README.md").read_text() == "{}"
        return
    with pytest.raises(UsageError, match=r"models:/tiny/1 are not copied: .*README.md is a link"):
        copy_version(model, tmp_path / "to")
    assert not (tmp_path / "to").exists()
