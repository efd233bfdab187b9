"""One MLflow run per training run; nothing lost, nothing twice, nothing secret."""

import json
import logging
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orchestrator.errors import UsageError
from orchestrator.redaction import redact
from orchestrator.tracking import tracker as tracking
from orchestrator.tracking.code_version import read_code_tags
from orchestrator.tracking.metrics_file import cut_metrics_after, read_findings, read_metrics, read_scales
from orchestrator.tracking.mlflow import (
    connect_to_mlflow,
    flatten_settings,
    refuse_unshared_default,
    resolve_tracking_uri,
)
from orchestrator.tracking.tracker import Tracker


def _start(uri: str, folder: Path, run_id: str | None = None, **more: Any) -> Tracker:
    return Tracker.resume_or_start(run_id, name="a-run", uri=uri, folder=folder, **more)


def _history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in connect_to_mlflow(uri).get_metric_history(run_id, key)]


def test_metrics_reach_the_file_and_mlflow(uri: str, tmp_path: Path) -> None:
    tracker = _start(uri, tmp_path / "run", params={"loss": {"beta": 0.1}}, tags={"data.digest": "abc"})
    for step in range(1, 60):
        tracker.log(step, {"loss": 1 / step, "logratio/movie-sft": -step})
    tracker.log(59, {"eval/accuracy": 0.75})
    tracker.finish()
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [*range(1, 60), 59]
    assert lines[3]["loss"] == 0.25
    assert _history(uri, tracker.run_id, "loss") == [(step, 1 / step) for step in range(1, 60)]
    assert _history(uri, tracker.run_id, "eval/accuracy") == [(59, 0.75)]
    run = connect_to_mlflow(uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a-run"
    assert run.data.params == {"loss.beta": "0.1"}
    assert run.data.tags["data.digest"] == "abc"


def test_findings_stay_in_the_metrics_file_up_to_the_checkpoint(uri: str, tmp_path: Path) -> None:
    tracker = _start(uri, tmp_path / "run")
    tracker.log(1, {"loss": 0.5})
    tracker.log_finding(1, "start", "step 1: it starts elsewhere")
    tracker.log(3, {"loss": 0.4})
    tracker.log_finding(3, "displacement", "step 3: it falls")
    tracker.close()
    assert [line["loss"] for line in read_metrics(tmp_path / "run")] == [0.5, 0.4]
    tags = connect_to_mlflow(uri).get_run(tracker.run_id).data.tags
    assert tags["watch.start"] == "step 1: it starts elsewhere"
    assert tags["watch.displacement"] == "step 3: it falls"
    cut_metrics_after(tmp_path / "run" / "metrics.jsonl", 2)
    assert read_findings(tmp_path / "run") == {"start": "step 1: it starts elsewhere"}


def test_a_batch_larger_than_mlflow_takes(uri: str, tmp_path: Path) -> None:
    tracker = _start(uri, tmp_path / "run", params={f"p{i}": i for i in range(250)})
    for step in range(3):
        tracker.log(step, {f"m{i}": i for i in range(900)})
    assert tracker.flush()
    tracker.close()
    run = connect_to_mlflow(uri).get_run(tracker.run_id)
    assert len(run.data.params) == 250
    assert len(run.data.metrics) == 900
    assert len(_history(uri, tracker.run_id, "m899")) == 3


def test_a_value_that_is_not_finite(uri: str, tmp_path: Path) -> None:
    tracker = _start(uri, tmp_path / "run")
    tracker.log(1, {"loss": math.nan, "grad_norm": math.inf})
    tracker.close()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    assert math.isnan(_history(uri, tracker.run_id, "loss")[0][1])


def test_a_restart_goes_on_with_the_same_run_and_repeats_nothing(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = _start(uri, folder, params={"a": 1, "b": 2})
    for step in range(1, 31):
        first.log(step, {"loss": step})
    first.close()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')  # killed while writing

    again = _start(uri, folder, first.run_id, params={"a": 1, "b": 3, "c": 4})
    assert again.run_id == first.run_id
    worker = Tracker(uri, again.run_id, folder, resume_step=20)
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 21))
    for step in range(21, 41):
        worker.log(step, {"loss": step, "new": step})
    worker.close()
    again.finish()
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 41))
    assert _history(uri, first.run_id, "loss") == [(step, step) for step in range(1, 41)]
    assert [step for step, _ in _history(uri, first.run_id, "new")] == list(range(21, 41))
    run = connect_to_mlflow(uri).get_run(first.run_id)
    assert run.data.params == {"a": "1", "b": "2", "c": "4"}
    assert run.data.tags["changed.b"] == "3"


