"""A run file over tiny models, and a small Ray that all runs of a module share."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.connection import start_local_ray
from orchestrator.config.run import RunConfig, parse_run

WORDS = ["good", "bad", "fun", "dull", "nice", "weak", "warm", "cold", "sharp", "flat"]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pairs of unequal length with soft labels, some of which turn their pair round."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for number in range(48):
        chosen, rejected = (" ".join(draw.choices(WORDS, k=draw.randint(1, 8))) for _ in range(2))
        label = round(draw.uniform(0.4, 1), 2)
        row = {"prompt": f"Film {number % 16} is ", "chosen": chosen + ".", "rejected": rejected + "!"}
        rows.append(row | {"soft_label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RunOf = Callable[..., RunConfig]


@pytest.fixture
def run_of(pairs_file: Path, tiny_llama_folder: Path, tiny_llama_b_folder: Path, tmp_path: Path) -> RunOf:
    """`run_of(name, training={...}, ...)`: a run of two references; sections are merged, others replaced."""

    def make(name: str, **sections: Any) -> RunConfig:
        run: dict[str, Any] = {
            "name": name,
            "policy": {"model": str(tiny_llama_folder), "adapter": {"r": 4, "alpha": 8}},
            "references": {
                "primary": "base",
                "models": {
                    "base": {"model": str(tiny_llama_folder)},
                    "other": {"model": str(tiny_llama_b_folder)},
                },
            },
            "data": {
                "train": str(pairs_file),
                "eval_fraction": 0.25,
                "max_length": 256,
                "max_prompt_length": 64,
            },
            "loss": {"preset": "mrpo", "soft_label": {"type": "geometric"}},
            "training": {
                "max_steps": 6,
                "pairs_per_step": 8,
                "tokens_per_microbatch": 512,
                "learning_rate": 1e-2,
                "save_every": 3,
            },
            "evaluation": {"every_steps": 3},
            "storage_path": str(tmp_path / "runs"),
        }
        for section, value in sections.items():
            merge = isinstance(value, dict) and section in ("training", "data", "evaluation", "policy")
            run[section] = run[section] | value if merge else value
        return parse_run(run, source=name)

    return make


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A small Ray for this process, never a cluster that happens to run here.

    It has no dashboard, which takes longer to start than the rest, and which only runs that fail need.
    """
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    with start_local_ray(
        num_cpus=4, object_store_memory=200 * 2**20, log_to_driver=False, include_dashboard=False
    ):
        yield


@pytest.fixture(scope="module")
def whole_cluster() -> Iterator[None]:
    """A small Ray as commands start it, with its dashboard."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    with start_local_ray(num_cpus=4, object_store_memory=200 * 2**20, log_to_driver=False):
        yield
