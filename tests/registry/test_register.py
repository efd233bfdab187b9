"""A registered version is the trained model in every way users load it, or it does not count."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml
from mlflow import MlflowClient
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.probe import LogitProbe, build_probe_rows, compute_probe_logits
from orchestrator.errors import UsageError
from orchestrator.files import digest_folder
from orchestrator.registry import register as register_module
from orchestrator.registry.download import ResolvedModel, resolve_model
from orchestrator.registry.model_card import render_model_card
from orchestrator.registry.register import RegistryError, register_model, verify_export
from orchestrator.tracking.mlflow import connect_to_mlflow
from tests.support import tiny
from tests.support.policies import Exported, lineage, probe_model


def _register(uri: str, run_id: str, policy: Exported, **changes: Any) -> ResolvedModel:
    arguments: dict[str, Any] = {
        "name": "sentiment",
        "folder": policy.merged,
        "adapter": policy.adapter,
        "run_id": run_id,
        "lineage": lineage(),
        "probe": policy.probe,
    }
    return register_model(uri, **(arguments | changes))


def _versions(uri: str) -> list[Any]:
    return list(connect_to_mlflow(uri).search_model_versions("name='sentiment'"))


def _logits(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows).logits


def test_all_loaders_give_the_trained_models_logits(
    uri: str, run_id: str, policy: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = _register(uri, run_id, policy, alias="champion")
    rows, expected = policy.probe.rows, _logits(policy.model, policy.probe.rows)
    start = _logits(AutoModelForCausalLM.from_pretrained(policy.base), rows)
    assert (start - expected).abs().max() > 0.01  # the adapter matters

    folder = resolve_model("models:/sentiment@champion", uri).folder
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(_logits(plain, rows), expected, rtol=0, atol=1e-5)

    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy.base), folder / "adapter")
    torch.testing.assert_close(_logits(lora, rows), expected, rtol=0, atol=1e-6)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    parts = mlflow.transformers.load_model("models:/sentiment@champion", return_type="components")
    torch.testing.assert_close(_logits(parts["model"], rows), expected, rtol=0, atol=1e-5)
    text = "Ein Maß <|im_end|>"
    assert parts["tokenizer"](text)["input_ids"] == tiny.byte_tokenizer()(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == parts["tokenizer"](text)["input_ids"]
    assert parts["tokenizer"].chat_template == tiny.CHATML
    served = mlflow.pyfunc.load_model(registered.uri_pinned)
    assert isinstance(served.predict(["abc"])[0], str)


def test_a_full_model_without_adapter(uri: str, run_id: str, policy: Exported) -> None:
    registered = _register(uri, run_id, policy, adapter=None)
    assert not (registered.folder / "adapter").exists()
    assert "PeftModel" not in (registered.folder / "README.md").read_text()


def test_a_bfloat16_export_is_within_its_rounding(uri: str, run_id: str, policy: Exported) -> None:
    half = AutoModelForCausalLM.from_pretrained(policy.merged, dtype=torch.bfloat16)
    half.save_pretrained(policy.merged)
    registered = _register(uri, run_id, policy)
    assert AutoModelForCausalLM.from_pretrained(registered.folder, dtype="auto").dtype == torch.bfloat16


def test_weights_are_the_exported_bytes_and_nothing_is_pickled(
    uri: str, run_id: str, policy: Exported
) -> None:
    before = digest_folder(policy.merged)
    registered = _register(uri, run_id, policy)
    assert digest_folder(policy.merged) == before  # the card did not go into the export through a hard link
    assert digest_folder(registered.folder) == registered.digest
    exported = (policy.merged / "model.safetensors").read_bytes()
    assert (registered.folder / "model.safetensors").read_bytes() == exported
    allowed = {".safetensors", ".json", ".md", ".txt", ".yaml", ".jinja", ""}
    kept = {p.suffix for p in registered.folder.parent.rglob("*") if p.is_file()}
    assert kept <= allowed, kept


def test_lineage_is_on_the_version_and_holds_no_secret(uri: str, run_id: str, policy: Exported) -> None:
    registered = _register(uri, run_id, policy)
    version = connect_to_mlflow(uri).get_model_version("sentiment", str(registered.version))
    assert version.run_id == run_id
    assert version.tags["reference.base"] == "f" * 40
    assert version.tags["pin.movie"] == "models:/movie-sft/4"
    assert version.tags["references.primary"] == "base"
    assert version.tags["data.digest"] == "d" * 40
    assert float(version.tags["metric.eval/accuracy"]) == 0.75
    written = (registered.folder.parent / "lineage.json").read_text()
    assert json.loads(written)["references"]["movie"]["fingerprint"] == "e" * 40
    assert json.loads(written)["version"] == 2
    assert "hunter2" not in written
    everything = b"".join(p.read_bytes() for p in registered.folder.parent.rglob("*") if p.is_file())
    assert b"hunter2" not in everything
    assert "hunter2" not in str(version.tags)


def test_an_alias_is_given_by_the_same_checks_as_promote(
    uri: str, run_id: str, policy: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    judged = {"evaluation": {"metric": "eval/label_nll"}}
    first = _register(uri, run_id, policy, alias="champion", lineage=lineage(config=judged))
    client = connect_to_mlflow(uri)
    assert client.get_model_version("sentiment", "1").tags["evaluation.metric"] == "eval/label_nll"
    assert client.get_model_version("sentiment", "1").tags["evaluation.set"] == "in_domain"
    place = client.get_run(run_id).info.experiment_id
    worse = lineage(config=judged, after={"eval/accuracy": 0.9, "eval/label_nll": 0.7})
    assert caplog.records == []
    second = _register(uri, client.create_run(place).info.run_id, policy, alias="champion", lineage=worse)
    assert second.version == 2
    assert resolve_model("models:/sentiment@champion", uri) == first
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "models:/sentiment/2 was not promoted to 'champion': eval/label_nll of version 2 is 0.7000, that of "
        "version 1, which holds it, is 0.6100. It is registered without the alias; `polyref models "
        f"promote sentiment/2 --alias champion --force --tracking-uri {uri}` assigns it anyway"
    )
    better = lineage(config=judged, after={"eval/label_nll": 0.5})
    _register(uri, client.create_run(place).info.run_id, policy, alias="champion", lineage=better)
    assert resolve_model("models:/sentiment@champion", uri).version == 3


def test_the_adapter_names_its_base_as_others_find_it(uri: str, run_id: str, policy: Exported) -> None:
    config = policy.adapter / "adapter_config.json"
    settings = json.loads(config.read_text())
    snapshot = "/home/me/.cache/huggingface/hub/models--tiny--base/snapshots/0123abc"
    config.write_text(json.dumps(settings | {"base_model_name_or_path": snapshot}))
    registered = _register(uri, run_id, policy)
    for path in (registered.folder / "adapter").iterdir():
        assert b"/home/me" not in path.read_bytes()
    found = PeftConfig.from_pretrained(registered.folder / "adapter")
    assert (found.base_model_name_or_path, found.revision) == ("tiny/base", "0123abc")
    assert json.loads(config.read_text())["base_model_name_or_path"] == snapshot  # the export is as it was


def test_an_adapter_on_another_adapters_merged_base_claims_no_base_on_the_hub(
    uri: str, run_id: str, policy: Exported
) -> None:
    registered = _register(uri, run_id, policy)  # its base is not the snapshot that the lineage pins
    found = PeftConfig.from_pretrained(registered.folder / "adapter")
    assert (found.base_model_name_or_path, found.revision) == (str(policy.base), None)


def _spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40:] = bytes(40)
    path.unlink()  # it may be a hard link to the export
    path.write_bytes(data)


def test_a_broken_upload_does_not_count(
    uri: str, run_id: str, policy: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = MlflowClient.log_artifacts

    def break_upload(client: MlflowClient, run: str, folder: str, place: str | None = None) -> None:
        upload(client, run, folder, place)
        root = Path(client.get_run(run).info.artifact_uri.removeprefix("file://")) / str(place)
        _spoil(root / "model" / "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", break_upload)
        with pytest.raises(
            RegistryError, match="sentiment/1 is not the model that was trained, and was deleted"
        ):
            _register(uri, run_id, policy, alias="champion")
    assert _versions(uri) == []
    with pytest.raises(UsageError, match="no versions yet"):
        resolve_model("models:/sentiment@champion", uri)
    assert _register(uri, run_id, policy).version >= 1  # once the store is whole again, so is the version


def test_an_export_that_lost_its_adapter_does_not_count(uri: str, run_id: str, policy: Exported) -> None:
    shutil.copy(policy.base / "model.safetensors", policy.merged / "model.safetensors")
    with pytest.raises(RegistryError, match="its logits differ by"):
        _register(uri, run_id, policy)
    assert _versions(uri) == []


def test_an_export_that_lost_a_weight_does_not_count(uri: str, run_id: str, policy: Exported) -> None:
    path = policy.merged / "model.safetensors"
    weights = load_file(path)
    weights.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(RegistryError, match=r"1 weights are missing or do not belong: .*q_proj"):
        _register(uri, run_id, policy)
    assert _versions(uri) == []


@pytest.mark.parametrize("cut_in", ["_upload_version", "_verify_version"])
def test_killed_in_the_middle_and_run_again_makes_one_version(
    uri: str, run_id: str, policy: Exported, monkeypatch: pytest.MonkeyPatch, cut_in: str
) -> None:
    whole = getattr(register_module, cut_in)

    def cut(*arguments: Any, **keywords: Any) -> None:
        if cut_in == "_upload_version":
            whole(*arguments, **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(register_module, cut_in, cut)
        with pytest.raises(KeyboardInterrupt):
            _register(uri, run_id, policy, alias="champion")
    with pytest.raises(UsageError, match="never verified"):
        resolve_model("models:/sentiment/1", uri)
    assert not list(policy.merged.parent.glob(".register-*"))

    first = _register(uri, run_id, policy, alias="champion")
    again = _register(uri, run_id, policy, alias="champion")
    assert first == again
    assert [int(v.version) for v in _versions(uri)] == [first.version]
    assert resolve_model("models:/sentiment@champion", uri).version == first.version


def test_a_stale_unverified_version_of_the_run_is_cleared_away(
    uri: str, run_id: str, policy: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short with the weights of an earlier checkpoint: only the last weights become a version."""
    with monkeypatch.context() as patch:
        patch.setattr(
            register_module, "_verify_version", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            _register(uri, run_id, policy, folder=policy.base)
    registered = _register(uri, run_id, policy)
    assert [int(v.version) for v in _versions(uri)] == [registered.version]


def test_other_runs_and_other_weights_get_versions_of_their_own(
    uri: str, run_id: str, policy: Exported
) -> None:
    first = _register(uri, run_id, policy)
    client = connect_to_mlflow(uri)
    other_run = client.create_run(client.get_run(run_id).info.experiment_id).info.run_id
    second = _register(uri, other_run, policy)
    base = probe_model(AutoModelForCausalLM.from_pretrained(policy.base))
    shutil.copy(policy.base / "model.safetensors", policy.merged / "model.safetensors")
    third = _register(uri, run_id, policy, probe=base, adapter=None)
    assert [first.version, second.version, third.version] == [1, 2, 3]
    verify_export(
        resolve_model("models:/sentiment/1", uri).folder, policy.probe
    )  # the later upload left it alone


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "holds no config.json: export a model there"),
        ("tokenizer_config.json", "holds no tokenizer_config.json: export a tokenizer there"),
        ("model.safetensors", "holds no safetensors"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    uri: str, run_id: str, policy: Exported, missing: str, message: str
) -> None:
    (policy.merged / missing).unlink()
    with pytest.raises(UsageError, match=message):
        _register(uri, run_id, policy)


