"""Runs on an object store and on folders: what is kept, what is held, what is refused. Without Ray."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bucket import Bucket, object_store

from orchestrator import storage
from orchestrator.config import UsageError
from orchestrator.record import RunRecord, locked, open_record, read_record, remove_run
from orchestrator.references.messages import Score
from orchestrator.references.store import ScoreStore
from orchestrator.storage import Mirror


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    with object_store() as environment:
        yield environment


@pytest.fixture
def bucket(store: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "cache"))
    return Bucket()


def record(**changes: object) -> RunRecord:
    settings: dict = {
        "config": {"name": "one"},
        "device_type": "cpu",
        "identity": {},
        "pins": {},
        "counts": {},
    }
    return RunRecord(**(settings | changes))


def test_a_folder_is_its_own_mirror(tmp_path):
    mirror = Mirror(str(tmp_path / "one"))
    assert (mirror.folder, mirror.remote, str(mirror)) == (tmp_path / "one", False, str(tmp_path / "one"))
    (tmp_path / "one" / "checkpoints" / "a").mkdir(parents=True)
    (tmp_path / "one" / "file").write_text("text")
    mirror.pull("file", "absent")
    mirror.push("file", "absent")
    mirror.discard()
    assert (tmp_path / "one" / "file").read_text() == "text"
    assert mirror.folders("checkpoints") == ["a"]
    with mirror.fetched("checkpoints/a") as folder:
        assert folder == tmp_path / "one" / "checkpoints" / "a"


def test_what_is_pushed_is_what_another_machine_pulls(bucket, tmp_path, monkeypatch):
    here = Mirror(f"{bucket.uri}/runs/one")
    (here.folder / "run.json").write_text("{}")
    (here.folder / "plots" / "deep").mkdir(parents=True)
    (here.folder / "plots" / "a.png").write_bytes(b"A")
    (here.folder / "plots" / "deep" / "b.png").write_bytes(b"B" * 10_000_000)
    here.push("run.json", "plots", "absent")
    assert bucket.keys() == ["runs/one/plots/a.png", "runs/one/plots/deep/b.png", "runs/one/run.json"]
    assert here.place("plots") == f"{bucket.uri}/runs/one/plots"

    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "other machine"))
    there = Mirror(f"{bucket.uri}/runs/one")
    assert there.folder != here.folder
    (there.folder / "stale.json").write_text("of another time")
    (there.folder / "plots").mkdir()
    (there.folder / "plots" / "stale.png").write_text("of another time")
    there.pull("run.json", "plots", "stale.json")
    files = {str(path.relative_to(there.folder)) for path in there.folder.rglob("*") if path.is_file()}
    assert files == {"run.json", "plots/a.png", "plots/deep/b.png"}
    assert (there.folder / "plots/deep/b.png").read_bytes() == b"B" * 10_000_000

    (there.folder / "plots" / "a.png").unlink()
    there.push("plots")
    assert bucket.keys("runs/one/plots") == ["runs/one/plots/deep/b.png"]
    with there.fetched("plots") as copy:
        assert [path.name for path in copy.rglob("*.png")] == ["b.png"]
    assert not copy.exists()
    there.discard()
    assert not there.folder.exists()


def test_command_and_workers_of_a_run_work_apart(bucket):
    home = f"{bucket.uri}/one"
    folders = {Mirror(home).folder, Mirror(home, worker=0).folder, Mirror(home, worker=1).folder}
    assert len(folders) == 3
    assert Mirror(f"{bucket.uri}/elsewhere/one").folder not in folders


def test_growing_files_are_kept_and_followed(bucket):
    worker, driver = Mirror(f"{bucket.uri}/one", worker=0), Mirror(f"{bucket.uri}/one")
    lines = worker.folder / "metrics.jsonl"
    with worker.pushing("metrics.jsonl", every_s=0.05), driver.pulling("metrics.jsonl", every_s=0.05):
        for number in range(3):
            with lines.open("a") as file:
                file.write(f"{number}\n")
            seen = driver.folder / "metrics.jsonl"
            deadline = time.monotonic() + 60
            while not seen.exists() or seen.read_text() != lines.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.02)
    threads = [thread.name for thread in threading.enumerate()]
    with worker.pushing("metrics.jsonl"):
        assert len(threading.enumerate()) == len(threads) + 1
    assert len(threading.enumerate()) == len(threads)


def test_a_store_that_is_away_for_a_while_costs_nothing(bucket, monkeypatch, caplog):
    mirror = Mirror(f"{bucket.uri}/one")
    answers = iter([OSError("gone"), OSError("gone"), None])
    tried = threading.Event()

    def push(*names: str) -> None:
        answer = next(answers, None)
        if answer is None:
            tried.set()
        else:
            raise answer

    monkeypatch.setattr(mirror, "push", push)
    with mirror.pushing("metrics.jsonl", every_s=0.01):
        assert tried.wait(60)
    assert [entry.getMessage() for entry in caplog.records] == [
        f"{bucket.uri}/one does not answer (gone); it is tried again"
    ]


# ---- records and holds ----


def test_a_record_is_kept_on_the_store(bucket, tmp_path, monkeypatch):
    home = f"{bucket.uri}/runs/one"
    assert read_record(Mirror(home)) is None
    written = open_record(Mirror(home), record())
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "other machine"))
    assert read_record(Mirror(home)) == written
    with pytest.raises(UsageError, match=rf"run 'one' in {home} was started with other settings: loss"):
        open_record(Mirror(home), record(config={"name": "one", "loss": 1}))
    bucket.put("runs/one/checkpoints/checkpoint_1/progress.json", b"{}")
    bucket.put("runs/one2/run.json", b"{}")
    remove_run(Mirror(home))
    assert bucket.keys() == ["runs/one2/run.json"]
    assert read_record(Mirror(home)) is None
    bucket.put("runs/one/run.json", b"{")
    with pytest.raises(UsageError, match=rf"{home}/run.json: is not a run's record"):
        read_record(Mirror(home))


_HOLDER = """
import sys, time
from orchestrator.storage import Mirror
with Mirror(sys.argv[1]).held():
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_run_on_a_store_is_held_by_one_process(bucket, monkeypatch):
    home = f"{bucket.uri}/one"
    other = subprocess.Popen([sys.executable, "-c", _HOLDER, home], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        taken = rf"run 'one' in {home} is being trained by process {other.pid} on"
        with pytest.raises(UsageError, match=taken), locked(Mirror(home)):
            pass
    finally:
        other.kill()
        other.wait()
    assert bucket.keys() == ["one/.held.json"]  # it was killed
    began = time.monotonic()
    with locked(Mirror(home)):
        assert time.monotonic() - began < storage._SILENT_S  # known to be gone: no need to wait
        assert json.loads(bucket.get("one/.held.json"))["pid"] == os.getpid()
    assert bucket.keys() == []

    left = {"id": "x", "where": ["another-machine", ""], "pid": 1, "beat": 1.0}
    bucket.put("one/.held.json", json.dumps(left).encode())
    monkeypatch.setattr(storage, "_SILENT_S", 3)
    with locked(Mirror(home)):  # nobody signs any more
        assert json.loads(bucket.get("one/.held.json"))["pid"] == os.getpid()


# ---- refusals ----


def test_storage_that_can_be_written(bucket, tmp_path):
    storage.refuse_unwritable(str(tmp_path / "new" / "folder"))
    storage.refuse_unwritable(f"{bucket.uri}/new/prefix")
    storage.refuse_unwritable(f"{bucket.uri}/new/prefix?region=us-east-1")
    assert bucket.keys() == []


def test_storage_that_cannot_be_written(bucket, tmp_path):
    (tmp_path / "file").write_text("")
    for place, said in (
        (f"{tmp_path}/file/runs", r"cannot be written \(Not a directory\); name a folder that can"),
        (
            "s3://no-such-bucket/runs",
            r"cannot be written \(.*bucket does not exist\); check the name, .*AWS_",
        ),
        ("http://example.test/runs", r"is a URI that runs cannot be kept at; .* s3://, gs://"),
        ("file:///tmp/runs", r"is a URI that runs cannot be kept at; give a folder"),
        ("abfss://container/runs", r"cannot be written \(.*account name\); .*abfss://container@account"),
    ):
        with pytest.raises(UsageError, match=f"storage_path {place} {said}"):
            storage.refuse_unwritable(place)


def test_ray_gets_the_keys_of_the_command(bucket, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    for place in ("one", f"one?endpoint_override={endpoint}&scheme=http"):
        store, path = storage.for_ray(f"{bucket.uri}/{place}")
        crossed = pickle.dumps(store)
        with monkeypatch.context() as elsewhere:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
                elsewhere.delenv(name)
            with pickle.loads(crossed).open_output_stream(f"{path}/file") as stream:
                stream.write(b"written")
        assert bucket.get("one/file") == b"written"
    assert storage.for_ray("/a/folder") == (None, "/a/folder")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")  # nodes have roles of their own
    assert storage.for_ray(f"{bucket.uri}/one") == (None, f"{bucket.uri}/one")


def test_a_key_in_a_uri_is_not_shown(bucket):
    with pytest.raises(UsageError) as refused:
        storage.refuse_unwritable("s3://someone:hidden@no-such-bucket/runs?region=us-east-1")
    assert "storage_path s3://no-such-bucket/runs cannot" in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_what_another_process_wrote_is_seen_or_why_not(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_SEEN_WITHIN_S", 0.3)
    for place in (str(tmp_path / "runs"), f"{bucket.uri}/runs"):
        with storage.beacon(place) as written:
            assert storage.visible(written) is None
        assert storage.visible(written) is not None
    assert storage.visible(f"{tmp_path}/runs/x") == "the folder there is another one"
    assert storage.visible(f"{tmp_path}/elsewhere/x") == "no such folder there"
    assert storage.unshared("/x", "10.0.0.3", "no such folder there") == (
        "storage_path /x is not shared: node 10.0.0.3 does not see it (no such folder there); mount it on "
        "all nodes (NFS, EFS, Filestore), or give the URI of an object store, as in s3://bucket/runs"
    )
    assert "node 10.0.0.3 cannot read it (denied); check" in storage.unshared(
        "s3://b/x", "10.0.0.3", "denied"
    )


def test_scores_are_kept_on_a_store(bucket):
    first = ScoreStore(f"{bucket.uri}/runs", "abc")
    first.put(b"k" * 16, Score(-1.5, 3, 0.25))
    assert first.flush() == 1
    assert ScoreStore(f"{bucket.uri}/runs", "abc").get(b"k" * 16) == Score(-1.5, 3, 0.25)
    [key] = bucket.keys()
    assert key.startswith("runs/scores/abc/")
