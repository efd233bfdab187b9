"""Runs on an object store and on folders: what is kept, what is held, what is refused. Without Ray."""

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import ray

from orchestrator.cluster.shared_storage import explain_unshared_storage, refuse_unshared
from orchestrator.driver.record import RunRecord, lock_run, open_record, read_record, remove_run
from orchestrator.errors import RunFailed, UsageError
from orchestrator.redaction import redact
from orchestrator.references.messages import Score
from orchestrator.references.store import ScoreStore
from orchestrator.storage import lease as hold
from orchestrator.storage import mirror as storage
from orchestrator.storage import probe
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.object_store import ray_storage_arguments
from orchestrator.storage.probe import refuse_unwritable, why_invisible
from preferences.buckets import redact_uri
from tests.support.bucket import Bucket, object_store


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
    mirror.discard_copy()
    assert (tmp_path / "one" / "file").read_text() == "text"
    assert mirror.list_folders("checkpoints") == ["a"]
    with mirror.fetch_folder("checkpoints/a") as folder:
        assert folder == tmp_path / "one" / "checkpoints" / "a"


def test_what_is_pushed_is_what_another_machine_pulls(bucket, tmp_path, monkeypatch):
    here = Mirror(f"{bucket.uri}/runs/one")
    (here.folder / "run.json").write_text("{}")
    (here.folder / "plots" / "deep").mkdir(parents=True)
    (here.folder / "plots" / "a.png").write_bytes(b"A")
    (here.folder / "plots" / "deep" / "b.png").write_bytes(b"B" * 10_000_000)
    here.push("run.json", "plots", "absent")
    assert bucket.keys() == ["runs/one/plots/a.png", "runs/one/plots/deep/b.png", "runs/one/run.json"]
    assert here.describe_path("plots") == f"{bucket.uri}/runs/one/plots"

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
    with there.fetch_folder("plots") as copy:
        assert [path.name for path in copy.rglob("*.png")] == ["b.png"]
    assert not copy.exists()
    there.discard_copy()
    assert not there.folder.exists()


@pytest.mark.parametrize("key", ["../../evil", "deep/../../../evil"])
def test_a_name_on_a_store_does_not_lead_out_of_the_folder(bucket, tmp_path, key, monkeypatch):
    """Names with `..` are ordinary on a store, and are listed; this client would not fetch them."""
    here = Mirror(f"{bucket.uri}/runs/one")
    bucket.put("runs/one/plots/a.png", b"A")
    bucket.put(f"runs/one/plots/{key}", b"B")
    monkeypatch.setattr(pafs, "copy_files", lambda *_, **__: pytest.fail("something was copied"))
    with pytest.raises(RunFailed, match=r"evil is stored under a name that leads out of its folder"):
        here.pull("plots")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_command_and_workers_of_a_run_work_apart(bucket):
    home = f"{bucket.uri}/one"
    folders = {Mirror(home).folder, Mirror(home, worker=0).folder, Mirror(home, worker=1).folder}
    assert len(folders) == 3
    assert Mirror(f"{bucket.uri}/elsewhere/one").folder not in folders