def test_an_adapter_folder_without_weights_is_refused(uri: str, run_id: str, policy: Exported) -> None:
    (policy.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"adapter holds no adapter_model\.safetensors"):
        _register(uri, run_id, policy)


def test_a_name_mlflow_refuses(uri: str, run_id: str, policy: Exported) -> None:
    with pytest.raises(UsageError, match=r"tracking.registered_model 'a/b'"):
        _register(uri, run_id, policy, name="a/b")


def test_a_probe_survives_its_file(policy: Exported, tmp_path: Path) -> None:
    policy.probe.save(tmp_path / "probe.safetensors")
    back = LogitProbe.load(tmp_path / "probe.safetensors")
    assert torch.equal(back.rows, policy.probe.rows)
    assert torch.equal(back.logits, policy.probe.logits)
    assert back.initial_logits is not None
    assert policy.probe.initial_logits is not None
    assert torch.equal(back.initial_logits, policy.probe.initial_logits)
    assert back.dtype == torch.float32


def test_a_probe_without_the_initial_policy_allows_what_rounding_does(
    policy: Exported, tmp_path: Path
) -> None:
    old = replace(policy.probe, initial_logits=None)
    old.save(tmp_path / "probe.safetensors")
    back = LogitProbe.load(tmp_path / "probe.safetensors")
    assert back.initial_logits is None
    assert set(verify_export(policy.merged, back)) == {"polyref.kl_from_trained"}
    with pytest.raises(RegistryError, match=r"differ by \S+ nats per token .*, where 1e-06 is allowed$"):
        verify_export(policy.base, back)


