"""One MLflow store on sqlite, tiny exported policies, and what a run would hand over with them."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from orchestrator.tracking.mlflow import connect_to_mlflow
from orchestrator.tracking.tracker import Tracker
from tests.support import tiny
from tests.support.policies import Exported, probe_model


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@pytest.fixture(scope="session")
def store_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables: making it takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("store")
    connect_to_mlflow(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


@pytest.fixture
def uri(store_template: Path, tmp_path: Path) -> str:
    """A fresh MLflow store of this test's own."""
    shutil.copy(store_template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="session")
def exported(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A LoRA policy whose adapter is not zero, exported merged and alone."""
    folder = tmp_path_factory.mktemp("exported")
    settings = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), settings).eval()
    probe = probe_model(model, AutoModelForCausalLM.from_pretrained(tiny_llama_folder))
    model.save_pretrained(folder / "adapter")
    copy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama_folder), folder / "adapter"
    ).merge_and_unload()
    tiny.save(folder / "merged", copy, tiny.byte_tokenizer())
    return Exported(model, tiny_llama_folder, folder / "merged", folder / "adapter", probe)


@pytest.fixture
def policy(exported: Exported, tmp_path: Path) -> Exported:
    """The exported policy in folders that the test may spoil."""
    shutil.copytree(exported.merged, tmp_path / "export" / "merged")
    shutil.copytree(exported.adapter, tmp_path / "export" / "adapter")
    return Exported(
        exported.model,
        exported.base,
        tmp_path / "export" / "merged",
        tmp_path / "export" / "adapter",
        exported.probe,
    )


@pytest.fixture
def run_id(uri: str, tmp_path: Path) -> str:
    return Tracker.resume_or_start(None, name="a-run", uri=uri, folder=tmp_path / "a-run").run_id
