"""Checkpoints: the trained weights, the optimizer state and the run's progress. safetensors and JSON only.

The files contain whole weights and moments, also where training shards them: each rank writes every n-th of
them. So a run can resume under another strategy and with another number of workers, and no rank ever has
more than its share of a checkpoint in memory. Beside each part lies the SHA-256 of what its rank wrote, in
the format of `sha256sum`: a checkpoint that was cut short or in which a bit flipped is not resumed from.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.parallel import Parallel
from orchestrator.errors import RunFailed
from orchestrator.files import (
    RecordError,
    digest_file,
    dump_record,
    load_record,
    replace_file,
    sync_to_disk,
)

PROGRESS_FILE = "progress.json"
SUMS_SUFFIX = ".sha256"
DAMAGED_FILE = "DAMAGED"
"""A file in a checkpoint that was found damaged; it says why, and the checkpoint is not read again."""
_DIGEST_KEY = "xxh3_128"
VERSION = 1
"""The version of the fields in `progress.json`, and of the best evaluation beside its weights."""


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """The progress of a run.

    The step is all that describes the position in the data, because a batch is planned from (seed, epoch,
    step); random numbers are seeded by the step too, so neither needs a state of its own.

    Attributes:
        identity: fingerprints and digests the weights were trained with; must match on resume. Without
            `tokens` in a checkpoint from before tokens were pinned.
        step: optimizer steps taken.
        phi_star: the dispersion constant that `phi_star: auto` was resolved to.
        schedule: the learning-rate schedule's state.
        metrics: the last held-out metrics.
    """

    identity: dict[str, Any]
    step: int = 0
    phi_star: float | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def save_checkpoint(folder: str | Path, parallel: Parallel, progress: TrainingProgress) -> None:
    """Write this rank's part of a checkpoint into a folder; the caller collects the parts in one folder.

    Every rank calls it: all of them take part in gathering a sharded weight.
    """
    share: dict[str, Tensor] = {}
    for index, (name, state) in enumerate(parallel.iterate_full_state()):
        if index % parallel.world_size == parallel.rank:
            share |= {f"{name}/{kind}": tensor.cpu().contiguous() for kind, tensor in state.items()}
    folder = Path(folder)
    written = [folder / f"state-{parallel.rank:05d}-of-{parallel.world_size:05d}.safetensors"]
    save_file(share, written[0])
    if parallel.rank == 0:
        written.append(folder / PROGRESS_FILE)
        written[1].write_text(dump_record(progress, version=VERSION))
    sums = "".join(f"{digest_file(file)}  {file.name}\n" for file in written)
    written[0].with_suffix(SUMS_SUFFIX).write_text(sums)
    for file in (*written, written[0].with_suffix(SUMS_SUFFIX)):
        sync_to_disk(file)


@dataclass(frozen=True, kw_only=True)
class BestEvaluation:
    """The evaluation whose weights are the best so far by one metric, and are saved."""

    metric: str
    step: int
    metrics: dict[str, float]

    @property
    def value(self) -> float:
        """The value of its metric."""
        return self.metrics[self.metric]


def save_best_weights(file: Path, parallel: Parallel, best: BestEvaluation) -> None:
    """Write the trained weights, without optimizer state, and their evaluation; replace the file in one move.

    Every rank calls it. Rank 0 writes, and has all trained weights in main memory meanwhile.
    """
    weights: dict[str, Tensor] = {}
    for name, state in parallel.iterate_full_state(moments=False):
        if parallel.rank == 0:
            weights[name] = state["weight"].cpu().contiguous()
    if parallel.rank != 0:
        return
    with replace_file(file) as part:
        digest = _digest_tensors(sorted(weights.items()))
        save_file(weights, part, {"best": dump_record(best, version=VERSION), _DIGEST_KEY: digest})


def read_best_metadata(file: Path, metric: str) -> BestEvaluation | None:
    """Return the evaluation in a file of `save_best_weights`, if there is one and it is by this metric."""
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as weights:
        text = (weights.metadata() or {}).get("best", "")
    try:
        best = load_record(BestEvaluation, text, version=VERSION)
    except RecordError as error:
        raise RunFailed(f"{file} cannot be read: {error}") from error
    return best if best.metric == metric else None


def load_best_weights(file: Path, parallel: Parallel) -> None:
    """Restore the weights that `save_best_weights` wrote, on every rank.

    Raises:
        RunFailed: they are not those that were written.
    """
    with safe_open(file, framework="pt") as weights:
        digest = (weights.metadata() or {}).get(_DIGEST_KEY)  # none before there were digests
        tensors = ((name, weights.get_tensor(name)) for name in sorted(weights.keys()))
        is_changed = parallel.rank == 0 and digest is not None and digest != _digest_tensors(tensors)
        if parallel.all_reduce_sum(torch.tensor([float(is_changed)], device=parallel.device)).item():
            raise RunFailed(
                f"{file} is not what was written: move it away, and the same command exports the weights of "
                "the last step"
            )
        parallel.restore_full_state(lambda name: {"weight": weights.get_tensor(name)}, weights.keys())


def _digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the XXH3 of names and contents of tensors on the CPU, in their order."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_checkpoint_step(folder: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(json.loads((folder / PROGRESS_FILE).read_text())["step"])


def find_damage(folder: Path, *, rank: int = 0, world_size: int = 1) -> str | None:
    """Return why a checkpoint cannot be resumed from, or None if it is whole.

    Of `world_size` ranks each compares its share of the files with their digests; that all parts are there is
    checked by every rank. A checkpoint from before there were digests is checked for its parts alone.
    """
    if (folder / DAMAGED_FILE).exists():
        return "it was found damaged before"
    try:
        json.loads((folder / PROGRESS_FILE).read_text())
        _StateFiles(folder)
        sums = _read_sums(folder)
        for file in sorted(sums)[rank::world_size]:
            if digest_file(folder / file) != sums[file]:
                return f"{file} is not what was written"
    except (OSError, ValueError, SafetensorError) as error:
        return str(error) or type(error).__name__
    return None


def _read_sums(folder: Path) -> dict[str, str]:
    """Return the digests of a checkpoint's files by name, {} if it was written before there were any."""
    sums: dict[str, str] = {}
    for file in folder.glob(f"*{SUMS_SUFFIX}"):
        for line in file.read_text().splitlines():
            digest, _, name = line.partition("  ")
            sums[name] = digest
    parts = {PROGRESS_FILE, *(part.name for part in folder.glob("state-*.safetensors"))}
    if sums and (missing := parts - set(sums)):
        raise FileNotFoundError(f"the digest of {', '.join(sorted(missing))} is missing")
    return sums