def test_the_distances_are_on_the_version_and_in_the_refusal(uri: str, run_id: str, policy: Exported) -> None:
    registered = _register(uri, run_id, policy)
    tags = connect_to_mlflow(uri).get_model_version("sentiment", str(registered.version)).tags
    start = float(tags["polyref.kl_of_initial_from_trained"])
    trained, initial = (
        x.double().softmax(-1) for x in (policy.probe.logits, policy.probe.initial_logits) if x is not None
    )
    assert start == pytest.approx((trained * (trained / initial).log()).sum(-1).mean().item(), rel=1e-2)
    assert float(tags["polyref.kl_from_trained"]) < 1e-6 * start
    with pytest.raises(
        RegistryError, match=rf"differ by {start:.1e} .* initial policy's differ by {start:.1e}"
    ):
        verify_export(policy.base, policy.probe)


def test_a_probe_trims_its_rows_and_keeps_the_models_mode(policy: Exported) -> None:
    model, rows = policy.model.train(), build_probe_rows([list(range(40)), [], list(range(30))])
    compute_probe_logits(model, rows)
    assert rows.shape == (2, 16)
    assert model.training
    model.eval()
    with pytest.raises(ValueError, match="at least one token row"):
        build_probe_rows([[], []])


def test_the_card_is_yaml_and_names_what_the_model_is() -> None:
    measured = {"eval/accuracy": 0.75, "eval/safety/accuracy": 0.625}
    card = render_model_card("sentiment", lineage(after=measured), adapter=True)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "tiny/base"
    assert front["library_name"] == "transformers"
    for said in ("base (primary)", "models:/movie-sft/4", "e" * 16, "skipped, too long", "| 0.5 | 0.75 |"):
        assert said in card
    assert "| judged by the set | in_domain |" in card
    assert "| eval/safety/accuracy |  | 0.625 |" in card
    loss = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert loss["references"]["weights"] == [0.5, 0.5]


def test_the_card_of_a_local_base_names_no_machine_path() -> None:
    card = render_model_card("sentiment", lineage("/data/secret-project/llama"), adapter=True)
    assert "secret-project" not in card
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
