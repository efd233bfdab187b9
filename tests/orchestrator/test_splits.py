"""Workers open the rows that the command tokenised, also on a machine that does not have its files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.cluster.ray_token import protect_local_ray
from orchestrator.errors import RunFailed
from orchestrator.worker import splits
from preferences.config import DataConfig
from preferences.load import load_splits
from preferences.split import TokenizedSplit
from preferences.tokens.fitting import Readers
from preferences.tokens.rendering import Rendering
from tests.support import tiny


@pytest.fixture(scope="module")
def ray_running() -> Iterator[None]:
    with protect_local_ray():
        ray.init(address="local", num_cpus=1, include_dashboard=False)
        yield
        ray.shutdown()


@pytest.fixture
def split(tmp_path: Path) -> TokenizedSplit:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "Q{i}", "chosen": "a", "rejected": "b"}}\n' for i in range(9)))
    readers = Readers(DataConfig(train=str(path)), Rendering(tiny.byte_tokenizer()), {})
    return load_splits(readers, completions_only=False, seed=0, folder=tmp_path / "here")[0].split


def read_prompts(split: TokenizedSplit) -> list[list[int]]:
    return [prompt.tolist() for prompt in split.policy.prompts]


def test_a_worker_opens_what_was_sent(ray_running: None, split: TokenizedSplit) -> None:
    received = splits.receive_split(splits.send_split(split))
    assert read_prompts(received) == read_prompts(split)
    assert list(received.places) == list(split.places)


def test_another_node_copies_the_files_once(
    ray_running: None, split: TokenizedSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert split.files is not None
    (path,), (checksum,) = split.files.paths, split.files.checksums
    node = ray.get_runtime_context().get_node_id()
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "there"))
    monkeypatch.setattr(splits, "BLOCK_BYTES", 1000)  # several blocks, the last one smaller
    copy = splits.copy_file(path, node, checksum)
    assert copy.parent == tmp_path / "there" / "data"
    assert copy.read_bytes() == path.read_bytes()

    def refuse(*_: Any) -> None:
        raise AssertionError("it is there")

    monkeypatch.setattr(splits, "_download", refuse)
    assert splits.copy_file(path, node, checksum) == copy
    assert read_prompts(split.files.open(lambda _: copy)) == read_prompts(split)


def test_a_file_that_was_changed_is_not_used(
    ray_running: None, split: TokenizedSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert split.files is not None
    (path,), (checksum,) = split.files.paths, split.files.checksums
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "there"))
    changed = tmp_path / "changed.arrow"
    changed.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(RunFailed, match=r"changed\.arrow is damaged or was changed"):
        splits.copy_file(changed, ray.get_runtime_context().get_node_id(), checksum)
    assert not list((tmp_path / "there" / "data").glob("*.arrow"))
