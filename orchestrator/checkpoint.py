"""Checkpoints: the trained weights, the optimizer, and where the run stands. safetensors and JSON only."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from models.parallel import Parallel

WEIGHTS, OPTIMIZER, PROGRESS = "policy.safetensors", "optimizer.safetensors", "progress.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands.

    The data position is the step alone, because a batch is planned from (seed, epoch, step); random
    numbers are seeded by the step likewise, so neither needs a state of its own.

    Attributes:
        step: optimizer steps taken.
        phi_star: the resolved dispersion constant, where the run asked for `auto`.
        identity: fingerprints and pinned versions the weights were trained with; must match on resume.
        schedule: the learning-rate schedule's state.
        optimizer: what the optimizer's state has besides tensors.
        metrics: the last held-out metrics.
    """

    identity: dict[str, Any]
    step: int = 0
    phi_star: float | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def save(folder: str | Path, parallel: Parallel, progress: Progress) -> None:
    """Write a checkpoint into an empty folder; whoever keeps the folder makes it appear at once."""
    folder = Path(folder)
    save_file(parallel.model_state(), folder / WEIGHTS)
    tensors, rest = parallel.optimizer_state()
    save_file(tensors, folder / OPTIMIZER)
    (folder / PROGRESS).write_text(json.dumps(asdict(replace(progress, optimizer=rest)), indent=1))


@dataclass(frozen=True, kw_only=True)
class Best:
    """The evaluation whose weights are kept as the best so far, by one metric."""

    metric: str
    step: int
    metrics: dict[str, float]

    @property
    def value(self) -> float:
        """Of its metric."""
        return self.metrics[self.metric]


def save_best(file: Path, parallel: Parallel, best: Best) -> None:
    """Write the trained weights alone with what they gave, replacing the file in one move."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    save_file(parallel.model_state(), part, {"best": json.dumps(asdict(best))})
    part.replace(file)


def best_in(file: Path, metric: str) -> Best | None:
    """What an earlier process of the run kept as the best by this metric."""
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as weights:
        best = Best(**json.loads(weights.metadata()["best"]))
    return best if best.metric == metric else None


def load_best(file: Path, parallel: Parallel) -> None:
    """Put back the weights that `save_best` wrote."""
    parallel.load_model_state(load_file(file))


def step_of(folder: Path) -> int:
    """The step that a checkpoint was taken at."""
    return int(json.loads((folder / PROGRESS).read_text())["step"])


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint among `checkpoint_*` folders: for when Ray's own list of them was lost."""
    for candidate in sorted(folder.glob("checkpoint_*/"), reverse=True):
        try:
            json.loads((candidate / PROGRESS).read_text())
            for name in (WEIGHTS, OPTIMIZER):
                with safe_open(candidate / name, framework="pt"):
                    pass
        except (OSError, ValueError, SafetensorError):  # cut short when the run was killed
            continue
        return candidate
    return None


def set_aside_torn_list(folder: Path) -> None:
    """Ray writes its list of checkpoints in place, and refuses to start over one that a kill cut short."""
    snapshot = folder / "checkpoint_manager_snapshot.json"
    try:
        json.loads(snapshot.read_text())
    except FileNotFoundError:
        pass
    except ValueError:
        snapshot.replace(snapshot.with_suffix(".torn"))


def load(folder: str | Path, parallel: Parallel, *, identity: dict[str, Any]) -> Progress:
    """Put a checkpoint's weights and optimizer state back and return where it stood.

    Raises:
        RuntimeError: the checkpoint belongs to other references or data than `identity`.
    """
    folder = Path(folder)
    progress = Progress(**json.loads((folder / PROGRESS).read_text()))
    if progress.identity != identity:
        changed = sorted(
            k for k in {*identity, *progress.identity} if identity.get(k) != progress.identity.get(k)
        )
        raise RuntimeError(f"the checkpoint in {folder} was trained with another {', '.join(changed)}")
    parallel.load_model_state(load_file(folder / WEIGHTS))
    parallel.load_optimizer_state(load_file(folder / OPTIMIZER), progress.optimizer)
    return progress
