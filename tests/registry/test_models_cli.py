"""`polyref models ...` as users type it, on a pipe."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from orchestrator.cli.models import app
from orchestrator.errors import UsageError
from orchestrator.registry.aliases import explain_refusal
from orchestrator.registry.register import register_model
from orchestrator.tracking.mlflow import connect_to_mlflow
from orchestrator.tracking.tracker import Tracker
from tests.support.policies import Exported, lineage


def _models(uri: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--tracking-uri", uri])


def _refused(uri: str, *arguments: str) -> str:
    """The one message of a UsageError, which `polyref` prints before it exits with 2."""
    result = _models(uri, *arguments)
    assert isinstance(result.exception, UsageError), result.output
    return str(result.exception)


def _version(uri: str, folder: Path, accuracy: float | None, **tags: str) -> int:
    """A version as `register` tags it, with no files behind it: the commands that only read tags."""
    client = connect_to_mlflow(uri)
    run = Tracker.resume_or_start(
        None, name=f"run-{accuracy}", uri=uri, folder=folder, params={"loss": {"beta": accuracy}, "seed": 0}
    )
    if not client.search_registered_models("name='sentiment'"):
        client.create_registered_model("sentiment")
    usual = {
        "polyref.state": "verified",
        "references.primary": "base",
        "reference.base": "f" * 40,
        "data.eval_digest": "a" * 40,
    }
    if accuracy is not None:
        usual |= {"metric.eval/accuracy": str(accuracy), "metric.eval/loss": "0.5"}
    made = client.create_model_version("sentiment", folder.as_uri(), run.run_id, tags={**usual, **tags})
    return int(made.version)


def test_list_is_tab_separated_on_a_pipe(uri: str, tmp_path: Path) -> None:
    _version(uri, tmp_path, 0.7)
    _version(uri, tmp_path, 0.65)
    connect_to_mlflow(uri).set_registered_model_alias("sentiment", "champion", "1")
    result = _models(uri, "list")
    assert result.exit_code == 0
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert lines[0][:6] == ["name", "version", "aliases", "created", "eval/accuracy", "run"]
    assert lines[0][6:] == ["loss", "judged_by", "judged_value", "judged_interval"]
    assert [[line[i] for i in (0, 1, 2, 4, 5)] for line in lines[1:]] == [
        ["sentiment", "2", "", "0.65", "run-0.65"],
        ["sentiment", "1", "champion", "0.7", "run-0.7"],
    ]
    as_json = json.loads(_models(uri, "list", "--json").stdout)
    assert as_json[1]["aliases"] == ["champion"]
    assert as_json[1]["eval/accuracy"] == 0.7
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\dZ", as_json[1]["created"])


def test_list_says_what_a_version_is_judged_by(uri: str, tmp_path: Path) -> None:
    judged = {"evaluation.metric": "eval/label_nll", "metric.eval/label_nll": "0.61", "loss.preset": "cdpo"}
    _version(uri, tmp_path, 0.7, **judged, **{"metric.eval/label_nll_interval": "0.02"})
    [listed] = json.loads(_models(uri, "list", "--json").stdout)
    shown = [listed[name] for name in ("loss", "judged_by", "judged_value", "judged_interval")]
    assert shown == ["cdpo", "eval/label_nll", 0.61, 0.02]


def test_unverified_versions_are_not_listed(uri: str, tmp_path: Path) -> None:
    _version(uri, tmp_path, 0.7, **{"polyref.state": "verifying"})
    assert json.loads(_models(uri, "list", "--json").stdout) == []
    assert "no models are registered yet" in _models(uri, "list").stderr


def test_show_one_version_or_all_of_a_name(uri: str, tmp_path: Path) -> None:
    _version(uri, tmp_path, 0.7)
    shown = dict(line.split("\t") for line in _models(uri, "show", "sentiment/1").stdout.splitlines())
    assert shown["reference.base"] == "f" * 40
    assert shown["eval/loss"] == "0.5"
    assert shown["source"] == tmp_path.as_uri()
    about = json.loads(_models(uri, "show", "models:/sentiment/1", "--json").stdout)
    assert about["metrics"] == {"eval/accuracy": 0.7, "eval/loss": 0.5}
    assert about["lineage"]["data.eval_digest"] == "a" * 40
    assert len(_models(uri, "show", "sentiment").stdout.splitlines()) == 2
    assert "no registered model is called 'sentimant'" in _refused(uri, "show", "sentimant")


def test_promote_refuses_the_worse_with_the_numbers(uri: str, tmp_path: Path) -> None:
    for accuracy in (0.7, 0.65, 0.71):
        _version(uri, tmp_path, accuracy)
    first = _models(uri, "promote", "sentiment/1")
    assert first.exit_code == 0
    assert first.stdout == "models:/sentiment@champion is version 1\n"
    message = _refused(uri, "promote", "sentiment/2")
    assert (
        "models:/sentiment/2 was not promoted to 'champion': eval/accuracy of version 2 is 0.6500" in message
    )
    assert "that of version 1, which holds it, is 0.7000; --force promotes it anyway" in message
    assert _champion(uri) == 1
    assert "until now version 1" in _models(uri, "promote", "sentiment/3").stdout
    assert _models(uri, "promote", "sentiment@champion").exit_code == 0  # as it is already
    assert _models(uri, "promote", "sentiment/2", "--force").exit_code == 0
    assert _champion(uri) == 2
    assert _models(uri, "promote", "sentiment/1", "--alias", "candidate").exit_code == 0
    assert _champion(uri) == 2


def _champion(uri: str) -> int:
    return int(connect_to_mlflow(uri).get_model_version_by_alias("sentiment", "champion").version)


@pytest.mark.parametrize(
    ("tags", "accuracy", "message"),
    [
        ({"reference.base": "e" * 40}, 0.9, r"different primary reference \(e{12} and f{12}\)"),
        ({"data.eval_digest": "b" * 40}, 0.9, r"different held-out pairs \(b{12} and a{12}\)"),
        ({"evaluation.set": "safety"}, 0.9, r"different held-out sets \(safety and unknown\)"),
        ({}, None, "of version 2 is none, that of version 1, which holds it, is 0.7000"),
        ({"metric.eval/accuracy": "nan"}, 0.9, "of version 2 is nan, that of version 1"),
        ({"metric.eval/accuracy": "high"}, 0.9, "of version 2 is nan, that of version 1"),
    ],
)
def test_promote_refuses_what_cannot_be_compared(
    uri: str, tmp_path: Path, tags: dict[str, str], accuracy: float | None, message: str
) -> None:
    _version(uri, tmp_path, 0.7)
    _version(uri, tmp_path, accuracy, **tags)
    assert _models(uri, "promote", "sentiment/1").exit_code == 0
    with pytest.raises(UsageError, match=message):
        raise UsageError(_refused(uri, "promote", "sentiment/2"))


def test_promote_refuses_unknown_references(uri: str, tmp_path: Path) -> None:
    client = connect_to_mlflow(uri)
    client.create_registered_model("theirs")
    client.create_model_version("theirs", tmp_path.as_uri())
    assert "does not say which references" in _refused(uri, "promote", "theirs/1")
    assert _models(uri, "promote", "theirs/1", "--force").exit_code == 0


def test_promote_refuses_a_reference_without_fingerprint(uri: str, tmp_path: Path) -> None:
    _version(uri, tmp_path, 0.7, **{"pin.base": "tiny/base@0123abc", "pin.movie": "models:/movie-sft/4"})
    assert "version 1 has no fingerprint of its reference movie" in _refused(uri, "promote", "sentiment/1")
    _version(uri, tmp_path, 0.7, **{"references.primary": "start"})
    assert "has no fingerprint of its reference start" in _refused(uri, "promote", "sentiment/2")
    _version(uri, tmp_path, 0.7, **{"references.primary": "none"})  # a loss without references
    assert _models(uri, "promote", "sentiment/3").exit_code == 0


NLL, LOSS, REWARD = "eval/label_nll", "eval/loss", "eval/reward"


@pytest.mark.parametrize(
    ("metric", "holder", "candidate", "refusal"),
    [
        (NLL, {NLL: 0.6}, {NLL: 0.5}, None),  # less is better
        (NLL, {NLL: 0.6}, {NLL: 0.6}, None),
        (NLL, {NLL: 0.5}, {NLL: 0.6}, "eval/label_nll of version 2 is 0.6000, that of version 1"),
        (NLL, {}, {NLL: 0.6}, "eval/label_nll of version 2 is 0.6000, that of version 1, .* is none"),
        (REWARD, {REWARD: 1.0}, {REWARD: 2.0}, None),
        (None, {}, {}, None),
        (None, {"eval/entropy": 1.0}, {"eval/entropy": 2.0}, None),  # neither is better or worse
        (None, {LOSS: 0.7}, {LOSS: 0.6}, None),  # a loss without pairs has no accuracy
        (None, {LOSS: 0.6}, {LOSS: 0.7}, "eval/loss of version 2 is 0.7000"),
    ],
)
def test_versions_are_judged_by_the_candidates_own_metric(
    uri: str,
    tmp_path: Path,
    metric: str | None,
    holder: dict[str, float],
    candidate: dict[str, float],
    refusal: str | None,
) -> None:
    judged = {"evaluation.metric": metric} if metric else {}
    for measured in (holder, candidate):
        values = {f"metric.{name}": str(value) for name, value in measured.items()}
        _version(uri, tmp_path, None, **judged, **values)
    assert _models(uri, "promote", "sentiment/1").exit_code == 0
    if refusal is None:
        assert _models(uri, "promote", "sentiment/2").exit_code == 0
    else:
        assert re.search(refusal, _refused(uri, "promote", "sentiment/2"))


@pytest.mark.parametrize(
    ("metric", "digest", "what"),
    [
        (LOSS, "loss.digest", "loss or references"),
        (REWARD, "evaluation.sampling_digest", "samples or reward"),
    ],
)
def test_a_metric_that_depends_on_more_is_compared_among_equals(
    uri: str, tmp_path: Path, metric: str, digest: str, what: str
) -> None:
    tags = {"evaluation.metric": metric, f"metric.{metric}": "0.5"}
    for value in ("a" * 64, "b" * 64, "a" * 64):
        _version(uri, tmp_path, 0.7, **tags, **{digest: value})
    assert _models(uri, "promote", "sentiment/1").exit_code == 0
    assert f"different {what} ({'b' * 12} and {'a' * 12})" in _refused(uri, "promote", "sentiment/2")
    assert _models(uri, "promote", "sentiment/3").exit_code == 0


def test_a_renamed_reference_is_the_same_reference(uri: str, tmp_path: Path) -> None:
    """Names are a run file's own; the fingerprint says which model it was."""
    _version(uri, tmp_path, 0.7)
    _version(uri, tmp_path, 0.8, **{"references.primary": "start (1)", "reference.start _1_": "f" * 40})
    client = connect_to_mlflow(uri)
    champion, candidate = (client.get_model_version("sentiment", number) for number in ("1", "2"))
    assert explain_refusal(client, candidate, champion) is None


