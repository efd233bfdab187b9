"""Where a copy of a registered version may come."""

from pathlib import Path

import pytest

from orchestrator.errors import UsageError
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


def test_a_link_to_an_empty_folder_leads_there(model: ResolvedModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    copy_version(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "config.json").exists()
