"""What docs/python.md does, and commands in a project that has `models/` and `losses.py` of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator.config.run import RunConfig

ROOT = Path(__file__).parents[2]
LINK = """
from torch.nn.functional import logsigmoid


def f(h, *, beta):
    return -logsigmoid(beta * h)
"""


@pytest.fixture
def project(tmp_path: Path, run_of: object) -> Path:
    """A project with a run file beside modules of polyref's names and a link of its own, equal to DPO's."""
    folder = tmp_path / "project"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").write_text("MINE = True\n")
    (folder / "losses.py").write_text("MINE = True\n")
    (folder / "own_link.py").write_text(LINK)
    run: RunConfig = run_of("own", training={"max_steps": 4})  # type: ignore[operator]
    content = run.model_dump(mode="json") | {
        "storage_path": str(folder / "runs"),
        "loss": {
            "link": {"type": "function", "function": "own_link:f"},
            "references": {"combine": "harmonic"},
        },
        "tracking": {"registered_model": "film-taste"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder


def polyref(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the console command in the project, whose folder comes first on Python's path."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(project), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "RAY_ADDRESS": "local",
    }
    command = [sys.executable, "-m", "polyref", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def losses(project: Path, name: str) -> list[float]:
    lines = (project / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.long
def test_a_link_of_ones_own_trains_as_polyrefs_and_a_changed_one_is_another_run(project: Path) -> None:
    checked = polyref(project, "check", "run.yaml")
    assert checked.returncode == 0, checked.stderr
    trained = polyref(project, "train", "run.yaml")
    assert trained.returncode == 0, trained.stderr
    assert "registered as models:/film-taste/1" in trained.stdout
    builtin = yaml.safe_load((project / "run.yaml").read_text())
    builtin |= {
        "name": "dpo",
        "loss": {"references": {"combine": "harmonic"}, "link": {"type": "sigmoid"}},
        "tracking": {},
    }
    (project / "dpo.yaml").write_text(yaml.safe_dump(builtin))
    again = polyref(project, "train", "dpo.yaml")
    assert again.returncode == 0, again.stderr
    assert len(losses(project, "own")) == 4
    assert losses(project, "own") == pytest.approx(losses(project, "dpo"), rel=1e-6)

    (project / "own_link.py").write_text(LINK.replace("beta * h", "2 * beta * h"))
    changed = polyref(project, "train", "run.yaml", "training.max_steps=6")
    assert changed.returncode == 2
    assert "functions.loss.link.function: " in changed.stderr
    (project / "own_link.py").write_text(LINK.replace("return ", "return 0 * "))
    refused = polyref(project, "check", "run.yaml")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "loss.link.function own_link:f has a gradient of zero" in refused.stderr


@pytest.mark.long
def test_the_code_of_the_python_page_runs_from_top_to_bottom(project: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    assert {*re.findall(r"polyref\.(\w+)\(", code)} >= {
        "preference_loss",
        "train",
        "tune",
        "check",
        "find_model",
    }
    (project / "page.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch.Size([2]) torch.Size([2])" in done.stdout
    assert "\n4 " in done.stdout
    assert "models:/film-taste/1" in done.stdout.splitlines()[-1]