def quarantine_corrupt_index(folder: Path) -> None:
    """Rename Ray's list of checkpoints in a folder if it is not valid JSON.

    Ray writes it in place, and refuses to start with a list that a kill cut short.
    """
    snapshot = folder / "checkpoint_manager_snapshot.json"
    try:
        json.loads(snapshot.read_text())
    except FileNotFoundError:
        pass
    except ValueError:
        snapshot.replace(snapshot.with_suffix(".torn"))


def load_checkpoint(folder: str | Path, parallel: Parallel, *, identity: dict[str, Any]) -> TrainingProgress:
    """Restore a checkpoint's weights and optimizer state and return its progress.

    Raises:
        RuntimeError: the checkpoint was trained with other references, data or tokens than those of
            `identity`.
        RunFailed: its progress file cannot be read: it is damaged, or a newer polyref wrote it.
    """
    folder = Path(folder)
    try:
        progress = load_record(TrainingProgress, (folder / PROGRESS_FILE).read_text(), version=VERSION)
    except RecordError as error:
        raise RunFailed(f"the checkpoint in {folder} cannot be read: {error}") from error
    trained = {"tokens": identity.get("tokens")} | progress.identity
    changed = sorted(name for name in {*identity, *trained} if identity.get(name) != trained.get(name))
    if changed:
        raise RuntimeError(f"the checkpoint in {folder} was trained with other {', '.join(changed)}")
    states = _StateFiles(folder)
    parallel.restore_full_state(states.read_state, states.names)
    return progress


class _StateFiles:
    """The weights of a checkpoint with their moments, each read from its file on demand.

    Raises:
        OSError, SafetensorError: the checkpoint is not complete.
    """

    def __init__(self, folder: Path) -> None:
        parts = sorted(folder.glob("state-*-of-*.safetensors"))
        if not parts or len(parts) != int(parts[0].stem.rpartition("-")[2]):
            raise FileNotFoundError(f"{folder} has {len(parts)} of its parts")
        self._files: dict[str, dict[str, Any]] = {}
        for part in parts:
            file = safe_open(part, framework="pt")
            for key in file.keys():  # noqa: SIM118 (no dictionary)
                name, _, kind = key.rpartition("/")
                self._files.setdefault(name, {})[kind] = file

    @property
    def names(self) -> list[str]:
        """Names of the weights."""
        return list(self._files)

    def read_state(self, name: str) -> dict[str, Tensor]:
        """Read a weight and its moments."""
        return {kind: file.get_tensor(f"{name}/{kind}") for kind, file in self._files[name].items()}