def test_growing_files_are_kept_and_followed(bucket):
    worker, driver = Mirror(f"{bucket.uri}/one", worker=0), Mirror(f"{bucket.uri}/one")
    lines = worker.folder / "metrics.jsonl"
    with (
        worker.push_periodically("metrics.jsonl", every_s=0.05),
        driver.pull_periodically("metrics.jsonl", every_s=0.05),
    ):
        for number in range(3):
            with lines.open("a") as file:
                file.write(f"{number}\n")
            seen = driver.folder / "metrics.jsonl"
            deadline = time.monotonic() + 60
            while not seen.exists() or seen.read_text() != lines.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.02)
    threads = [thread.name for thread in threading.enumerate()]
    with worker.push_periodically("metrics.jsonl"):
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

    monkeypatch.setattr(mirror, "_push_names", push)
    with mirror.push_periodically("metrics.jsonl", every_s=0.01):
        assert tried.wait(60)
    assert [entry.getMessage() for entry in caplog.records] == [
        f"{bucket.uri}/one does not answer (gone); retrying"
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
    bucket.put("runs/one/notes.txt", b"mine")
    remove_run(Mirror(home), kind="run")
    assert bucket.keys() == ["runs/one/notes.txt", "runs/one2/run.json"]
    with pytest.raises(UsageError, match=r"no run.json is there, but notes.txt"):
        remove_run(Mirror(home), kind="run")
    assert read_record(Mirror(home)) is None
    bucket.put("runs/one/run.json", b"{")
    with pytest.raises(UsageError, match=rf"{home}/run.json: is not a run's record"):
        read_record(Mirror(home))


_HOLDER = """
import sys, time
from orchestrator.storage.mirror import Mirror
with Mirror(sys.argv[1]).hold_lease():
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
        with pytest.raises(UsageError, match=taken), lock_run(Mirror(home)):
            pass
    finally:
        other.kill()
        other.wait()
    assert bucket.keys() == ["one/.held.json"]  # it was killed
    began = time.monotonic()
    with lock_run(Mirror(home)):
        assert time.monotonic() - began < hold._EXPIRY_S  # known to be gone: no need to wait
        assert json.loads(bucket.get("one/.held.json"))["pid"] == os.getpid()
    assert bucket.keys() == []

    left = {"id": "x", "where": ["another-machine", ""], "pid": 1, "beat": 1.0}
    bucket.put("one/.held.json", json.dumps(left).encode())
    monkeypatch.setattr(hold, "_EXPIRY_S", 3)
    with lock_run(Mirror(home)):  # nobody signs any more
        assert json.loads(bucket.get("one/.held.json"))["pid"] == os.getpid()
        record().write(Mirror(home))
        bucket.put("one/checkpoints/checkpoint_1/progress.json", b"{}")
        remove_run(Mirror(home), kind="run")
        assert bucket.keys() == ["one/.held.json"], "a run that starts over stays held"
    assert bucket.keys() == []


def test_of_commands_that_start_together_one_gets_the_run(bucket, monkeypatch):
    monkeypatch.setattr(hold, "_SETTLE_S", 0.5)
    together, outcomes = threading.Barrier(4), []

    def start() -> None:
        mine = Mirror(f"{bucket.uri}/one")
        together.wait()
        try:
            with mine.hold_lease():
                outcomes.append("held")
                time.sleep(2)
        except UsageError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("held") == 1
    assert sum(f"is being trained by process {os.getpid()} on" in outcome for outcome in outcomes) == 3
    assert bucket.keys() == []


def test_slow_answers_do_not_hold_the_beat_back(bucket, monkeypatch):
    monkeypatch.setattr(hold, "_SETTLE_S", 0)
    monkeypatch.setattr(hold, "_RENEW_S", 0.05)
    beats, sign = [], hold.RunLease._write_lease

    def slowly(self: hold.RunLease) -> None:
        time.sleep(0.3)
        sign(self)
        beats.append(time.monotonic())

    monkeypatch.setattr(hold.RunLease, "_write_lease", slowly)
    with lock_run(Mirror(f"{bucket.uri}/one")):
        time.sleep(4)
    pauses = [later - before for before, later in itertools.pairwise(beats[1:])]
    assert len(pauses) >= 2
    assert max(pauses) < 2


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["ctrl-c", "with &"])
def test_who_has_lost_a_run_stops_and_leaves_the_sign_of_the_other(bucket, monkeypatch, caplog, ctrl_c):
    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        _lose_a_run(bucket, monkeypatch, caplog)
    finally:
        signal.signal(signal.SIGINT, before)


def _lose_a_run(bucket, monkeypatch, caplog) -> None:
    monkeypatch.setattr(hold, "_SETTLE_S", 0.1)
    monkeypatch.setattr(hold, "_RENEW_S", 0.1)
    other = {"id": "x", "where": ["another-machine", "", ""], "pid": 7, "beat": 1.0}
    began = time.monotonic()
    with (
        pytest.raises(RunFailed, match=r"one was taken by process 7 on another-machine .* this one stops"),
        lock_run(Mirror(f"{bucket.uri}/one")),
    ):
        _take_over(bucket, other)
    assert time.monotonic() - began < 30
    assert "was taken by process 7" in caplog.text
    assert json.loads(bucket.get("one/.held.json")) == other


def _take_over(bucket: Bucket, sign: dict) -> None:
    bucket.put("one/.held.json", json.dumps(sign).encode())
    time.sleep(60)


def test_ctrl_c_is_still_ctrl_c_while_a_run_is_held(bucket, monkeypatch):
    monkeypatch.setattr(hold, "_SETTLE_S", 0)
    with pytest.raises(KeyboardInterrupt), lock_run(Mirror(f"{bucket.uri}/one")):
        raise KeyboardInterrupt
    assert bucket.keys() == []


def test_a_process_is_known_to_be_gone_on_its_own_machine_only(tmp_path, monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert hold._is_owner_gone({"where": hold._identify_machine(), "pid": ended.pid})
    assert not hold._is_owner_gone({"where": hold._identify_machine(), "pid": os.getpid()})
    signed = {"where": hold._identify_machine(), "pid": ended.pid}
    (tmp_path / "boot_id").write_text("another")
    monkeypatch.setattr(hold, "_BOOT_ID", tmp_path / "boot_id")  # a machine with the same image and name
    assert not hold._is_owner_gone(signed)


def test_what_a_killed_command_left_to_be_seen_goes_at_the_next_start(bucket, tmp_path):
    bucket.put("one/.seen-old", b"polyref")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / ".seen-old").write_text("polyref")
    for home in (f"{bucket.uri}/one", str(tmp_path / "one"), str(tmp_path / "new")):
        with Mirror(home).write_probe() as written:
            assert written.startswith(f"{home}/.seen-")
            assert why_invisible(written) is None
    assert bucket.keys() == []
    assert list(tmp_path.rglob(".seen-*")) == []


def test_a_store_that_goes_away_fails_the_run_with_a_line(bucket, tmp_path, monkeypatch):
    kept = Mirror(f"{bucket.uri}/one")
    worker = Mirror(f"{bucket.uri}/one", worker=0)
    monkeypatch.setattr(storage, "download_path", _gone)
    monkeypatch.setattr(storage, "upload_path", _gone)
    said = rf"{bucket.uri}/one cannot be read or written \(no route\); check the name, .* The same command re"
    for act in (lambda: kept.pull("x"), lambda: read_record(kept), lambda: record().write(kept)):
        with pytest.raises(RunFailed, match=said):
            act()
    with pytest.raises(OSError, match="no route"):  # for which Ray starts it again
        worker.pull("x")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match=rf"{tmp_path}/file/run cannot be read or written .* check the disk"):
        record().write(tmp_path / "file" / "run")


def _gone(*_: object) -> None:
    raise OSError("no route")


# ---- refusals ----


def test_storage_that_can_be_written(bucket, tmp_path):
    refuse_unwritable(str(tmp_path / "new" / "folder"))
    refuse_unwritable(f"{bucket.uri}/new/prefix")
    refuse_unwritable(f"{bucket.uri}/new/prefix?region=us-east-1")
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
            refuse_unwritable(place)


def test_ray_gets_the_keys_of_the_command(bucket, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    for place in ("one", f"one?endpoint_override={endpoint}&scheme=http"):
        store, path = ray_storage_arguments(f"{bucket.uri}/{place}")
        crossed = pickle.dumps(store)
        with monkeypatch.context() as elsewhere:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
                elsewhere.delenv(name)
            with pickle.loads(crossed).open_output_stream(f"{path}/file") as stream:
                stream.write(b"written")
        assert bucket.get("one/file") == b"written"
    assert ray_storage_arguments("/a/folder") == (None, "/a/folder")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")  # nodes have roles of their own
    assert ray_storage_arguments(f"{bucket.uri}/one") == (None, f"{bucket.uri}/one")


def test_a_key_in_a_uri_is_not_shown(bucket):
    with pytest.raises(UsageError) as refused:
        refuse_unwritable("s3://someone:hidden@no-such-bucket/runs?region=us-east-1")
    assert "storage_path s3://no-such-bucket/runs cannot" in str(refused.value)
    assert "hidden" not in str(refused.value)
    with pytest.raises(
        UsageError, match=r"storage_path s3://bucket/runs cannot be written .*syntax"
    ) as refused:
        refuse_unwritable("s3://someone:hid/den@bucket/runs")  # its client repeats it
    assert "hid" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://KEY:secret@bucket/runs?region=x", "s3://bucket/runs"),
        ("s3://KEY:se/cr/et@bucket/runs", "s3://bucket/runs"),
        ("s3://KEY:se@cr/et@bucket/runs", "s3://bucket/runs"),
        ("s3://KEY:se?cret@bucket/runs?region=x", "s3://bucket/runs"),
        ("s3://KEY:se/cret@bucket?endpoint_override=a@b", "s3://bucket"),
        ("s3://bucket/a:b@c/runs", "s3://bucket/a:b@c/runs"),
        (
            "abfss://container@account.dfs.core.windows.net/x",
            "abfss://container@account.dfs.core.windows.net/x",
        ),
        ("https://me:pa@ss@host:80/a@b", "https://host:80/a@b"),
        ("https://host:80/a@b", "https://host:80/a@b"),
    ],
)
def test_a_uri_is_shown_without_its_secret(uri, shown):
    assert redact_uri(uri) == shown
    for part in ("secret", "cret", "cr/et", "pa@ss"):
        assert part not in redact(f"cannot read {uri}, sorry")


def test_nodes_that_cannot_look_are_told_and_those_that_are_gone_are_not(tmp_path, monkeypatch, caplog):
    answers: dict[str, object] = {}

    class Look:
        def __call__(self, function):
            return self

        def options(self, scheduling_strategy):
            self.node = scheduling_strategy.node_id
            return self

        def remote(self, *_):
            return self.node

    def get(node: str) -> object:
        if isinstance(answers[node], Exception):
            raise answers[node]
        return answers[node]

    def wait(asked: list[str], **_: object) -> tuple[list[str], list[str]]:
        return [node for node in asked if node in answers], [node for node in asked if node not in answers]

    alive = [{"NodeID": f"{n}" * 56, "NodeManagerAddress": f"10.0.0.{n}", "Alive": True} for n in (1, 2, 3)]
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr(ray, "remote", lambda **_: Look())
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)

    answers |= {"1" * 56: None, "2" * 56: ray.exceptions.NodeDiedError("gone")}
    refuse_unshared(str(tmp_path))
    assert "was not answered within 60 s by: 10.0.0.3" in caplog.text
    cause = ModuleNotFoundError("No module named 'orchestrator'")
    answers["3" * 56] = ray.exceptions.RayTaskError("_check_visibility", "Traceback", cause)
    with pytest.raises(
        UsageError, match=r"node 10.0.0.3 could not look .*No module named 'orchestrator'\); poly"
    ):
        refuse_unshared(str(tmp_path))
    answers["3" * 56] = "no such folder there"
    with pytest.raises(UsageError, match=r"not shared: node 10.0.0.3 does not see it"):
        refuse_unshared(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_wrote_is_seen_or_why_not(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_VISIBLE_WITHIN_S", 0.3)
    for place in (str(tmp_path / "runs"), f"{bucket.uri}/runs"):
        with storage.write_probe(place) as written:
            assert why_invisible(written) is None
        assert why_invisible(written) is not None
    assert why_invisible(f"{tmp_path}/runs/x") == "the folder there is another one"
    assert why_invisible(f"{tmp_path}/elsewhere/x") == "no such folder there"
    assert explain_unshared_storage("/x", "10.0.0.3", "no such folder there") == (
        "storage_path /x is not shared: node 10.0.0.3 does not see it (no such folder there); mount it on "
        "all nodes (NFS, EFS, Filestore), or give the URI of an object store, as in s3://bucket/runs"
    )
    assert "node 10.0.0.3 cannot read it (denied); check" in explain_unshared_storage(
        "s3://b/x", "10.0.0.3", "denied"
    )


def test_scores_are_kept_on_a_store(bucket):
    first = ScoreStore(f"{bucket.uri}/runs", "abc")
    first.put(b"k" * 16, Score(-1.5, 3, 0.25))
    assert first.flush() == 1
    assert ScoreStore(f"{bucket.uri}/runs", "abc").get(b"k" * 16) == Score(-1.5, 3, 0.25)
    [key] = bucket.keys()
    assert key.startswith("runs/scores/abc/")
