import subprocess
import sys

import pytest
from pydantic import ValidationError

from preferences.config import DataConfig


def test_settings_import_neither_torch_nor_transformers():
    code = (
        "import sys, preferences.config; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_defaults():
    config = DataConfig(train="train.jsonl")
    assert (config.max_length, config.max_prompt_length) == (1024, 512)
    assert (config.on_bad_row, config.on_long_row, config.ranked_pairs) == ("stop", "skip", "all")
    assert (config.eval, config.eval_fraction, config.split) == (None, None, "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_fraction": 0.0}, "eval_fraction must be between 0 and 1, got 0.0; try 0.05"),
        ({"eval_fraction": 1.5}, "eval_fraction must be between 0 and 1, got 1.5"),
        ({"eval_fraction": 0.1, "eval": "b.jsonl"}, "keep one of them"),
        ({"eval_fraction": 0.1, "eval_split": "test"}, "keep one of them"),
        ({"eval_split": "train"}, "eval_split and split are both 'train'"),
        ({"max_length": 256}, "max_length 256 and max_prompt_length 512; try max_prompt_length: 128"),
        ({"max_length": 1, "max_prompt_length": 1}, "max_length must be >= 2, got 1; try 1024"),
        ({"max_prompt_length": 0}, "max_prompt_length must be >= 1, got 0; try 512"),
        ({"columns": {"choosen": "a"}}, r"'choosen' is no field \(did you mean 'chosen'\?\)"),
        ({"columns": {"chosen": "a", "rejected": "a"}}, "columns reads 'a' for two fields"),
        ({"on_bad_row": "ignore"}, "on_bad_row"),
        ({"max_lenght": 12}, "max_lenght"),
        ({"train": ""}, "train"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"train": "a.jsonl", **settings})


def test_ignore_takes_one_name_or_several():
    assert DataConfig(train="a", ignore="score").ignore == ("score",)
    assert DataConfig(train="a", ignore=["score", "x_*"]).ignore == ("score", "x_*")
