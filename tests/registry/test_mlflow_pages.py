"""What MLflow's pages show of a run and of a version: description, user, command and data."""

import json
import logging
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orchestrator.driver.execute import open_tracker
from orchestrator.tracking.mlflow import connect_to_mlflow
from orchestrator.tracking.origin import NOTE_TAG, cut_note, read_origin_tags
from orchestrator.tracking.tracker import Tracker
from tests.support.finished_runs import HELD_OUT, PAIRS, begin_run, train_and_finish, write_pairs
from tests.support.policies import Exported


def test_a_run_is_described_before_and_after_training(uri: str, policy: Exported, tmp_path: Path) -> None:
    prepared, record = begin_run(
        policy, tmp_path / "here", tracking={"uri": uri, "registered_model": "films"}
    )
    client = connect_to_mlflow(uri)
    run_id = open_tracker(prepared, record).run_id
    note = client.get_run(run_id).data.tags[NOTE_TAG]
    assert "trained with the loss `dpo`" in note
    assert "base (primary): `llama`" in note
    assert f"`pairs.jsonl`: {PAIRS} pairs" in note
    assert f"`held-out.jsonl`: {HELD_OUT} pairs" in note
    assert "Result" not in note

    train_and_finish(prepared, record, policy, 0.75)
    note = client.get_run(run_id).data.tags[NOTE_TAG]
    assert "**Result** accuracy 0.500 ± 0.043 before, 0.750 ± 0.043 after" in note.partition("\n# films\n")[0]
    assert "library_name" not in note  # the card's metadata
    assert "| eval/accuracy | 0.5 ± 0.043 | 0.75 ± 0.043 |" in note
    assert str(tmp_path) not in note
    described = client.get_model_version("films", "1").description
    assert "accuracy 0.500 ± 0.043 before, 0.750 ± 0.043 after" in described
    assert str(tmp_path) not in described


def test_a_run_without_model_has_a_summary(uri: str, policy: Exported, tmp_path: Path) -> None:
    prepared, record = begin_run(policy, tmp_path / "here", tracking={"uri": uri})
    train_and_finish(prepared, record, policy, 0.75)
    note = connect_to_mlflow(uri).get_run(record.mlflow_run).data.tags[NOTE_TAG]
    assert "**Result** accuracy 0.500 ± 0.043 before, 0.750 ± 0.043 after; label_nll 0.6" in note


def test_somebodys_own_description_stays(uri: str, policy: Exported, tmp_path: Path) -> None:
    prepared, record = begin_run(policy, tmp_path / "here", tracking={"uri": uri})
    run_id = open_tracker(prepared, record).run_id
    connect_to_mlflow(uri).set_tag(run_id, NOTE_TAG, "my own words")
    train_and_finish(prepared, record, policy, 0.75)
    assert connect_to_mlflow(uri).get_run(run_id).data.tags[NOTE_TAG] == "my own words"


def test_data_is_named_once_and_not_uploaded(uri: str, policy: Exported, tmp_path: Path) -> None:
    prepared, record = begin_run(policy, tmp_path / "here", tracking={"uri": uri})
    open_tracker(prepared, record)
    train_and_finish(prepared, record, policy, 0.75)  # opens the run twice more, as a resumed one does
    inputs = connect_to_mlflow(uri).get_run(record.mlflow_run).inputs.dataset_inputs
    shown = {
        (one.tags[0].value, one.dataset.name, one.dataset.digest, json.loads(one.dataset.profile)["num_rows"])
        for one in inputs
    }
    assert len(inputs) == 2
    assert shown == {
        ("training", "pairs.jsonl", prepared.digests["train"][:12], PAIRS),
        ("evaluation", "held-out.jsonl", prepared.digests["eval"][:12], HELD_OUT),
    }
    files = [artifact.path for artifact in connect_to_mlflow(uri).list_artifacts(record.mlflow_run)]
    assert set(files) == {"config", "plots"}


def test_sources_of_a_mixture_are_one_data_set(uri: str, policy: Exported, tmp_path: Path) -> None:
    paths = [str(write_pairs(tmp_path / name, 6)) for name in ("a.jsonl", "b.jsonl")]
    data = {"train": [{"source": path} for path in paths], "eval_fraction": 0.25}
    prepared, record = begin_run(policy, tmp_path / "here", tracking={"uri": uri}, data=data)
    run_id = open_tracker(prepared, record).run_id
    inputs = connect_to_mlflow(uri).get_run(run_id).inputs.dataset_inputs
    assert {one.dataset.name for one in inputs} == {"a.jsonl, b.jsonl"}
    assert {one.dataset.digest for one in inputs} == {digest[:12] for digest in prepared.digests.values()}


@pytest.mark.parametrize("refused", ["set_tag", "log_inputs"])
def test_a_server_that_takes_no_description_or_data_fails_no_run(
    uri: str,
    policy: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refused: str,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("no such endpoint")

    monkeypatch.setattr(MlflowClient, refused, refuse)
    prepared, record = begin_run(policy, tmp_path / "here", tracking={"uri": uri})
    with caplog.at_level(logging.WARNING):
        open_tracker(prepared, record)
    assert caplog.text.count("no such endpoint") == 1
    train_and_finish(prepared, record, policy, 0.75)
    assert record.finished
    assert connect_to_mlflow(uri).get_run(record.mlflow_run).info.status == "FINISHED"


def test_user_and_command_are_those_of_the_first_start(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    key = "hf_" + "a1" * 12
    monkeypatch.setattr(sys, "argv", ["/opt/bin/polyref", "train", "my run.yaml", f"x.api_key={key}"])
    run_id = Tracker.resume_or_start(None, name="a", uri=uri, folder=tmp_path / "a").run_id
    monkeypatch.setattr(sys, "argv", ["/opt/bin/polyref", "train", "other.yaml"])
    Tracker.resume_or_start(run_id, name="a", uri=uri, folder=tmp_path / "a")
    tags = connect_to_mlflow(uri).get_run(run_id).data.tags
    assert tags["mlflow.source.name"] == "polyref train 'my run.yaml' 'x.api_key=***'"
    assert tags["mlflow.user"] == "ada"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada@example.org")
    assert read_origin_tags()["mlflow.user"] == "ada@example.org"


def test_a_user_without_a_name_has_no_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", refuse)
    assert "mlflow.user" not in read_origin_tags()


def test_a_long_description_ends_with_a_whole_line() -> None:
    lines = [f"line {number} " + "x" * 90 for number in range(100)]
    cut = cut_note("\n".join(lines))
    assert len(cut) <= 8000
    assert cut.endswith("\n\n…")
    assert cut.removesuffix("\n\n…").splitlines()[-1] in lines
