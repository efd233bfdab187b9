"""Whole runs whose policy lies in shards: the run of one process, also in references, export and resume."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator.config.run import RunConfig
from orchestrator.driver.train import train_run
from orchestrator.tracking.metrics_file import read_metrics
from orchestrator.worker.sampling import PROMPTS_PER_CHUNK
from tests.support.driver import Driver

pytestmark = pytest.mark.long

STEPS = 20
FSDP = {"workers": 2, "strategy": "fsdp"}
ZERO = {"workers": 2, "strategy": "deepspeed", "zero_stage": 3, "offload": True}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def evaluations(folder: Path, *names: str) -> list[list[float]]:
    return [[line[name] for name in names] for line in read_metrics(folder) if names[0] in line]


def exported(folder: Path, part: str = "model/model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / part)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name], weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_loads_with_the_logits_in_hand(folder: Path) -> None:
    """What transformers loads from the export answers as the policy in shards did before it was exported."""
    model = AutoModelForCausalLM.from_pretrained(folder / "export" / "model").eval()
    probe = load_file(folder / "export" / "probe.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(probe["rows"]).logits, probe["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("cluster")
def test_lora_in_fsdp_shards_with_samples_and_the_start_in_process(run_of: Callable[..., RunConfig]) -> None:
    """Samples, and scores of the policy's own start, are forward passes that all ranks must make together."""
    sections: dict[str, Any] = {
        "training": {"max_steps": STEPS, "save_every": 10},
        # One chunk of prompts for two ranks: the other must run along for nothing.
        "evaluation": {"every_steps": 10, "sampling": {"prompts": PROMPTS_PER_CHUNK, "max_new_tokens": 5}},
        "loss": {"preset": "dpo"},
        "references": {"primary": "own", "models": {"own": {"model": "policy"}}},
    }
    one, two = run_of("one", **sections), run_of("two", parallel=FSDP, **sections)
    two = two.model_copy(update={"storage_path": f"{two.storage_path}-two"})  # with scores of its own to make
    train_run(one)
    train_run(two)
    assert len(losses(one.folder)) == STEPS
    assert losses(two.folder) == pytest.approx(losses(one.folder), abs=1e-4)
    measured = ("eval/loss", "eval/kl/own", "eval/samples/length")
    for found, expected in zip(
        evaluations(two.folder, *measured), evaluations(one.folder, *measured), strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-3)
    assert_same_weights(exported(two.folder), exported(one.folder))
    adapter = "adapter/adapter_model.safetensors"
    assert_same_weights(exported(two.folder, adapter), exported(one.folder, adapter))
    assert_loads_with_the_logits_in_hand(two.folder)


@pytest.mark.usefixtures("cluster")
def test_all_weights_in_zero_3_shards_with_the_best_kept_and_references_first(
    run_of: Callable[..., RunConfig],
) -> None:
    base = run_of("base")
    sections: dict[str, Any] = {
        "policy": {"adapter": None},
        "training": {"max_steps": STEPS, "learning_rate": 1e-3, "gradient_checkpointing": True},
        "evaluation": {"every_steps": 5, "metric": "eval/loss", "keep": "best"},
        "references": base.references.model_dump() | {"mode": "precompute"},
    }
    one, two = run_of("one", **sections), run_of("two", parallel=ZERO, **sections)
    first, second = train_run(one), train_run(two)
    assert losses(two.folder) == pytest.approx(losses(one.folder), abs=1e-4)
    assert second.result.exported_step == first.result.exported_step
    assert_same_weights(exported(two.folder), exported(one.folder))
    assert_loads_with_the_logits_in_hand(two.folder)


@pytest.fixture
def command(run_of: Callable[..., RunConfig]) -> Iterator[Callable[..., Driver]]:
    """`command(name, **sections)`: `polyref train`, which surely ends with the test."""
    drivers: list[Driver] = []

    def start(name: str, **sections: Any) -> Driver:
        run = run_of(name, **sections)
        file = Path(run.storage_path).parent / f"{name}-{len(drivers)}.yaml"
        file.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_unset=True)))
        drivers.append(Driver("train", file))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()


@pytest.mark.usefixtures("cluster")
def test_a_zero_3_run_of_two_workers_goes_on_with_one(
    command: Callable[..., Driver], run_of: Callable[..., RunConfig]
) -> None:
    sections: dict[str, Any] = {
        "policy": {"adapter": None},
        "training": {"max_steps": 40, "save_every": 5, "learning_rate": 1e-3},
        "loss": {"preset": "simpo"},
        "references": {},
    }
    train_run(run_of("whole", **sections))
    folder = run_of("moved").folder
    checkpoints = folder / "checkpoints"
    first = command("moved", **sections, parallel=ZERO)
    first.until(lambda: len(list(checkpoints.glob("checkpoint_*/progress.json"))) > 1)
    first.kill()
    newest = max(checkpoints.glob("checkpoint_*/progress.json")).parent
    parts = sorted(path.name for path in newest.glob("state-*.safetensors"))
    assert parts in (
        ["state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors"],
        ["state-00000-of-00002.safetensors"],  # killed before the other was there: the one before it counts
    )
    at = os.stat(newest).st_mtime
    train_run(run_of("moved", **sections))
    made = [line["time"] for line in read_metrics(folder) if "loss" in line]
    assert len(made) == 40
    assert made[4] < at, "the first checkpoint's steps were not taken again"
    assert losses(folder) == pytest.approx(losses(folder.parent / "whole"), abs=1e-4)
    assert_same_weights(exported(folder), exported(folder.parent / "whole"))
    with safe_open(max(checkpoints.glob("checkpoint_*/state-*.safetensors")), framework="pt") as last:
        assert float(last.get_tensor(next(key for key in last.keys() if key.endswith("/step")))) == 40  # noqa: SIM118
