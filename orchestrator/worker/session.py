"""The group that a training worker belongs to: workers of Ray Train, or its own process alone.

Two small classes with the same methods, so that `loop.train_worker` is the same code in a run of many workers
and in a trial of one, which starts no trainer of its own.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch

from orchestrator.files import measure_folder, replace_text, sync_to_disk
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.scratch import make_scratch_folder
from orchestrator.worker import checkpoint

log = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
PREEMPTION_S = 120.0
"""How long Ray Train waits for a node without a deadline to be taken away, and how long we wait for Train."""

CheckpointWriter = Callable[[Path], None]
"""A function that writes a checkpoint, or this rank's part of one, into an empty folder."""


class Session(Protocol):
    """The group a worker belongs to, and the receiver of its metrics and checkpoints."""

    rank: int
    world_size: int
    local_workers: int
    """Workers that share this machine's cores."""
    device: torch.device
    checkpoint_bytes: int
    """Size of this rank's part of the last checkpoint; 0 before the first."""

    def report(self, metrics: Mapping[str, float], write: CheckpointWriter | None = None) -> None:
        """Report held-out metrics and, with `write`, save this rank's part of a checkpoint.

        Every rank calls it.
        """

    def is_preempted(self) -> bool:
        """Return whether a node of the group will soon be taken away, the same on every rank.

        Every rank calls it. True once for each notice.
        """

    def wait_for_preemption(self) -> None:
        """Wait until the group is ended because its node is taken away; return if that does not happen."""

    def list_checkpoints(self) -> list[str]:
        """Return the names of the checkpoints that may be resumed from, the newest first."""

    def fetch_checkpoint(self, name: str) -> AbstractContextManager[Path]:
        """Yield the folder of a checkpoint for reading: itself, or a copy if storage is remote."""

    def set_checkpoint_aside(self, name: str, reason: str) -> None:
        """Mark a checkpoint as damaged, so that it is not read again."""


class RayTrainSession:
    """A worker of a Ray Train group; `run_folder` is the run's folder or URI."""

    def __init__(self, run_folder: str) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.local_workers = context.get_local_world_size()
        self.device = ray.train.torch.get_device()
        self.checkpoint_bytes = 0
        self._mirror = Mirror(run_folder, worker=self.rank)
        self._watches_preemption = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0"
        self._preempted_nodes: set[str] = set()
        self._preemption_end = 0.0

    def report(self, metrics: Mapping[str, float], write: CheckpointWriter | None = None) -> None:
        """Report to Ray Train: a barrier for all ranks, with or without a checkpoint."""
        import ray.train

        if write is None:
            ray.train.report(dict(metrics))
            return
        with make_scratch_folder() as part:
            write(part)
            self.checkpoint_bytes = measure_folder(part)
            ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(part))

    def is_preempted(self) -> bool:
        """Ask Ray Train, which watches its nodes: a barrier for all ranks where it does."""
        import ray.train

        info = ray.train.get_preemption_info() if self._watches_preemption else None
        if info is None or self._preempted_nodes.issuperset(info.preempted_node_ids):
            return False
        self._preempted_nodes.update(info.preempted_node_ids)
        allowed = PREEMPTION_S if not info.deadline_ms else info.deadline_ms / 1000 - time.time()
        self._preemption_end = time.monotonic() + max(0.0, allowed) + PREEMPTION_S
        return True

    def wait_for_preemption(self) -> None:
        """Wait until Train ends this process; steps taken meanwhile would be taken again."""
        log.warning("a node is taken away soon: a checkpoint is saved, and training goes on on other nodes")
        while time.monotonic() < self._preemption_end:
            time.sleep(1)

    def list_checkpoints(self) -> list[str]:
        """Return the checkpoint that Train restarts from and older ones; all on storage if it has no list."""
        import ray.train

        names = _select_checkpoints(self._mirror.list_folders(CHECKPOINTS_FOLDER))
        stored = ray.train.get_checkpoint()
        if stored is None:
            return names
        newest = PurePosixPath(stored.path).name
        return [newest, *(name for name in names if name < newest)]

    @contextmanager
    def fetch_checkpoint(self, name: str) -> Iterator[Path]:
        """Yield the folder of a checkpoint; Train copies its own one once for the workers of a node."""
        import ray.train

        stored = ray.train.get_checkpoint()
        if stored is not None and PurePosixPath(stored.path).name == name:
            with stored.as_directory() as copy:
                yield Path(copy)
            return
        with self._mirror.fetch_folder(f"{CHECKPOINTS_FOLDER}/{name}") as folder:
            yield folder

    def set_checkpoint_aside(self, name: str, reason: str) -> None:
        """Write the reason into the checkpoint on storage."""
        marker = f"{CHECKPOINTS_FOLDER}/{name}/{checkpoint.DAMAGED_FILE}"
        replace_text(self._mirror.folder / marker, f"{reason}\n")
        self._mirror.push(marker)


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
        self.device, self.checkpoint_bytes = device, 0
        self._folder, self._keep_last, self._on_report = folder / CHECKPOINTS_FOLDER, keep_last, on_report

    def report(self, metrics: Mapping[str, float], write: CheckpointWriter | None = None) -> None:
        """Write the checkpoint, whole or not at all, and pass it and the metrics to `on_report`."""
        written = None if write is None else self._write_checkpoint(write, int(metrics["step"]))
        self._on_report(metrics, written)

    def is_preempted(self) -> bool:
        """A trial starts again from its last checkpoint: Tune tells it of nothing."""
        return False

    def wait_for_preemption(self) -> None:
        """Return: this process knows of no preemption."""

    def list_checkpoints(self) -> list[str]:
        """Return the checkpoints in the run's folder, the newest first."""
        return _select_checkpoints(path.name for path in self._folder.glob("*/"))

    @contextmanager
    def fetch_checkpoint(self, name: str) -> Iterator[Path]:
        """Yield the folder of a checkpoint."""
        yield self._folder / name

    def set_checkpoint_aside(self, name: str, reason: str) -> None:
        """Write the reason into the checkpoint."""
        replace_text(self._folder / name / checkpoint.DAMAGED_FILE, f"{reason}\n")

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
        self.checkpoint_bytes = measure_folder(part)
        part.rename(complete)
        sync_to_disk(self._folder)
        existing = sorted(self._folder.glob("checkpoint_*/"))
        # Later steps were trained before the trial moved back to another trial's checkpoint.
        current = [folder for folder in existing if folder.name <= complete.name]
        for stale in set(existing) - set(current[-self._keep_last :]):
            shutil.rmtree(stale)
        return complete


def _select_checkpoints(folders: Iterable[str]) -> list[str]:
    """Return the checkpoints among the names of folders, the newest first."""
    return sorted((name for name in folders if name.startswith("checkpoint_")), reverse=True)
