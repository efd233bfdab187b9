"""Checkpoints: the trained weights, the optimizer state and the run's progress. safetensors and JSON only.

The files contain whole weights and moments, also where training shards them: each rank writes every n-th of
them. So a run can resume under another strategy and with another number of workers, and no rank ever has
more than its share of a checkpoint in memory.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.parallel import Parallel
from orchestrator.errors import RunFailed
from orchestrator.files import RecordError, dump_record, load_record, replace_file
from orchestrator.storage.mirror import Mirror

PROGRESS_FILE = "progress.json"
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
    save_file(share, folder / f"state-{parallel.rank:05d}-of-{parallel.world_size:05d}.safetensors")
    if parallel.rank == 0:
        (folder / PROGRESS_FILE).write_text(dump_record(progress, version=VERSION))


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
        save_file(weights, part, {"best": dump_record(best, version=VERSION)})


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
    """Restore the weights that `save_best_weights` wrote, on every rank."""
    with safe_open(file, framework="pt") as weights:
        parallel.restore_full_state(lambda name: {"weight": weights.get_tensor(name)}, weights.keys())


def read_checkpoint_step(folder: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(json.loads((folder / PROGRESS_FILE).read_text())["step"])


def find_newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint among `checkpoint_*` folders, if there is one.

    For local sessions, and for a run whose list of checkpoints, which Ray writes, was lost.
    """
    for candidate in sorted(folder.glob("checkpoint_*/"), reverse=True):
        try:
            json.loads((candidate / PROGRESS_FILE).read_text())
            _StateFiles(candidate)
        except (OSError, ValueError, SafetensorError):  # cut short when the run was killed
            continue
        return candidate
    return None


@contextmanager
def fetch_newest_checkpoint(mirror: Mirror, subfolder: str) -> Iterator[Path | None]:
    """Yield the newest complete checkpoint in a subfolder of a run, for reading: a copy if storage is remote.

    Yields None if there is no checkpoint.
    """
    if not mirror.remote:
        yield find_newest_checkpoint(mirror.folder / subfolder)
        return
    for name in reversed(mirror.list_folders(subfolder)):
        with mirror.fetch_folder(f"{subfolder}/{name}") as copy:
            if find_newest_checkpoint(copy.parent) is not None:
                yield copy
                return
    yield None


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
