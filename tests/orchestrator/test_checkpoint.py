"""Checkpoints: what comes back is what was saved, and torn ones are passed over."""

import json
from pathlib import Path

import pytest
import torch

from models.logprobs import Scorer
from models.parallel import Parallel, prepare_parallel
from models.rows import PromptWithResponses, build_rows
from orchestrator.errors import RunFailed
from orchestrator.worker.checkpoint import (
    TrainingProgress,
    find_newest_checkpoint,
    load_checkpoint,
    quarantine_corrupt_index,
    save_checkpoint,
)
from tests.support import tiny

IDENTITY = {"policy": "p", "references": {"base": "b"}}
ROWS = build_rows([PromptWithResponses([1, 2, 3], [[4, 5], [6]])], shared=True, pad_id=0)


def policy(seed: int = 0) -> Parallel:
    model = tiny.llama(seed=seed, tie_word_embeddings=True).train()
    return prepare_parallel(Scorer(model), device=torch.device("cpu"), learning_rate=1e-2)


def step(parallel: Parallel) -> float:
    loss = -parallel.module(ROWS).logps.sum()
    parallel.backward(loss)
    parallel.step()
    parallel.zero_grad()
    return float(loss.detach())


def checkpoint(folder: Path, steps: int = 3) -> Parallel:
    parallel = policy()
    for _ in range(steps):
        step(parallel)
    folder.mkdir(parents=True)
    save_checkpoint(
        folder, parallel, TrainingProgress(identity=IDENTITY, step=steps, metrics={"eval/loss": 0.5})
    )
    return parallel


def test_a_loaded_policy_takes_the_same_steps_bit_for_bit(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path / "one")
    back = policy(seed=7)
    progress = load_checkpoint(tmp_path / "one", back, identity=IDENTITY)
    assert (progress.step, progress.metrics) == (3, {"eval/loss": 0.5})
    assert [step(back) for _ in range(3)] == [step(kept) for _ in range(3)]
    assert {path.suffix for path in (tmp_path / "one").iterdir()} == {".safetensors", ".json"}


def test_a_checkpoint_of_other_references_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "one")
    with pytest.raises(RuntimeError, match=r"with other references$"):
        load_checkpoint(tmp_path / "one", policy(), identity=IDENTITY | {"references": {"base": "c"}})


def test_a_checkpoint_of_other_tokens_is_refused_and_one_that_does_not_know_its_own_is_read(
    tmp_path: Path,
) -> None:
    checkpoint(tmp_path / "one")  # without tokens, as they were written before
    pinned = IDENTITY | {"tokens": {"train, policy": "t"}}
    assert load_checkpoint(tmp_path / "one", policy(), identity=pinned).step == 3
    (tmp_path / "two").mkdir()
    save_checkpoint(tmp_path / "two", policy(), TrainingProgress(identity=pinned, step=4))
    assert load_checkpoint(tmp_path / "two", policy(), identity=pinned).step == 4
    for other in ({"train, policy": "u"}, {"train, policy": "t", "eval, policy": "t"}):
        with pytest.raises(RuntimeError, match=r"with other tokens$"):
            load_checkpoint(tmp_path / "two", policy(), identity=pinned | {"tokens": other})


def test_a_checkpoint_of_before_versions_is_read_and_one_of_after_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "one")
    file = tmp_path / "one" / "progress.json"
    fields = json.loads(file.read_text())
    assert fields.pop("version") == 1
    file.write_text(json.dumps(fields))
    assert load_checkpoint(tmp_path / "one", policy(), identity=IDENTITY).step == fields["step"]
    file.write_text(json.dumps(fields | {"version": 2}))
    with pytest.raises(
        RunFailed, match="one cannot be read: it has version 2 and this polyref reads up to 1"
    ):
        load_checkpoint(tmp_path / "one", policy(), identity=IDENTITY)


def test_the_newest_whole_checkpoint_is_found_behind_torn_ones(tmp_path: Path) -> None:
    assert find_newest_checkpoint(tmp_path) is None
    checkpoint(tmp_path / "checkpoint_1")
    checkpoint(tmp_path / "checkpoint_2")
    state = tmp_path / "checkpoint_2" / "state-00000-of-00001.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    (tmp_path / "checkpoint_3").mkdir()
    checkpoint(tmp_path / "checkpoint_4")
    part = tmp_path / "checkpoint_4" / state.name
    part.rename(part.with_name("state-00000-of-00002.safetensors"))  # the other rank's was not written
    assert find_newest_checkpoint(tmp_path) == tmp_path / "checkpoint_1"


def test_only_a_torn_list_is_set_aside(tmp_path: Path) -> None:
    snapshot = tmp_path / "checkpoint_manager_snapshot.json"
    quarantine_corrupt_index(tmp_path)
    snapshot.write_text("{}")
    quarantine_corrupt_index(tmp_path)
    assert snapshot.exists()
    snapshot.write_text("")
    quarantine_corrupt_index(tmp_path)
    assert not snapshot.exists()
