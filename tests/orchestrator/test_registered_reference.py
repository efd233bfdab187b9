"""A registered model as a reference of the next run, and what the registry then says of that run's model."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.cli.main import run_command_line
from orchestrator.config.run import RunConfig
from orchestrator.driver.prepare import prepare_run
from orchestrator.driver.record import RunRecord, read_record
from orchestrator.driver.train import train_run
from orchestrator.errors import UsageError
from orchestrator.registry.download import resolve_model
from orchestrator.tracking.metrics_file import read_metrics

pytestmark = pytest.mark.usefixtures("cluster")

IDS = torch.tensor([[70, 105, 108, 109, 32, 105, 115, 32, 102, 117, 110]])


@pytest.fixture
def movie(run_of: Any, tmp_path: Path) -> RunConfig:
    """Supervised training of all weights on prompts with one completion each."""
    rows = [{"prompt": f"Film {n} is ", "completion": "warm and sharp."} for n in range(12)]
    data = tmp_path / "completions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_of(
        "movie",
        policy={"adapter": None},
        references={},
        data={"train": str(data)},
        loss={"preset": "sft"},
        training={"max_steps": 2, "learning_rate": 3e-3},
        tracking={"registered_model": "movie", "alias": "champion"},
    )


@pytest.fixture
def after(run_of: Any, tiny_llama_folder: Path) -> Callable[..., RunConfig]:
    """`after(...)`: preference training against the base and the champion of `movie`."""
    models = {"base": {"model": str(tiny_llama_folder)}, "movie": {"model": "models:/movie@champion"}}

    def make(**sections: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "references": {"primary": "base", "models": models},
            "training": {"max_steps": 2, "save_every": 1},
            "tracking": {"registered_model": "films", "alias": "candidate"},
        }
        return run_of("after", **(settings | sections))

    return make


def polyref(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["polyref", *arguments])
    capfd.readouterr()
    code: Any = 0
    try:
        run_command_line()
    except SystemExit as left:
        code = left.code or 0
    return code, capfd.readouterr().out


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def unfinished(folder: Path) -> None:
    """Put a run's record back to where a kill during training would have left it."""
    record = read_record(folder)
    assert record is not None
    record.result, record.registered, record.finished = None, None, False
    record.write(folder)


def test_a_registered_model_is_the_next_runs_reference(
    movie: RunConfig,
    after: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert train_run(movie).registered == "models:/movie/1"
    record = train_run(after())
    folder = after().folder
    assert pin(record.pins) == "models:/movie/1"
    assert record.registered == "models:/films/1"
    assert record.reference_counts["movie"]["scored"] > 0
    assert record.reference_counts["movie"]["replicas_started"] == 1

    storage = str(folder.parent)
    uri = f"sqlite:///{folder.parent / 'mlflow.db'}"
    assert_loads_everywhere(uri, folder, base=after().policy.model)
    assert_listed_and_shown(record, storage, monkeypatch, capfd)
    assert_cards_are_true(folder, storage, monkeypatch, capfd)
    assert_pinned_where_the_alias_moves(after, uri)


def pin(pins: Mapping[str, str]) -> str:
    """What the reference `movie` stood for."""
    return pins["references.models.movie"]


def assert_loads_everywhere(uri: str, folder: Path, *, base: str) -> None:
    """transformers, peft and MLflow give the same logits from the registered version as from the export."""
    version = resolve_model("models:/films@candidate", uri)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder / "export" / "model"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(version.folder)), expected)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(version.folder / "adapter")
    )
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base)), expected, atol=1e-3)

    mlflow.set_tracking_uri(uri)
    try:
        loaded = mlflow.transformers.load_model("models:/films@candidate", return_type="components")
    finally:
        mlflow.set_tracking_uri(None)
    assert torch.equal(logits(loaded["model"].float()), expected)
    text = "Film 3 is warm."
    assert loaded["tokenizer"](text)["input_ids"] == AutoTokenizer.from_pretrained(base)(text)["input_ids"]


def assert_listed_and_shown(
    record: RunRecord,
    storage: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, out = polyref(monkeypatch, capfd, "models", "list", "--storage-path", storage, "--json")
    assert code == 0
    assert [(v["name"], v["version"], v["aliases"], v["run"]) for v in json.loads(out)] == [
        ("films", 1, ["candidate"], "after"),
        ("movie", 1, ["champion"], "movie"),
    ]
    shown = polyref(monkeypatch, capfd, "models", "show", "films@candidate", "--storage-path", storage)
    assert shown[0] == 0
    lines = dict(line.split("\t", 1) for line in shown[1].splitlines())
    assert lines["pin.movie"] == "models:/movie/1"
    assert lines["reference.movie"] == record.identity["references"]["movie"]
    assert lines["reference.base"] == record.identity["references"]["base"]
    assert lines["base_model"] == record.pins["policy"]
    assert lines["loss.preset"] == "mrpo"
    assert lines["data.digest"] == record.identity["data"]["train"]
    assert float(lines["eval/accuracy"]) == pytest.approx(record.result.metrics["eval/accuracy"], abs=1e-3)


def assert_cards_are_true(
    folder: Path, storage: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What would be pushed of a supervised policy claims no preferences, and nothing names this machine."""
    cards = {}
    for name in ("movie", "films"):
        to = folder.parent / f"{name}-as-pushed"
        push = ("push", f"{name}/1", f"me/{name}", "--to", str(to), "--storage-path", storage)
        assert polyref(monkeypatch, capfd, "models", *push)[0] == 0
        cards[name] = ModelCard.load(to / "README.md")
        content = b"".join(p.read_bytes() for p in to.rglob("*") if p.is_file())
        assert str(folder.parent).encode() not in content
    assert "preference" not in str(cards["movie"])
    assert "trained on pairwise preferences" in cards["films"].text
    assert {result.metric_type for result in cards["films"].data.eval_results} >= {"accuracy", "loss"}
    assert "| training.max_steps | 2 |" in cards["films"].text
    assert f"| torch | {torch.__version__} |" in cards["films"].text


def assert_pinned_where_the_alias_moves(after: Callable[..., RunConfig], uri: str) -> None:
    """A run goes on with the version that it began with; a new run takes what the alias stands for now."""
    folder, client = after().folder, MlflowClient(uri)
    identity = json.loads((folder / "run.json").read_text())["identity"]
    before = read_metrics(folder)
    other = client.get_model_version("films", "1")
    moved = client.create_model_version("movie", other.source, other.run_id, tags=other.tags)
    client.set_registered_model_alias("movie", "champion", moved.version)

    unfinished(folder)
    resumed = train_run(after())
    assert pin(resumed.pins) == "models:/movie/1"
    assert resumed.identity == identity
    assert resumed.registered == "models:/films/1"
    assert read_metrics(folder) == before
    assert pin(prepare_run(after()).pins) == "models:/movie/2"

    client.delete_model_version("movie", "1")
    unfinished(folder)
    with pytest.raises(
        UsageError, match=r"references.models.movie: 'models:/movie/1' is not in the registry"
    ):
        train_run(after())
