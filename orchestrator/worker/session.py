"""What a training worker is part of: a group of Ray Train, or nothing but its own process.

Two small classes with the same verbs, so that `worker.train_worker` reads the same in a run of many workers
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

CHECKPOINTS = "checkpoints"

Write = Callable[[Path], None]
"""Writes a checkpoint, or this rank's part of one, into an empty folder."""


class Session(Protocol):
    """The group a worker belongs to, and where its results go."""

    rank: int
    world_size: int
    local_workers: int
    """Workers that share this machine's cores."""
    device: torch.device

    def report(self, metrics: Mapping[str, float], write: Write | None = None) -> None:
        """Every rank: hand in held-out metrics and, with `write`, this rank's part of a checkpoint."""

    def checkpoint(self) -> AbstractContextManager[Path | None]:
        """The folder of the checkpoint to go on from, if there is one."""


class RayTrainSession:
    """A worker of a Ray Train group, whose run is kept at a folder or URI."""

    def __init__(self, kept_at: str) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.local_workers = context.get_local_world_size()
        self.device = ray.train.torch.get_device()
        self._kept_at = kept_at

    def report(self, metrics: Mapping[str, float], write: Write | None = None) -> None:
        """Train's report is a barrier, with or without a checkpoint."""
        import ray.train

        if write is None:
            ray.train.report(dict(metrics))
            return
        with tempfile.TemporaryDirectory() as part:
            write(Path(part))
            ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(part))

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """What Train restarts from; else the newest on storage, where Train's own list was lost."""
        import ray.train

        stored = ray.train.get_checkpoint()
        if stored is None:
            with checkpoint.fetch_newest(Mirror(self._kept_at, worker=self.rank), CHECKPOINTS) as newest:
                yield newest
            return
        with stored.as_directory() as folder:
            yield Path(folder)


class LocalSession:
    """One worker in one process.

    Args:
        folder: the run's; checkpoints lie in it as Ray Train would lay them.
        device: what it trains on.
        keep_last: checkpoints that are kept.
        tell: gets every report's metrics, and the checkpoint written with it.
    """

    rank, world_size, local_workers = 0, 1, 1

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        keep_last: int = 1,
        tell: Callable[[Mapping[str, float], Path | None], None] = lambda metrics, checkpoint: None,
    ) -> None:
        self.device = device
        self._folder, self._keep_last, self._tell = folder / CHECKPOINTS, keep_last, tell

    def report(self, metrics: Mapping[str, float], write: Write | None = None) -> None:
        """Write the checkpoint, whole or not at all, and pass the metrics on."""
        self._tell(metrics, None if write is None else self._write_checkpoint(write, int(metrics["step"])))

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """The newest in its folder."""
        yield checkpoint.find_newest(self._folder)

    def adopt_checkpoint(self, other: Path) -> None:
        """Go on from another run's checkpoint: a copy of it becomes the only one."""

        def copy(part: Path) -> None:
            shutil.copytree(other, part, dirs_exist_ok=True)

        copied = self._write_checkpoint(copy, checkpoint.read_step(other))
        for left in set(self._folder.glob("checkpoint_*/")) - {copied}:
            shutil.rmtree(left)

    def _write_checkpoint(self, write: Write, step: int) -> Path:
        part, whole = self._folder / ".part", self._folder / f"checkpoint_{step:09d}"
        for old in (part, whole):
            shutil.rmtree(old, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        part.rename(whole)
        kept = sorted(self._folder.glob("checkpoint_*/"))
        # Later ones are of a course that was left for another trial's checkpoint.
        course = [folder for folder in kept if folder.name <= whole.name]
        for stale in set(kept) - set(course[-self._keep_last :]):
            shutil.rmtree(stale)
        return whole
