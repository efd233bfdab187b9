"""Model settings are refused at construction, with the remedy."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from models.config import LoraSettings, ModelConfig, PolicyConfig


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ModelConfig, {"model": " "}, "must not be empty; give a hub id or a path"),
        (ModelConfig, {"model": "x", "modle": 1}, "Extra inputs are not permitted"),
        (
            ModelConfig,
            {"model": "models:/a/1", "revision": "main"},
            "pinned by its version: models:/<name>/<ver",
        ),
        (ModelConfig, {"model": "x.gguf", "quantization": "4bit"}, "must be none for a GGUF file"),
        (ModelConfig, {"model": "x", "quantization": "8bit", "dtype": "float32"}, "use bfloat16 or auto"),
        (ModelConfig, {"model": "x", "dtype": "int8"}, "'auto', 'float32', 'bfloat16' or 'float16'"),
        (
            PolicyConfig,
            {"model": "x", "quantization": "4bit"},
            r"only through an adapter; add adapter: \{r: 16\}",
        ),
        (PolicyConfig, {"model": "x", "dtype": "float16"}, "would need loss scaling"),
        (LoraSettings, {"r": 0}, "greater than or equal to 1"),
        (LoraSettings, {"target_modules": []}, "at least one module; try all-linear"),
    ],
)
def test_wrong_settings(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**settings)


def test_dtype_follows_the_device() -> None:
    auto = ModelConfig(model="x")
    assert (auto.resolve_dtype("cpu"), auto.resolve_dtype("cuda")) == ("float32", "bfloat16")
    assert ModelConfig(model="x", quantization="4bit").resolve_dtype("cpu") == "bfloat16"
    assert ModelConfig(model="x", dtype="float16").resolve_dtype("cpu") == "float16"


def test_settings_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, models.config;"
        "loaded = {'torch', 'transformers', 'peft'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
