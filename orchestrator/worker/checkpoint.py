"""Checkpoints: the trained weights, the optimizer, and where the run stands. safetensors and JSON only.

Weights and moments are whole in the files, whatever shards they lived in: each rank writes every n-th of
them. So a checkpoint goes on under another strategy and another number of workers, and no rank ever holds
more than its share of it.
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

PROGRESS = "progress.json"
VERSION = 1
"""Of the fields in `progress.json`, and of the best evaluation beside its weights."""


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """Where a run stands.

    The data position is the step alone, because a batch is planned from (seed, epoch, step); random
    numbers are seeded by the step likewise, so neither needs a state of its own.

    Attributes:
        step: optimizer steps taken.
        phi_star: the resolved dispersion constant, where the run asked for `auto`.
        identity: fingerprints and pinned versions the weights were trained with; must match on resume.
        schedule: the learning-rate schedule's state.
        metrics: the last held-out metrics.
    """

    identity: dict[str, Any]
    step: int = 0
    phi_star: float | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def save_checkpoint(folder: str | Path, parallel: Parallel, progress: TrainingProgress) -> None:
    """Write this rank's part of a checkpoint into a folder; whoever keeps it brings the parts together.

    Every rank calls it: a weight in shards is put together by all.
    """
    mine: dict[str, Tensor] = {}
    for index, (name, state) in enumerate(parallel.saved()):
        if index % parallel.world_size == parallel.rank:
            mine |= {f"{name}/{what}": tensor.cpu().contiguous() for what, tensor in state.items()}
    folder = Path(folder)
    save_file(mine, folder / f"state-{parallel.rank:05d}-of-{parallel.world_size:05d}.safetensors")
    if parallel.rank == 0:
        (folder / PROGRESS).write_text(dump_record(progress, version=VERSION))


@dataclass(frozen=True, kw_only=True)
class BestEvaluation:
    """The evaluation whose weights are kept as the best so far, by one metric."""

    metric: str
    step: int
    metrics: dict[str, float]

    @property
    def value(self) -> float:
        """Of its metric."""
        return self.metrics[self.metric]


def save_best(file: Path, parallel: Parallel, best: BestEvaluation) -> None:
    """Write the trained weights alone with what they gave, replacing the file in one move.

    Every rank calls it. Rank 0 writes, and has all trained weights in main memory meanwhile.
    """
    weights: dict[str, Tensor] = {}
    for name, state in parallel.saved(moments=False):
        if parallel.rank == 0:
            weights[name] = state["weight"].cpu().contiguous()
    if parallel.rank != 0:
        return
    with replace_file(file) as part:
        save_file(weights, part, {"best": dump_record(best, version=VERSION)})


def read_best(file: Path, metric: str) -> BestEvaluation | None:
    """What an earlier process of the run kept as the best by this metric."""
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as weights:
        best = load_record(BestEvaluation, weights.metadata()["best"], version=VERSION)
    return best if best.metric == metric else None


def load_best(file: Path, parallel: Parallel) -> None:
    """Put back the weights that `save_best` wrote, on every rank."""
    with safe_open(file, framework="pt") as weights:
        parallel.restore(lambda name: {"weight": weights.get_tensor(name)}, weights.keys())


def read_step(folder: Path) -> int:
    """The step that a checkpoint was taken at."""
    return int(json.loads((folder / PROGRESS).read_text())["step"])


def find_newest(folder: Path) -> Path | None:
    """The newest whole checkpoint among `checkpoint_*` folders: for when Ray's own list of them was lost."""
    for candidate in sorted(folder.glob("checkpoint_*/"), reverse=True):
        try:
            json.loads((candidate / PROGRESS).read_text())
            _StateFiles(candidate)
        except (OSError, ValueError, SafetensorError):  # cut short when the run was killed
            continue
        return candidate
    return None


@contextmanager
def fetch_newest(mirror: Mirror, under: str) -> Iterator[Path | None]:
    """The newest whole checkpoint of a run, for reading, wherever the run is kept."""
    if not mirror.remote:
        yield find_newest(mirror.folder / under)
        return
    for name in reversed(mirror.list_folders(under)):
        with mirror.fetch_folder(f"{under}/{name}") as copy:
            if find_newest(copy.parent) is not None:
                yield copy
                return
    yield None


def quarantine_corrupt_index(folder: Path) -> None:
    """Ray writes its list of checkpoints in place, and refuses to start over one that a kill cut short."""
    snapshot = folder / "checkpoint_manager_snapshot.json"
    try:
        json.loads(snapshot.read_text())
    except FileNotFoundError:
        pass
    except ValueError:
        snapshot.replace(snapshot.with_suffix(".torn"))


def load_checkpoint(folder: str | Path, parallel: Parallel, *, identity: dict[str, Any]) -> TrainingProgress:
    """Put a checkpoint's weights and optimizer state back and return where it stood.

    Raises:
        RuntimeError: the checkpoint belongs to other references or data than `identity`.
        RunFailed: another version of polyref wrote it, in a way that this one does not read.
    """
    folder = Path(folder)
    try:
        progress = load_record(TrainingProgress, (folder / PROGRESS).read_text(), version=VERSION)
    except RecordError as error:
        raise RunFailed(f"the checkpoint in {folder} cannot be read: {error}") from error
    if progress.identity != identity:
        changed = sorted(
            k for k in {*identity, *progress.identity} if identity.get(k) != progress.identity.get(k)
        )
        raise RuntimeError(f"the checkpoint in {folder} was trained with another {', '.join(changed)}")
    states = _StateFiles(folder)
    parallel.restore(states.read_state, states.names)
    return progress


class _StateFiles:
    """The weights of a checkpoint with their moments, each read when it is asked for.

    Raises OSError or SafetensorError where the checkpoint is not whole.
    """

    def __init__(self, folder: Path) -> None:
        parts = sorted(folder.glob("state-*-of-*.safetensors"))
        if not parts or len(parts) != int(parts[0].stem.rpartition("-")[2]):
            raise FileNotFoundError(f"{folder} has {len(parts)} of its parts")
        self._files: dict[str, dict[str, Any]] = {}
        for part in parts:
            file = safe_open(part, framework="pt")
            for key in file.keys():  # noqa: SIM118 (no dictionary)
                name, _, what = key.rpartition("/")
                self._files.setdefault(name, {})[what] = file

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def read_state(self, name: str) -> dict[str, Tensor]:
        return {what: file.get_tensor(f"{name}/{what}") for what, file in self._files[name].items()}
