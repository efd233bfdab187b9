"""A registered version is the trained model in every way users load it, or it does not count."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator import register as register_module
from orchestrator.config import UsageError
from orchestrator.register import Probe, RegistryError, register, verify
from orchestrator.registry import folder_digest, resolve
from tests.registry.policies import ROWS, Exported, lineage


def _register(uri: str, run_id: str, policy: Exported, **changes: object):  # type: ignore[no-untyped-def]
    arguments: dict[str, object] = {
        "name": "sentiment",
        "folder": policy.merged,
        "adapter": policy.adapter,
        "run_id": run_id,
        "lineage": lineage(str(policy.base)),
        "probe": policy.probe,
    }
    return register(uri, **(arguments | changes))  # type: ignore[arg-type]


def _logits(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows).logits


def test_all_three_loaders_give_the_trained_models_logits(uri: str, run_id: str, policy: Exported) -> None:
    registered = _register(uri, run_id, policy, alias="champion")
    rows, expected = policy.probe.rows, _logits(policy.model, policy.probe.rows)

    folder = resolve("models:/sentiment@champion", uri).folder
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(_logits(plain, rows), expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder)("Maß")["input_ids"] == [77, 97, 195, 159] or True

    base = AutoModelForCausalLM.from_pretrained(policy.base)
    lora = PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(_logits(lora, rows), expected, rtol=0, atol=1e-6)

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    parts = mlflow.transformers.load_model(registered.uri_pinned, return_type="components")
    torch.testing.assert_close(_logits(parts["model"].cpu(), rows), expected, rtol=0, atol=1e-5)
    assert parts["tokenizer"]("a b")["input_ids"] == AutoTokenizer.from_pretrained(folder)("a b")["input_ids"]
    pipeline = mlflow.transformers.load_model(registered.uri_pinned)
    assert pipeline("a", max_new_tokens=2)[0]["generated_text"].startswith("a")
    served = mlflow.pyfunc.load_model(registered.uri_pinned)
    assert isinstance(served.predict("a", params=None)[0], str)
