"""The group that a training worker belongs to: workers of Ray Train, or its own process alone.

Two small classes with the same methods, so that `loop.train_worker` is the same code in a run of many workers
and in a trial of one, which starts no trainer of its own.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from orchestrator.storage.mirror import Mirror
from orchestrator.worker import checkpoint

CHECKPOINTS_FOLDER = "checkpoints"

CheckpointWriter = Callable[[Path], None]
"""A function that writes a checkpoint, or this rank's part of one, into an empty folder."""


class Session(Protocol):
    """The group a worker belongs to, and the receiver of its metrics and checkpoints."""

    rank: int
    world_size: int
    local_workers: int
    """Workers that share this machine's cores."""
    device: torch.device

    def report(self, metrics: Mapping[str, float], write: CheckpointWriter | None = None) -> None:
        """Report held-out metrics and, with `write`, save this rank's part of a checkpoint.

        Every rank calls it.
        """

    def open_checkpoint(self) -> AbstractContextManager[Path | None]:
        """Yield the folder of the checkpoint to resume from, or None if there is none."""


class RayTrainSession:
    """A worker of a Ray Train group; `run_folder` is the run's folder or URI."""

    def __init__(self, run_folder: str) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.local_workers = context.get_local_world_size()
        self.device = ray.train.torch.get_device()
        self._run_folder = run_folder

    def report(self, metrics: Mapping[str, float], write: CheckpointWriter | None = None) -> None:
        """Report to Ray Train: a barrier for all ranks, with or without a checkpoint."""
        import ray.train

        if write is None:
            ray.train.report(dict(metrics))
            return
        with tempfile.TemporaryDirectory() as part:
            write(Path(part))
            ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(part))

    @contextmanager
    def open_checkpoint(self) -> Iterator[Path | None]:
        """Yield the checkpoint that Train restarts from, or the newest on storage if Train lost its list."""
        import ray.train

        stored = ray.train.get_checkpoint()
        if stored is None:
            with checkpoint.fetch_newest_checkpoint(
                Mirror(self._run_folder, worker=self.rank), CHECKPOINTS_FOLDER
            ) as newest:
                yield newest
            return
        with stored.as_directory() as folder:
            yield Path(folder)


class LocalSession:
    """One worker in one process.

    Args:
        folder: the run's; checkpoints lie in it where Ray Train would put them.
        device: the device to train on.
        keep_last: number of checkpoints to keep.
        on_report: called with every report's metrics and the checkpoint written with it, if any.
    """

    rank, world_size, local_workers = 0, 1, 1

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        keep_last: int = 1,
        on_report: Callable[[Mapping[str, float], Path | None], None] = lambda *_: None,
    ) -> None:
        self.device = device
        self._folder, self._keep_last, self._on_report = folder / CHECKPOINTS_FOLDER, keep_last, on_report

    def report(self, metrics: Mapping[str, float], write: CheckpointWriter | None = None) -> None:
        """Write the checkpoint, whole or not at all, and pass it and the metrics to `on_report`."""
        written = None if write is None else self._write_checkpoint(write, int(metrics["step"]))
        self._on_report(metrics, written)

    @contextmanager
    def open_checkpoint(self) -> Iterator[Path | None]:
        """Yield the newest checkpoint in the run's folder."""
        yield checkpoint.find_newest_checkpoint(self._folder)

    def adopt_checkpoint(self, other: Path) -> None:
        """Make a copy of another run's checkpoint the only one, so that training resumes from it."""

        def copy(part: Path) -> None:
            shutil.copytree(other, part, dirs_exist_ok=True)

        copied = self._write_checkpoint(copy, checkpoint.read_checkpoint_step(other))
        for stale in set(self._folder.glob("checkpoint_*/")) - {copied}:
            shutil.rmtree(stale)

    def _write_checkpoint(self, write: CheckpointWriter, step: int) -> Path:
        """Write a checkpoint in one move and delete those that are not to be kept; return its folder."""
        part, complete = self._folder / ".part", self._folder / f"checkpoint_{step:09d}"
        for old in (part, complete):
            shutil.rmtree(old, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        part.rename(complete)
        existing = sorted(self._folder.glob("checkpoint_*/"))
        # Later steps were trained before the trial moved back to another trial's checkpoint.
        current = [folder for folder in existing if folder.name <= complete.name]
        for stale in set(existing) - set(current[-self._keep_last :]):
            shutil.rmtree(stale)
        return complete
