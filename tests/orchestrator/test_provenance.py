"""The sources and licences that a run hands over for its model card."""

from pathlib import Path

import pytest

from models.locate import ModelFiles
from orchestrator.driver.provenance import list_data_sources, read_base_license
from orchestrator.registry.license import License
from orchestrator.registry.lineage import DataSource
from preferences.config import DataConfig


def test_sources_are_named_without_paths_and_with_the_licence_of_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "votes"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    (folder / "more.jsonl").write_text("")
    sources = [str(folder), str(folder / "more.jsonl"), "me/pairs", "s3://bucket/far/rows.parquet"]
    data = DataConfig(
        train=[{"source": source} for source in sources],  # type: ignore[arg-type]
        eval="me/pairs",
        eval_split="test",
    )
    assert list_data_sources(data) == [
        DataSource("votes", is_on_hub=False, used_for="training", license=License(("cc0-1.0",))),
        DataSource("more.jsonl", is_on_hub=False, used_for="training"),
        DataSource("me/pairs", is_on_hub=True, used_for="training"),
        DataSource("rows.parquet", is_on_hub=False, used_for="training"),
        DataSource("me/pairs", is_on_hub=True, used_for="evaluation"),
    ]


def test_an_adapter_without_a_licence_has_that_of_its_base(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    for folder in (adapter, base):
        folder.mkdir()
    files = ModelFiles(adapter, base, "adapter", None, ())
    assert read_base_license(files) is None
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    assert read_base_license(files) == License(("mit",))
    (adapter / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert read_base_license(files) == License(("apache-2.0",))
    in_one_file = ModelFiles(base / "weights.gguf", None, "gguf", None, ())
    assert read_base_license(in_one_file) == License(("mit",))