def test_what_a_killed_process_could_not_send_is_sent_by_the_next(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_id = _start(uri, folder).run_id
    lines = [json.dumps({"step": step, "time": 1.0, "loss": step}) + "\n" for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 6, "ti')
    worker = Tracker(uri, run_id, folder)
    worker.log(6, {"loss": 6})
    worker.close()
    assert _history(uri, run_id, "loss") == [(step, step) for step in range(1, 7)]
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 7))


def test_a_start_from_scratch_cuts_all(uri: str, tmp_path: Path) -> None:
    tracker = _start(uri, tmp_path / "run")
    tracker.log(0, {"eval/loss": 1.0})
    tracker.log_scales([1.0])
    tracker.close()
    Tracker(uri, tracker.run_id, tmp_path / "run", resume_step=-1)
    assert read_metrics(tmp_path / "run") == []
    assert read_scales(tmp_path / "run") == []


def test_a_run_deleted_in_mlflow_is_started_anew(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = _start(uri, tmp_path / "run")
    connect_to_mlflow(uri).delete_run(first.run_id)
    with caplog.at_level(logging.WARNING):
        assert _start(uri, tmp_path / "run", first.run_id).run_id != first.run_id
        _start(uri, tmp_path / "run", "0" * 32)
    assert caplog.text.count("a new one is started") == 2


def test_an_outage_costs_no_metric_and_no_step(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_SEND_SECONDS", 0.02)
    monkeypatch.setattr(tracking, "_MAX_BACKOFF_SECONDS", 0.05)
    whole, refused = MlflowClient.log_batch, []

    def log_batch(client: MlflowClient, *arguments: Any, **more: Any) -> Any:
        if len(refused) < 3:
            refused.append(1)
            raise MlflowException("http://me:hunter2@mlflow.example is away")
        return whole(client, *arguments, **more)

    tracker = _start(uri, tmp_path / "run")
    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 20):
            tracker.log(step, {"loss": step})
        _until(lambda: len(refused) == 3)
        assert tracker.flush()
    tracker.close()
    assert _history(uri, tracker.run_id, "loss") == [(step, step) for step in range(1, 20)]
    assert caplog.text.count("MLflow takes no metrics") == 1  # one warning per outage
    assert "hunter2" not in caplog.text


def test_an_outage_that_does_not_end(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_SEND_SECONDS", 0.02)
    tracker = _start(uri, tmp_path / "run")

    def away(*_: Any, **__: Any) -> None:
        raise MlflowException("away")

    for call in ("log_batch", "set_terminated", "log_artifact"):
        monkeypatch.setattr(MlflowClient, call, away)
    with caplog.at_level(logging.WARNING):
        tracker.log(1, {"loss": 1.0})
        assert not tracker.flush(timeout=0.2)
        tracker.set_tags({"a": "b"})
        tracker.log_files([tmp_path / "run" / "metrics.jsonl"])
        assert not tracker.finish()
    assert read_metrics(tmp_path / "run")[0]["loss"] == 1.0
    assert "misses the last metrics" in caplog.text
    assert "did not take files" in caplog.text
    monkeypatch.undo()
    assert MlflowClient(uri).get_run(tracker.run_id).info.status == "RUNNING"
    later = _start(uri, tmp_path / "run", run_id=tracker.run_id)
    later.catch_up()
    assert later.finish()
    assert _history(uri, tracker.run_id, "loss") == [(1, 1.0)]
    assert MlflowClient(uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_damaged_lines_are_passed_over_and_counted(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk leaves zeros, a crash half a line; the whole lines around them count and are sent."""
    tracker, path = _start(uri, tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    with path.open("ab") as file:
        file.write(b"\0" * 40 + b"\n" + b'{"step": 2, "lo\n' + b"3\n" + b'{"loss": 5}\n')
    tracker = _start(uri, tmp_path / "run", run_id=tracker.run_id)
    tracker.log(2, {"loss": 2.0})
    assert tracker.finish()
    with caplog.at_level(logging.WARNING):
        assert [line["loss"] for line in read_metrics(tmp_path / "run")] == [1.0, 2.0]
    assert f"{path}: 4 damaged lines are passed over" in caplog.text
    assert _history(uri, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    cut_metrics_after(path, 1)
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0]


def _until(true: Callable[[], bool]) -> None:
    while not true():  # the suite's own timeout ends a wait that is in vain
        time.sleep(0.01)


def test_a_server_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        UsageError, match=r"http://\*\*\*@127.0.0.1:\d+ does not answer: .*check tracking.uri"
    ):
        _start(f"http://me:hunter2@127.0.0.1:{port}", tmp_path / "run")


def test_a_deleted_experiment_is_refused(uri: str, tmp_path: Path) -> None:
    run = _start(uri, tmp_path / "run", experiment="mine").run_id
    client = connect_to_mlflow(uri)
    client.delete_experiment(client.get_run(run).info.experiment_id)
    with pytest.raises(UsageError, match=r"'mine' was deleted in MLflow: .*mlflow experiments restore"):
        _start(uri, tmp_path / "run", experiment="mine")


def test_trials_are_nested_under_their_parent(uri: str, tmp_path: Path) -> None:
    parent = _start(uri, tmp_path / "sweep")
    child = _start(uri, tmp_path / "trial", parent=parent.run_id)
    assert connect_to_mlflow(uri).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_files_go_beside_the_database(uri: str, tmp_path: Path) -> None:
    tracker = _start(uri, tmp_path / "run")
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"png")
    tracker.log_files([picture], "plots")
    assert [p.name for p in (tmp_path / "mlartifacts").rglob("plots/*")] == ["loss.png"]


def test_dispersion_scales_are_a_bounded_sample(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_MAX_SCALES", 450)
    tracker = _start(uri, tmp_path / "run")
    for step in range(10):
        tracker.log_scales([step / 10] * 64)
    assert read_scales(tmp_path / "run")  # a killed run has some already
    tracker.close()
    assert len(read_scales(tmp_path / "run")) == 450


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pa@ss@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("https://token@mlflow.example/x", "https://***@mlflow.example/x"),
        ("s3://bucket/a?X-Amz-Signature=abc&part=2", "s3://bucket/a?X-Amz-Signature=***&part=2"),
        ("use hf_abcdefghijklmnopqrst now", "use *** now"),
        ("https://example.org/a@b", "https://example.org/a@b"),
        ("models:/movie@champion", "models:/movie@champion"),
        ("me@example.org", "me@example.org"),
        ("key AKIAIOSFODNN7EXAMPLE, no", "key ***, no"),
        ("ASIAIOSFODNN7EXAMPLE", "***"),
        ("aws_secret_access_key = wJal/K7+x", "aws_secret_access_key = ***"),
        ("AWS_SESSION_TOKEN: 'FwoG//x=='", "AWS_SESSION_TOKEN: '***'"),
        ("Authorization: Bearer abc", "Authorization: ***"),
        ("{'Authorization': 'Basic bWU6cA==', 'a': 1}", "{'Authorization': '***', 'a': 1}"),
        ("got 'Bearer 0123abcd'.", "got 'Bearer ***'."),
        ("ghp_" + "a1B2" * 9, "***"),
        ("gho_" + "a1B2" * 9, "***"),
        ("(github_pat_11ABC_" + "a1B2" * 9 + ")", "(***)"),
        ("sk-" + "a1B2" * 12, "***"),
        ("sk-proj-" + "a1B2_x" * 12, "***"),
        ("sk-ant-api03-" + "aB2-cD_e" * 2 + "a1B2" * 8 + "-AA", "***"),
        ("glpat-" + "x1-_" * 5, "***"),
        ("xoxb-123456789012-abcDEF", "***"),
        ("token=abcdef; next", "token=***; next"),
        ("HF_TOKEN=abcdef", "HF_TOKEN=***"),
        ("got 'db_password=hunter2'", "got 'db_password=***'"),
        ('password="hunter2 and more"', 'password="***"'),
        ("client_secret=hunter2, api_key=abc", "client_secret=***, api_key=***"),
        ('{"api-key": "abc", "n": 1}', '{"api-key": "***", "n": 1}'),
        ("AccountKey=aB3/==;Endpoint=x", "AccountKey=***"),
    ],
)
def test_redaction(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=512 tokens=12 token=3 num_token=0.5",
        "eos_token=</s> pad_token=<pad> mask_token=[MASK]",
        "api_key=None, token=null, password=auto",
        "sk-learn, sk-learn-compatible-estimators, task-0123456789abcdef0123",
        "the bearer token is missing; Bearer authentication is required",
        "the secret, the password and the token: none is known",
        "AKIA is a prefix; xoxo-xo; ghp_short; the glpat- of GitLab",
        "loss.beta=0.2 sort key=margin authorized=yes",
        "{'token_id': 17, 'tokens': 'abcdef'}",
    ],
)
def test_ordinary_words_are_no_secrets(text: str) -> None:
    assert redact(text) == text


def test_params_are_flat_redacted_and_within_mlflows_limits(uri: str, tmp_path: Path) -> None:
    settings = {
        "loss": {"beta": 0.1, "references": {"weights": [0.5, 0.5]}, "dispersion": {}},
        "data": {"train": "https://me:hunter2@example.org/a.jsonl", "hub_token": "hunter2", "token": None},
        "template": "x" * 10_000,
        "references": {"models": {"movie (sft)": {"model": "m"}}},
        "tokens_per_microbatch": 8,
    }
    flat = flatten_settings(settings)
    assert flat["loss.references.weights"] == "[0.5, 0.5]"
    assert flat["loss.dispersion"] == "{}"
    assert flat["data.token"] == "None"
    assert flat["tokens_per_microbatch"] == "8"
    assert len(flat["template"]) == 6000
    assert "hunter2" not in str(flat)
    run = _start(uri, tmp_path / "run", params=settings).run_id
    assert connect_to_mlflow(uri).get_run(run).data.params == flat


@pytest.mark.parametrize(
    ("uri", "storage", "expected"),
    [
        (None, "/data/runs", "sqlite:////data/runs/mlflow.db"),
        ("sqlite:////data/x.db", "s3://bucket", "sqlite:////data/x.db"),
        ("http://mlflow.example:5000", "runs", "http://mlflow.example:5000"),
        ("databricks", "runs", "databricks"),
    ],
)
def test_where_mlflow_is(uri: str | None, storage: str, expected: str) -> None:
    assert resolve_tracking_uri(uri, storage) == expected


def test_the_environment_names_the_server_where_the_run_file_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert resolve_tracking_uri(None, "runs") == "http://mlflow.example:5000"
    assert resolve_tracking_uri(None, "s3://bucket/runs") == "http://mlflow.example:5000"
    assert resolve_tracking_uri("http://other.example", "runs") == "http://other.example"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UsageError, match=r"^\$MLFLOW_TRACKING_URI './mlruns' is a folder"):
        resolve_tracking_uri(None, "runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert resolve_tracking_uri(None, "/data/runs") == "sqlite:////data/runs/mlflow.db"


def test_the_default_file_is_refused_where_several_nodes_would_write_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_unshared_default(None, nodes=1)
    refuse_unshared_default("sqlite:///mine.db", nodes=3)
    with pytest.raises(UsageError, match=r"tracking\.uri is not set.*3 nodes.*MLFLOW_TRACKING_URI"):
        refuse_unshared_default(None, nodes=3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    refuse_unshared_default(None, nodes=3)


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri(None, "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_tracking_uri("sqlite:///here.db", "runs") == f"sqlite:///{tmp_path}/here.db"


@pytest.mark.parametrize(
    ("uri", "storage", "message"),
    [
        ("./mlruns", "runs", "is a folder, which MLflow no longer writes: use sqlite"),
        ("file:///data/mlruns", "runs", "is a folder"),
        (None, "s3://bucket/runs", "no sqlite file can live: set tracking.uri .or MLFLOW_TRACKING_URI"),
    ],
)
def test_where_mlflow_cannot_be(uri: str | None, storage: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_tracking_uri(uri, storage)


def test_code_tags(tmp_path: Path) -> None:
    assert "polyref.version" in read_code_tags()
    assert "mlflow.source.git.commit" not in read_code_tags(tmp_path)