def test_compare_shows_what_differs(uri: str, tmp_path: Path) -> None:
    _version(uri, tmp_path, 0.7)
    _version(uri, tmp_path, 0.65)
    lines = [
        line.split("\t") for line in _models(uri, "compare", "sentiment/1", "sentiment/2").stdout.splitlines()
    ]
    assert lines == [
        ["", "sentiment/1", "sentiment/2"],
        ["loss.beta", "0.7", "0.65"],
        ["eval/accuracy", "0.7", "0.65"],
        ["eval/loss", "0.5", "0.5"],
    ]
    as_json = json.loads(_models(uri, "compare", "sentiment/1", "sentiment/2", "--json").stdout)
    assert as_json["params"] == {"loss.beta": ["0.7", "0.65"]}
    assert "two versions or more" in _refused(uri, "compare", "sentiment/1")


def test_a_version_outlives_its_run(uri: str, tmp_path: Path) -> None:
    _version(uri, tmp_path, 0.7)
    client = connect_to_mlflow(uri)
    client.delete_run(client.get_model_version("sentiment", "1").run_id)
    assert _models(uri, "list").exit_code == 0
    assert _models(uri, "compare", "sentiment/1", "sentiment/1").exit_code == 0


def test_get_hands_over_the_checked_folder(uri: str, run_id: str, policy: Exported, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"folder": policy.merged, "adapter": policy.adapter, "probe": policy.probe}
    registered = register_model(
        uri, name="sentiment", run_id=run_id, lineage=lineage(), alias="best", **arguments
    )
    result = _models(uri, "get", "sentiment@best", "--to", str(tmp_path / "mine"))
    assert result.exit_code == 0
    assert "models:/sentiment/1 is in" in result.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "adapter" / "adapter_model.safetensors").is_file()
    assert "not an empty folder" in _refused(uri, "get", "sentiment@best", "--to", str(tmp_path / "mine"))

    assert _models(uri, "get", "sentiment@best", "--to", str(tmp_path / "merged"), "--merge").exit_code == 0
    whole = {p.name for p in (tmp_path / "mine").iterdir()}
    assert {p.name for p in (tmp_path / "merged").iterdir()} == whole - {"adapter"}
    result = _models(uri, "get", "sentiment@best", "--to", str(tmp_path / "lora"), "--adapter")
    assert "checked against its digest" in result.stdout
    assert "an adapter for tiny/base@0123abc" in result.stdout
    base = AutoModelForCausalLM.from_pretrained(policy.base)
    found = PeftModel.from_pretrained(base, tmp_path / "lora")(input_ids=policy.probe.rows).logits
    torch.testing.assert_close(found, policy.probe.logits, rtol=0, atol=1e-6)
    both = _refused(uri, "get", "sentiment@best", "--to", str(tmp_path / "x"), "--merge", "--adapter")
    assert "choose one" in both

    (registered.folder / "generation_config.json").unlink()
    message = _refused(uri, "get", "sentiment@best", "--to", str(tmp_path / "other"))
    assert "are not those that were registered" in message
    assert not (tmp_path / "other").exists()


def test_the_default_store_is_the_runs_folders(uri: str, tmp_path: Path) -> None:
    _version(uri, tmp_path / "runs", 0.7)
    listed = CliRunner().invoke(app, ["list", "--storage-path", str(tmp_path)])
    assert "sentiment" in listed.stdout
    missing = CliRunner().invoke(app, ["list", "--storage-path", str(tmp_path / "elsewhere")])
    assert "there is no MLflow database at" in str(missing.exception)
    assert not (tmp_path / "elsewhere").exists()  # reading creates nothing


def test_the_command_exits_with_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestrator", "models", "list", "--storage-path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "there is no MLflow database" in done.stderr
    assert done.stdout == ""


def test_start_up_imports_neither_mlflow_nor_torch() -> None:
    code = (
        "import sys, orchestrator.cli.models; print({'mlflow', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert done.stdout.strip() == "set()"
