"""The function that Ray Train's controller unpickles; it imports nothing until a worker calls it.

The controller has no use for torch, and importing it there would delay every start by seconds.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.worker.result import WorkerResult


def run_worker(settings: dict[str, Any]) -> "WorkerResult":
    """Load environment and setup, and run `loop.train_worker`: Ray Train's `train_loop_per_worker`."""
    import ray

    os.environ.update(ray.get(settings["secrets"]))
    from orchestrator.worker.loop import train_worker
    from orchestrator.worker.session import RayTrainSession

    setup = ray.get(settings["setup"])
    return train_worker(setup, RayTrainSession(setup.folder))
