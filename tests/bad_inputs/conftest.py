"""A good run of tiny models that tests spoil, and the commands that must refuse it."""

from pathlib import Path
from typing import NoReturn

import pytest
import ray

from tests.support.bad_inputs import ROWS, Commands, Workplace


@pytest.fixture
def workplace(tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A folder with a good run, which is also the working folder."""
    model = str(tiny_llama_folder)
    made = Workplace(
        tmp_path,
        {
            "name": "case",
            "policy": {"model": model, "adapter": {"r": 2, "alpha": 4}},
            "references": {"primary": "base", "models": {"base": {"model": model}}},
            "data": {
                "train": str(tmp_path / "pairs.jsonl"),
                "eval_fraction": 0.25,
                "max_length": 128,
                "max_prompt_length": 64,
            },
            "loss": {"preset": "dpo"},
            "training": {"max_steps": 1, "pairs_per_step": 4},
            "storage_path": str(tmp_path / "runs"),
        },
    )
    made.write_rows(ROWS)
    made.write_run()
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def commands(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Commands:
    def refuse_ray(*_args: object, **_kwargs: object) -> NoReturn:
        raise AssertionError("Ray was started for a bad input")

    monkeypatch.setattr(ray, "init", refuse_ray)
    return Commands(workplace.folder, monkeypatch, capfd)
