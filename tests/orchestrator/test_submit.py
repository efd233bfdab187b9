"""Jobs: what is sent, what is refused before; on a real head with a token logs, exit codes and secrets."""

import asyncio
import base64
import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from ray.job_submission import JobInfo, JobStatus

from orchestrator.cluster.job_secrets import SECRET_NAMES, SECRETS_LOCATION, upload_secrets
from orchestrator.cluster.worker_environment import collect_secrets
from orchestrator.errors import RunFailed, UsageError
from orchestrator.jobs.bundle import MAX_SIZE_MB, PACKAGES, build_bundle
from orchestrator.jobs.submit import (
    _convert_exit_code,
    _follow_job,
    _submit_bundle,
    connect_to_job_server,
    submit_job,
)

BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4
PASSWORD = "hunter2-" + os.urandom(4).hex()
ROWS = [{"prompt": f"Film {n} is ", "chosen": "good.", "rejected": "dull!"} for n in range(8)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run file, a sweep, data, and much that is none of a job's business."""
    here = tmp_path / "project"
    for name in ("data", "runs/old", ".venv", ".git", "sweeps", "data/.ipynb_checkpoints"):
        (here / name).mkdir(parents=True)
        (here / name / "more.bin").write_bytes(b"x" * 100)
    (here / "data" / "more.bin").unlink()
    (here / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (here / "template.jinja").write_text("{{ messages }}")
    (here / "judge.py").write_text("def score(prompts, responses):\n    return [1.0] * len(responses)\n")
    monkeypatch.chdir(here)
    write(here / "run.yaml")
    sweep = {"name": "search", "run": "../run.yaml", "spaces": ["losses"], "search": {"trials": 2}}
    (here / "sweeps" / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return here


def write(path: Path, **sections: Any) -> Path:
    run: dict[str, Any] = {
        "name": "job",
        "policy": {"model": "someone/model", "adapter": {"r": 4}, "chat_template": "template.jinja"},
        "references": {"primary": "start", "models": {"start": {"model": "policy"}}},
        "data": {"train": "data/train.jsonl", "eval_fraction": 0.25},
        "loss": {"preset": "dpo"},
        "evaluation": {"sampling": {"reward": {"function": "judge:score"}}},
        "storage_path": "/shared/polyref/runs",
    }
    path.write_text(yaml.safe_dump({**run, **sections}))
    return path


def test_a_parcel_holds_what_the_run_names_and_nothing_else(folder: Path) -> None:
    parcel = build_bundle(["train", "run.yaml", "loss.beta=0.2", "--fresh"])
    assert sorted(parcel.files) == ["data/train.jsonl", "judge.py", "run.yaml", "template.jinja"]
    assert parcel.command == ("train", "run.yaml", "loss.beta=0.2", "--fresh")
    assert parcel.name == "job"
    parcel.write(target := folder / "sent")
    for name in parcel.files:
        assert (target / name).read_bytes() == (folder / name).read_bytes()


def test_an_override_says_what_is_sent(folder: Path) -> None:
    assert (
        "data/train.jsonl" not in build_bundle(["train", "run.yaml", "data.train=/shared/data.jsonl"]).files
    )
    assert (
        "data/train.jsonl"
        not in build_bundle(["train", "run.yaml", "data.train=s3://bucket/data.jsonl"]).files
    )
    assert "data/train.jsonl" not in build_bundle(["train", "run.yaml", "data.train=someone/pairs"]).files


def test_every_source_of_a_mixture_and_every_set_is_sent(folder: Path) -> None:
    for name in ("more", "safety"):
        (folder / "data" / f"{name}.jsonl").write_text((folder / "data" / "train.jsonl").read_text())
    train = ["data/train.jsonl", {"source": "data/more.jsonl", "cap": 5}]
    write(folder / "run.yaml", data={"train": train, "eval": {"safety": "data/safety.jsonl"}})
    files = build_bundle(["train", "run.yaml"]).files
    assert {name for name in files if name.startswith("data/")} == {
        "data/train.jsonl",
        "data/more.jsonl",
        "data/safety.jsonl",
    }
    with pytest.raises(
        UsageError, match=r"data\.eval\.safety\.source: data/none\.jsonl: there is no such file"
    ):
        build_bundle(["train", "run.yaml", "data.eval.safety.source=data/none.jsonl"])


def test_a_sweep_brings_its_run_file(folder: Path) -> None:
    parcel = build_bundle(["tune", "--samples", "3", "sweeps/sweep.yaml", "search.trials=3"])
    assert {"run.yaml", "sweeps/sweep.yaml", "data/train.jsonl"} <= set(parcel.files)
    assert parcel.name == "search"
    other = write(folder / "other.yaml")
    parcel = build_bundle(["tune", "sweeps/sweep.yaml", f"run=../{other.name}"])
    assert "other.yaml" in parcel.files
    assert "run.yaml" not in parcel.files


def test_an_absolute_path_to_a_file_in_the_folder_is_found_in_the_parcel(folder: Path) -> None:
    assert build_bundle(["check", str(folder / "run.yaml")]).command == ("check", "run.yaml")


def test_a_folder_of_data_is_sent_with_what_its_gitignore_names(folder: Path) -> None:
    (folder / "data" / ".gitignore").write_text("*\n")
    (folder / "data" / "deep").mkdir()
    (folder / "data" / "deep" / "more.jsonl").write_text("{}\n")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "linked.jsonl").write_text("{}\n")
    (folder / "data" / "link").symlink_to(folder / "elsewhere")
    (folder / "data" / "round").symlink_to(folder / "data")
    for hidden in (".env", "_SUCCESS", "deep/.env", "_old/more.jsonl"):
        (folder / "data" / hidden).parent.mkdir(exist_ok=True)
        (folder / "data" / hidden).write_text("")
    files = build_bundle(["train", "run.yaml", "data.train=data"]).files
    names = {"data/train.jsonl", "data/deep/more.jsonl", "data/link/linked.jsonl"}
    assert {name for name in files if name.startswith("data")} == names


def test_a_broken_link_among_the_data_is_one_message(folder: Path) -> None:
    (folder / "data" / "lost.jsonl").symlink_to(folder / "nowhere")
    with pytest.raises(UsageError, match=r"data\.train: data/lost\.jsonl is not a file, or is a broken link"):
        build_bundle(["train", "run.yaml", "data.train=data"])


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_among_the_data_sends_nothing_from_elsewhere(folder: Path, tmp_path: Path, link: str) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (folder / "data" / "more").symlink_to(tmp_path / "private" / ("key" if link == "file" else ""))
    with pytest.raises(UsageError, match=r"data\.train: data/more\S* leads by a link to .*/private/key, out"):
        build_bundle(["train", "run.yaml", "data.train=data"])


def test_a_link_that_is_named_is_followed(folder: Path, tmp_path: Path) -> None:
    """As somebody has it whose data lie on a larger disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "big.jsonl").write_text("{}\n")
    (folder / "big").symlink_to(tmp_path / "disk")
    assert "big/big.jsonl" in build_bundle(["train", "run.yaml", "data.train=big"]).files
    assert "big/big.jsonl" in build_bundle(["train", "run.yaml", "data.train=big/big.jsonl"]).files


def test_a_package_with_the_reward_is_sent_whole(folder: Path) -> None:
    (folder / "judges").mkdir()
    for name in ("__init__.py", "_words.py", ".env"):
        (folder / "judges" / name).write_text("")
    files = build_bundle(["check", "run.yaml", "evaluation.sampling.reward.function=judges:score"]).files
    assert {"judges/__init__.py", "judges/_words.py"} == {name for name in files if name.startswith("judges")}


def test_code_is_sent_when_asked_for(folder: Path) -> None:
    files = build_bundle(["check", "run.yaml"], code=True).files
    assert {f"{package}/__init__.py" for package in PACKAGES} <= set(files)
    assert not [name for name in files if "__pycache__" in name]
    assert "orchestrator/cli/main.py" in files


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([], "e.g. polyref submit -- train run.yaml"),
        (["trian", "run.yaml"], "did you mean 'train'"),
        (["demo"], "demo cannot be submitted"),
        (["label", "pairs.jsonl", "--to", "out.parquet"], "with RAY_ADDRESS=auto"),
        (["train"], "needs a run file"),
        (["train", "none.yaml"], "no such file"),
        (["train", "run.yaml", "loss.beta=-1"], "beta must be > 0"),
        (["tune", "sweeps/sweep.yaml", "search.trils=3"], "did you mean 'trials'"),
        (["train", "run.yaml", "storage_path=./runs"], "storage_path=/shared/polyref/runs"),
        (["tune", "sweeps/sweep.yaml", "run.storage_path=runs"], "run.storage_path=/shared/polyref/runs"),
        (["train", "run.yaml", "storage_path=~/runs"], "in a home folder"),
        (
            ["train", "run.yaml", "tracking.uri=sqlite:///mlflow.db"],
            "leave it out for the cluster's registry",
        ),
        (["train", "run.yaml", "tracking.uri=http://me:secret@host"], "--secret MLFLOW_TRACKING_PASSWORD"),
        (["models", "get", "a@best", "--to", "a"], "with MLFLOW_TRACKING_URI naming the cluster's registry"),
        (["tune", "sweeps/sweep.yaml", "run.storage_path=s3://bucket/runs"], "run.storage_path is a URI"),
        (["tune", "none.yaml"], "no such file"),
        (["train", "run.yaml", "data.train=data/none.jsonl"], "data/none.jsonl: there is no such file here"),
        (["train", "run.yaml", "data.train=../train.jsonl"], "is not in the folder you submit from"),
        (["train", "run.yaml", "policy.model=./data"], "policy.model=/shared/polyref/models/data"),
    ],
)
def test_what_cannot_work_is_refused_before_a_cluster_is_asked(
    folder: Path, command: list[str], said: str
) -> None:
    (folder.parent / "train.jsonl").write_text("")
    with pytest.raises(UsageError) as refused:
        submit_job(command, address="http://127.0.0.1:9")
    assert said in str(refused.value)
    assert "secret@" not in str(refused.value)


CREDENTIALS = [
    "s3://KEY:top/secret@bucket/runs",
    "s3://bucket/runs?access_key=KEY&secret_key=secret",
    "https://account.blob.core.windows.net/data.jsonl?sv=1&sig=secret",
    "https://secret@host/data.jsonl",
]


@pytest.mark.parametrize("uri", CREDENTIALS)
@pytest.mark.parametrize("field", ["storage_path", "data.train", "data.eval", "policy.model"])
def test_credentials_are_refused_wherever_they_stand(folder: Path, field: str, uri: str) -> None:
    def refused(command: list[str], where: str) -> None:
        with pytest.raises(
            UsageError, match=f"^{where} holds credentials.*--secret AWS_ACCESS_KEY_ID"
        ) as error:
            submit_job(command, address="http://127.0.0.1:9")
        assert "secret@" not in str(error.value)
        assert "=secret" not in str(error.value)

    refused(["train", "run.yaml", f"{field}={uri}"], field)
    refused(["tune", "sweeps/sweep.yaml", f"run.{field}={uri}"], f"run.{field}")
    refused(["models", "list", "--tracking-uri", uri], "an argument")
    section, _, name = field.partition(".")
    write(folder / "run.yaml", **{section: {name: uri} if name else uri})
    refused(["train", "run.yaml"], f"run.yaml: {field}")
    refused(["tune", "sweeps/sweep.yaml"], f"run.yaml: {field}")  # though the sweep may not use it


def test_a_container_and_an_alias_are_no_credentials(folder: Path) -> None:
    container = "abfss://container@account.dfs.core.windows.net/runs"
    build_bundle(["train", "run.yaml", f"storage_path={container}", "policy.model=models:/name@best"])


def test_too_much_is_refused_with_the_largest_files(folder: Path) -> None:
    with open(folder / "data" / "huge.jsonl", "wb") as file:
        file.truncate(MAX_SIZE_MB * 10**6)
    with pytest.raises(UsageError, match=r"largest: 50\.0 MB data/huge\.jsonl") as refused:
        build_bundle(["train", "run.yaml", "data.train=data"])
    assert "storage that all nodes share" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"env": ["NO_SUCH_NAME"]}, "no such variable here"),
        ({"env": ["A=b"]}, "name of a variable"),
        ({"env": ["HF_TOKEN"]}, "use --secret HF_TOKEN"),
        ({"env": ["MLFLOW_TRACKING_USERNAME"]}, "use --secret MLFLOW_TRACKING_USERNAME"),
        ({"env": ["WITH_PASSWORD_INSIDE"]}, "use --secret WITH_PASSWORD_INSIDE"),
        ({"env": ["A_URL"]}, "use --secret A_URL"),
        ({"secret": ["POLYREF_MAILBOX"]}, "name of a variable"),
    ],
)
def test_secrets_are_no_plain_variables(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    for name in ("HF_TOKEN", "MLFLOW_TRACKING_USERNAME", "WITH_PASSWORD_INSIDE", "POLYREF_MAILBOX"):
        monkeypatch.setenv(name, PASSWORD)
    monkeypatch.setenv("A_URL", f"postgresql://me:{PASSWORD}@host/db")
    with pytest.raises(UsageError) as refused:
        submit_job(["check", "run.yaml"], address="http://127.0.0.1:9", **options)
    assert said in str(refused.value)
    assert PASSWORD not in str(refused.value)


def test_a_tokenizer_is_no_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with pytest.raises(UsageError, match="no job server"):
        submit_job(["check", "run.yaml"], address="http://127.0.0.1:9", env=["TOKENIZERS_PARALLELISM"])


def test_workers_get_what_the_job_was_given() -> None:
    given = {SECRET_NAMES: "JUDGE_KEY,HF_TOKEN", "JUDGE_KEY": "a", "HF_TOKEN": "b", "HOME": "/root"}
    assert collect_secrets(given) == {"JUDGE_KEY": "a", "HF_TOKEN": "b"}


def test_nobody_at_the_address_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:7")  # an address that is given comes first
    with pytest.raises(UsageError, match=r"no job server answers at http://127\.0\.0\.1:9: .*ray dashboard"):
        connect_to_job_server("http://127.0.0.1:9")


@pytest.fixture
def contacted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """The servers to which requests are made, each with the `Authorization` header that it would get."""
    requested: list[tuple[str, str | None]] = []

    def note(method: str, url: str, *, headers: dict[str, str], **_: Any) -> None:
        requested.append((url.removesuffix("/api/version"), headers.get("Authorization")))
        raise requests.exceptions.ConnectionError

    monkeypatch.setattr("requests.request", note)
    return requested


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(
    "address",
    ["https://ray.example", "http://localhost:8265", "http://127.1.2.3:8265", "http://[::1]:8265"],
)
def test_the_token_is_sent_encrypted_or_to_this_machine(
    address: str, contacted: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(UsageError, match="no job server answers"):
        connect_to_job_server(address)
    assert contacted == [(address, f"Bearer {TOKEN}")]


@pytest.mark.usefixtures("folder", "token")
@pytest.mark.parametrize(
    "address",
    ["http://10.0.0.5:8265", "http://127.0.0.1.example:8265", "http://localhost@ray.example", "module://x"],
)
def test_the_token_is_not_sent_where_others_can_read_it(
    address: str, contacted: list[tuple[str, str | None]]
) -> None:
    with pytest.raises(UsageError, match=r"token unencrypted.*tunnel.*--insecure"):
        submit_job(["check", "run.yaml"], address=address)
    assert contacted == []


@pytest.mark.usefixtures("token")
def test_plain_http_is_for_those_without_a_token_or_who_insist(
    contacted: list[tuple[str, str | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no job server answers"):
        connect_to_job_server("http://10.0.0.5:8265", insecure=True)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="no job server answers"):
        connect_to_job_server("http://10.0.0.5:8265")
    assert contacted == [("http://10.0.0.5:8265", f"Bearer {TOKEN}"), ("http://10.0.0.5:8265", None)]


@pytest.mark.usefixtures("folder")
def test_secrets_are_not_sent_where_others_can_read_them(
    contacted: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to a cluster that asks for no token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("HF_TOKEN", "of-a-hub")

    def submit(address: str, **options: Any) -> None:
        submit_job(["check", "run.yaml"], address=address, **options)

    with pytest.raises(UsageError, match=r"values of --secret unencrypted.*tunnel.*--insecure"):
        submit("http://10.0.0.5:8265", secret=["HF_TOKEN"])
    assert contacted == []
    for address, options in (
        ("http://10.0.0.5:8265", {}),
        ("http://10.0.0.5:8265", {"secret": ["HF_TOKEN"], "insecure": True}),
        ("http://127.0.0.1:8265", {"secret": ["HF_TOKEN"]}),
        ("https://ray.example", {"secret": ["HF_TOKEN"]}),
    ):
        with pytest.raises(UsageError, match="no job server answers"):
            submit(address, **options)
        assert contacted.pop() == (address, None)


def test_a_job_that_is_not_taken_is_one_message(folder: Path) -> None:
    class Refusing:
        def get_address(self) -> str:
            return "http://127.0.0.1:9"

        def submit_job(self, **_: Any) -> str:
            raise ConnectionError

    with pytest.raises(RunFailed, match="did not take the job: ConnectionError"):
        _submit_bundle(Refusing(), build_bundle(["check", "run.yaml"]), {}, code=False)


class Flaky:
    """A job server whose connection breaks in the middle of the log, as often as it is told to."""

    def __init__(self, breaks: int) -> None:
        self.breaks = breaks

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        yield "one\ntw"
        if self.breaks:
            self.breaks -= 1
            raise ConnectionError("the tunnel broke")
        yield "o\nthree\n"

    def get_job_info(self, _: str) -> Any:
        return JobInfo(JobStatus.SUCCEEDED, entrypoint="")


def test_a_log_goes_on_where_it_was_when_a_connection_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    assert asyncio.run(_follow_job(Flaky(2), "job-1", said.append)).status == JobStatus.SUCCEEDED
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    assert set(said) == {"no answer from the cluster; retrying for 5 minutes"}


def test_a_cluster_that_stays_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.jobs.submit.ANSWER_TIMEOUT_S", 0.0)
    with pytest.raises(RunFailed, match="job-1 may still be running: see ray job logs --follow job-1"):
        asyncio.run(_follow_job(Flaky(10**6), "job-1", lambda _: None))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", -9, 137), ("FAILED", 127, 127)],
)
def test_the_exit_code_is_as_a_shell_gives_it(status: str, code: int, expected: int) -> None:
    said: list[str] = []
    details = JobInfo(JobStatus(status), entrypoint="", driver_exit_code=code)
    assert _convert_exit_code("job-1", details, said.append) == expected
    assert bool(said) == (code == 127)
    if status == "FAILED":
        details = JobInfo(JobStatus.FAILED, entrypoint="", message="runtime_env setup failed")
        with pytest.raises(RunFailed, match="did not start: runtime_env setup failed"):
            _convert_exit_code("job-1", details, said.append)


# ---- on a real head ----


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head of its own with token authentication, at an address; it ends with its process group."""
    place = tmp_path_factory.mktemp("head")
    short = Path(f"/tmp/polyref-{os.getpid()}")  # sockets below it have names of at most 107 characters
    (place / "token").write_text(TOKEN)
    (place / "token").chmod(0o600)
    ports = free_ports(4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(place / "token"),
        "RAY_RUNTIME_ENV_TEMPORARY_REFERENCE_EXPIRATION_S": "60",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={ports[0]}"]
    command += [f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"]
    command += [f"--dashboard-agent-listen-port={ports[3]}", "--dashboard-host=127.0.0.1"]
    command += ["--node-ip-address=127.0.0.1", f"--temp-dir={short}", "--object-store-memory=100000000"]
    with open(place / "log", "wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=place, start_new_session=True
        )
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        until(lambda: answers(address), 120, lambda: (place / "log").read_text())
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        until(lambda: not list(running(short)), 20, lambda: str(list(running(short))))
        subprocess.run(["rm", "-rf", short], check=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def answers(address: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{address}/api/jobs/", headers=bearer(), timeout=5).status_code == 200
    return False


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKEN}"}


def until(done: Callable[[], bool], seconds: float, why: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, why()
        time.sleep(0.2)


def running(temp: Path) -> Iterator[int]:
    """Processes of the head whose files are at `temp`."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(temp).encode() in path.read_bytes():
                yield int(path.parent.name)


@pytest.fixture(scope="module")
def unclaimed(head: str) -> tuple[str, float]:
    """Where secrets lie since when that nobody takes."""
    box = upload_secrets({"A": PASSWORD}, server=head, headers=bearer())
    assert left_at(head, box) == 200
    return box, time.monotonic()


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user has it who copied the token: no RAY_AUTH_MODE set."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def details(address: str) -> list[dict[str, Any]]:
    answer = requests.get(f"{address}/api/jobs/", headers=bearer(), timeout=30)
    return [job for job in answer.json() if job["submission_id"]]


@pytest.mark.long
@pytest.mark.usefixtures("unclaimed")
def test_a_missing_or_wrong_token_is_one_message(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(UsageError, match="there is no token here; copy the cluster's"):
        connect_to_job_server(head)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    with pytest.raises(UsageError, match="the token here is another; copy the cluster's"):
        connect_to_job_server(head)


@pytest.mark.long
@pytest.mark.usefixtures("token")
def test_the_log_is_streamed_and_the_exit_code_is_the_jobs(
    head: str, folder: Path, tiny_llama_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(
        folder / "run.yaml",
        policy={"model": str(tiny_llama_folder), "adapter": {"r": 4}},
        data={"train": "data/train.jsonl", "eval_fraction": 0.25},
        evaluation={},
    )
    rows = (folder / "data" / "train.jsonl").read_text()
    (folder / "data" / "train.jsonl").write_text(rows + '{"prompt": "Film is "}\n')
    code = submit_job(["score", "run.yaml", f"storage_path={folder.parent}/runs"], address=head, code=True)
    printed = capfd.readouterr()
    assert code == 2, printed.out + printed.err
    assert "data/train.jsonl:9" in printed.out
    assert "run.yaml, data/train.jsonl, polyref itself" in printed.err
    [job] = [job for job in details(head) if job["driver_exit_code"] == 2]
    assert job["entrypoint"].startswith("python -m orchestrator score run.yaml")


@pytest.fixture
def own_project(folder: Path, tiny_llama_folder: Path) -> Path:
    """A project whose names are polyref's too, with a run file that names a link of its own."""
    (folder / "models").mkdir()
    (folder / "models" / "__init__.py").write_text("MINE = True\n")
    (folder / "losses.py").write_text("MINE = True\n")
    (folder / "my_losses.py").write_text(
        "import torch\n\n\ndef exponential(h, *, beta):\n    return torch.exp(-beta * h)\n"
    )
    write(
        folder / "run.yaml",
        policy={"model": str(tiny_llama_folder), "adapter": {"r": 4}},
        data={"train": "data/train.jsonl", "eval_fraction": 0.25},
        loss={"link": {"type": "function", "function": "my_losses:exponential"}},
        training={"max_steps": 2, "pairs_per_step": 2},
        evaluation={},
    )
    return folder


@pytest.mark.long
@pytest.mark.usefixtures("token")
def test_a_project_with_packages_of_the_same_names_submits_and_trains(
    head: str, own_project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = submit_job(["train", "run.yaml", f"storage_path={own_project.parent}/runs"], address=head)
    printed = capfd.readouterr()
    assert code == 0, printed.out + printed.err
    assert "run.yaml, data/train.jsonl, my_losses.py" in printed.err
    record = json.loads((own_project.parent / "runs" / "job" / "run.json").read_text())
    assert record["result"]["step"] == 2
    assert record["identity"]["functions"].keys() == {"loss.link.function"}


@pytest.mark.long
@pytest.mark.usefixtures("token")
def test_rays_own_submit_takes_the_whole_project_and_trains(head: str, own_project: Path) -> None:
    command = [str(BIN / "ray"), "job", "submit", "--address", head, "--working-dir", ".", "--"]
    command += ["polyref", "train", "run.yaml", f"storage_path={own_project.parent}/runs"]
    done = subprocess.run(
        command, cwd=own_project, env=os.environ | {"RAY_AUTH_MODE": "token"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((own_project.parent / "runs" / "job" / "run.json").read_text())
    assert record["result"]["step"] == 2


class Tracking(http.server.BaseHTTPRequestHandler):
    """An MLflow server that only notes who comes."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization", ""))
        self.send_response(403)
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """No lines."""


@pytest.fixture
def tracking() -> Iterator[tuple[str, list[str]]]:
    Tracking.seen = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Tracking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Tracking.seen
        server.shutdown()


@pytest.mark.long
@pytest.mark.usefixtures("token", "folder")
def test_secrets_reach_the_job_and_nothing_that_can_be_looked_at(
    head: str,
    tracking: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking[0])
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    code = submit_job(
        ["models", "list"],
        address=head,
        env=["MLFLOW_TRACKING_URI"],
        secret=["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"],
    )
    printed = capfd.readouterr()
    assert code in (1, 2), printed.out  # the server lets nobody in
    password = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    assert f"Basic {password}" in tracking[1], printed.out + printed.err
    [job] = [job for job in details(head) if job["entrypoint"] == "polyref models list"]
    assert job["runtime_env"]["env_vars"]["MLFLOW_TRACKING_URI"] == tracking[0]
    box = job["runtime_env"]["env_vars"][SECRETS_LOCATION]
    for place in (json.dumps(job), printed.out, printed.err):
        assert PASSWORD not in place
    logs = Path(f"/tmp/polyref-{os.getpid()}")
    found = subprocess.run(["grep", "-rIl", "--", PASSWORD, logs], capture_output=True, text=True)
    assert found.stdout == ""
    assert left_at(head, box) == 404  # taken out


@pytest.mark.long
@pytest.mark.usefixtures("token")
def test_secrets_are_handed_out_once(head: str) -> None:
    client, _ = connect_to_job_server(head)
    variables = {SECRETS_LOCATION: "gcs://polyref-taken.zip"}
    job = client.submit_job(entrypoint="polyref models list", runtime_env={"env_vars": variables})
    until(lambda: client.get_job_info(job).status.is_terminal(), 120, lambda: client.get_job_logs(job))
    assert client.get_job_info(job).driver_exit_code == 1
    assert "polyref: the secrets of this job are gone" in client.get_job_logs(job)


def left_at(head: str, box: str) -> int:
    """What the server says of a package: 200 there, 404 gone."""
    name = box.removeprefix("gcs://")
    return requests.get(f"{head}/api/packages/gcs/{name}", headers=bearer(), timeout=30).status_code


@pytest.mark.long
@pytest.mark.usefixtures("token", "folder")
def test_without_waiting_the_id_is_all_of_the_output_and_the_job_can_be_stopped(
    head: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", head)
    assert submit_job(["check", "run.yaml"], wait=False) == 0
    printed = capfd.readouterr()
    job = printed.out.strip()
    assert job.startswith("job-")
    assert f"follow it: RAY_AUTH_MODE=token ray job logs --address {head} --follow {job}" in printed.err
    client, _ = connect_to_job_server(None)
    client.stop_job(job)
    until(lambda: client.get_job_info(job).status.is_terminal(), 60, lambda: str(client.get_job_info(job)))


@pytest.mark.long
@pytest.mark.usefixtures("token", "folder")
def test_a_job_that_is_stopped_by_somebody_is_said_to_be(
    head: str, capfd: pytest.CaptureFixture[str]
) -> None:
    client, _ = connect_to_job_server(head)
    before = {job["submission_id"] for job in details(head)}

    def stop() -> None:
        until(lambda: {job["submission_id"] for job in details(head)} > before, 60, lambda: "no job")
        [job] = {job["submission_id"] for job in details(head)} - before
        client.stop_job(job)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        with pytest.raises(RunFailed, match=r"job-\w+ was stopped"):
            submit_job(["check", "run.yaml"], address=head)
    finally:
        thread.join()


@pytest.mark.long
@pytest.mark.usefixtures("token", "folder")
def test_ctrl_c_leaves_the_job_running_and_says_how_to_follow_and_stop_it(head: str) -> None:
    command = [sys.executable, "-m", "orchestrator", "submit", "--address", head, "--", "check", "run.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    log = ""
    while "Running entrypoint" not in log:
        line = process.stdout.readline()
        assert line, process.communicate()
        log += line
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    job = said.split(":")[0]
    assert f"{job} keeps running; follow it: RAY_AUTH_MODE=token ray job logs" in said
    assert f"stop it: RAY_AUTH_MODE=token ray job stop --address {head} {job}" in said
    client, _ = connect_to_job_server(head)
    assert not client.get_job_info(job).status.is_terminal()
    client.stop_job(job)
    until(lambda: client.get_job_info(job).status.is_terminal(), 60, lambda: str(client.get_job_info(job)))


@pytest.mark.long
def test_secrets_that_nobody_takes_are_forgotten(head: str, unclaimed: tuple[str, float]) -> None:
    box, since = unclaimed
    time.sleep(max(0.0, since + 65 - time.monotonic()))  # asking keeps it anew
    assert left_at(head, box) == 404
