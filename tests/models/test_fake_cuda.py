"""Steps, evaluations, sampling and scoring by references on device `cuda`: fake tensors, no GPU."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from losses.presets import PRESETS

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(
        shutil.which("g++") is None, reason="needs g++, to compile a device that does nothing"
    ),
    pytest.mark.xdist_group("fake_cuda"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a CUDA device of its own"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Name, error and waits of every case, from one process: its torch is not fit for other tests."""
    command = [sys.executable, "-m", "tests.support.fake_cuda", str(tmp_path_factory.mktemp("device"))]
    lines = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_every_case_runs_without_a_tensor_on_another_device(results: list[dict[str, Any]]) -> None:
    assert [result["error"] for result in results if result["error"]] == []
    names = {result["name"] for result in results}
    assert {f"step {preset}, full float32" for preset in PRESETS} < names
    for policy in ("full float32", "lora float32", "full bfloat16", "lora bfloat16"):
        assert {f"{case}, {policy}" for case in ("step dpo", "sampling", "reference")} < names


def test_the_documentation_lists_where_the_host_waits(results: list[dict[str, Any]]) -> None:
    """Of a training step with its metrics and an evaluation of it: waits for the device, by place."""
    waits = Counter[str]()
    for result in results:
        if result["name"].startswith("step"):
            waits |= Counter(result["waits"])
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([^`]+: \w+)` \| ", page, re.MULTILINE)
    assert sorted(waits) == sorted(listed)
    assert waits["orchestrator/worker/metrics.py: sum_over_ranks"] == 2  # one for the step, one for the pass
    assert waits["orchestrator/worker/step.py: run_training_step"] == 1
