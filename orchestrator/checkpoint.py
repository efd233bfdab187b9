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
        best_step: the evaluation whose weights are kept as the best, where the best is kept.
        best: its metrics.
    """

    identity: dict[str, Any]
    step: int = 0
    phi_star: float | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)


def save(folder: str | Path, parallel: Parallel, progress: Progress) -> None:
    """Write a checkpoint into an empty folder; whoever keeps the folder makes it appear at once."""
    folder = Path(folder)
    save_file(parallel.model_state(), folder / WEIGHTS)
    tensors, rest = parallel.optimizer_state()
    save_file(tensors, folder / OPTIMIZER)
    (folder / PROGRESS).write_text(json.dumps(asdict(replace(progress, optimizer=rest)), indent=1))


def save_weights(file: Path, parallel: Parallel) -> None:
    """Write the trained weights alone, replacing the file in one move."""
    state = parallel.model_state()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    save_file(state, part)
    part.replace(file)


def load_weights(file: Path, parallel: Parallel) -> None:
    """Put back what `save_weights` wrote."""
    parallel.load_model_state(load_file(file))


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
