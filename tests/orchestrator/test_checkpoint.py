"""Checkpoints: what comes back is what was saved, and torn ones are passed over."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from models.logprobs import Scorer
from models.parallel import Parallel, prepare_parallel
from models.rows import PromptWithResponses, build_rows
from orchestrator.errors import RunFailed
from orchestrator.worker.checkpoint import (
    BestEvaluation,
    TrainingProgress,
    find_damage,
    load_best_weights,
    load_checkpoint,
    quarantine_corrupt_index,
    read_best_metadata,
    save_best_weights,
    save_checkpoint,
)
from orchestrator.worker.session import LocalSession
from orchestrator.worker.start import open_newest_checkpoint
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
    assert {path.suffix for path in (tmp_path / "one").iterdir()} == {".safetensors", ".json", ".sha256"}


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
    del fields["sha256"]
    file.write_text(json.dumps(fields))
    assert load_checkpoint(tmp_path / "one", policy(), identity=IDENTITY).step == fields["step"]
    file.write_text(json.dumps(fields | {"version": 2}))
    with pytest.raises(
        RunFailed, match="one cannot be read: it has version 2 and this polyref reads up to 1"
    ):
        load_checkpoint(tmp_path / "one", policy(), identity=IDENTITY)


def test_the_newest_whole_checkpoint_is_found_behind_damaged_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session, folder = LocalSession(tmp_path, device=torch.device("cpu")), tmp_path / "checkpoints"
    with open_newest_checkpoint(session, policy()) as newest:
        assert newest is None
    for number in (1, 2, 4):
        checkpoint(folder / f"checkpoint_{number}")
    state = folder / "checkpoint_2" / "state-00000-of-00001.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    (folder / "checkpoint_3").mkdir()
    part = folder / "checkpoint_4" / state.name
    part.rename(part.with_name("state-00000-of-00002.safetensors"))  # the other rank's was not written
    for _ in range(2):  # what was set aside stays so
        with open_newest_checkpoint(session, policy()) as newest:
            assert newest == folder / "checkpoint_1"
    assert "checkpoint checkpoint_2 is set aside" in caplog.text
    assert (folder / "checkpoint_2" / "DAMAGED").read_text().strip() in caplog.text
    assert state.exists()


def test_a_bit_that_flipped_in_any_file_is_noticed(tmp_path: Path) -> None:
    checkpoint(tmp_path / "one")
    assert find_damage(tmp_path / "one") is None
    for file in sorted((tmp_path / "one").iterdir()):
        content = bytearray(file.read_bytes())
        for place in range(0, len(content), max(1, len(content) // 40)):
            content[place] ^= 1
            file.write_bytes(content)
            assert find_damage(tmp_path / "one") is not None, (file.name, place)
            content[place] ^= 1
        file.write_bytes(content)
    assert find_damage(tmp_path / "one") is None


def test_ranks_check_all_files_between_them(tmp_path: Path) -> None:
    checkpoint(tmp_path / "one")
    state = tmp_path / "one" / "state-00000-of-00001.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    found = [find_damage(tmp_path / "one", rank=rank, world_size=3) for rank in range(3)]
    assert [text for text in found if text] == ["state-00000-of-00001.safetensors is not what was written"]


def test_the_digests_are_those_of_sha256sum_and_older_checkpoints_have_none(tmp_path: Path) -> None:
    checkpoint(tmp_path / "one")
    (sums,) = (tmp_path / "one").glob("*.sha256")
    subprocess.run(["sha256sum", "--check", "--quiet", sums.name], cwd=sums.parent, check=True)
    sums.unlink()
    assert find_damage(tmp_path / "one") is None


def test_only_a_torn_list_is_set_aside(tmp_path: Path) -> None:
    snapshot = tmp_path / "checkpoint_manager_snapshot.json"
    quarantine_corrupt_index(tmp_path)
    snapshot.write_text("{}")
    quarantine_corrupt_index(tmp_path)
    assert snapshot.exists()
    snapshot.write_text("")
    quarantine_corrupt_index(tmp_path)
    assert not snapshot.exists()


def test_a_bit_that_flipped_in_the_best_weights_is_noticed(tmp_path: Path) -> None:
    best = BestEvaluation(metric="eval/loss", step=3, metrics={"eval/loss": 0.5})
    kept, file = policy(), tmp_path / "best.safetensors"
    step(kept)
    save_best_weights(file, kept, best)
    assert read_best_metadata(file, "eval/loss") == best
    back = policy(seed=7)
    load_best_weights(file, back)
    with torch.no_grad():
        assert torch.equal(back.module(ROWS).logps, kept.module(ROWS).logps)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunFailed, match=r"best\.safetensors is not what was written"):
        load_best_weights(file, back)
