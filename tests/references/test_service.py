"""The service on real Ray, with replicas whose scores are known beforehand: counts, joins, deaths, ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.util import list_named_actors
from transformers import LlamaForSequenceClassification

from models.config import ModelConfig
from orchestrator.cluster.connection import NAMESPACE
from orchestrator.config.sections import Resources, RewardConfig
from orchestrator.errors import RunFailed, UsageError
from orchestrator.references import client as references_client
from orchestrator.references.client import (
    ReferenceArrays,
    ReferenceClient,
    connect_to_routers,
    group_pairs,
)
from orchestrator.references.messages import Scores, ScoringError
from orchestrator.references.replica import Replica
from orchestrator.references.service import build_reference_spec, start_references
from orchestrator.references.store import ScoreStore
from orchestrator.worker.rewards import RewardModelActor, start_reward_scorer
from tests.support import tiny

ROOT = Path(__file__).parents[2]
ROWS = np.arange(6)


def client_of(service, table, **options):
    return ReferenceClient(service.routers, dict.fromkeys(service.routers, table), **options)


def ask_all(service, table, rows=ROWS):
    client = client_of(service, table)
    client.request_scores("all", rows)
    return client.collect_scores("all")


def running_polyref_actors():
    return [a["name"] for a in list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]


def test_scored_once_then_from_the_store_then_without_a_replica(serve, spec, make_table, right):
    table = make_table(6)
    with serve(spec()) as service:
        client = client_of(service, table)
        for ticket in (0, 1):
            client.request_scores(ticket, ROWS)
            assert right(table, ROWS, client.collect_scores(ticket)["base"])
        stats = service.stats()["base"]
        assert (stats.requested, stats.from_store, stats.coalesced, stats.scored) == (24, 12, 0, 12)
        assert (stats.batches, stats.forwards, stats.retries, stats.replicas_started) == (1, 1, 0, 1)
        assert client.stall_seconds > 0
    with serve(spec()) as service:
        arrays = ask_all(service, table)["base"]
        assert right(table, ROWS, arrays)
        arrays.chosen[:] += 1  # the caller's own, not Ray's read-only memory
        assert service.count_missing({"base": table}) == {"base": 0}
        stats = service.stats()["base"]
        assert (stats.from_store, stats.scored, stats.replicas_started) == (12, 0, 0)
    assert running_polyref_actors() == []


def test_asking_does_not_wait_and_tickets_may_be_collected_in_any_order(
    serve, spec, make_table, folder, calls, right
):
    table = make_table(6)
    gate = folder / "gate"
    gate.touch()
    with serve(spec()) as service:
        client = client_of(service, table)
        client.request_scores("one", [0, 1])
        client.request_scores("two", [5, 3, 4])
        with pytest.raises(ValueError, match="still open"):
            client.request_scores("one", [0])
        calls.wait_for(1)  # the replica works, and nobody has answered yet
        gate.unlink()
        assert right(table, [5, 3, 4], client.collect_scores("two")["base"])
        assert right(table, [0, 1], client.collect_scores("one")["base"])


def test_two_askers_of_the_same_responses_share_one_forward(serve, spec, make_table, folder, calls, right):
    table = make_table(6)
    gate = folder / "gate"
    gate.touch()
    with serve(spec()) as service:
        first, second = client_of(service, table), client_of(service, table)
        first.request_scores(0, ROWS)
        calls.wait_for(1)
        second.request_scores(0, ROWS[::-1])
        while ray.get(service.routers["base"].stats.remote()).requested < 24:
            time.sleep(0.01)
        gate.unlink()
        assert right(table, ROWS, first.collect_scores(0)["base"])
        assert right(table, ROWS[::-1], second.collect_scores(0)["base"])
        stats = service.stats()["base"]
        assert (stats.requested, stats.coalesced, stats.scored, stats.batches) == (24, 12, 12, 1)
    assert sum(calls.sizes) == 12


def test_what_waits_for_a_replica_is_merged_into_full_batches(serve, spec, make_table, folder, calls):
    table = make_table(40)
    (folder / "gate").touch()
    with serve(spec(max_tokens_per_batch=10_000)) as service:
        clients = [client_of(service, table) for _ in range(4)]
        for _ in range(2):  # both places of the replica are taken
            before = len(calls.sizes)
            clients[0].request_scores(before, [before])
            if not before:
                calls.wait_for(1)
        while ray.get(service.routers["base"].stats.remote()).requested < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        for number, client in enumerate(clients):
            client.request_scores("more", range(4 + number * 9, 13 + number * 9))
        while ray.get(service.routers["base"].stats.remote()).requested < 4 + 72:
            time.sleep(0.01)
        (folder / "gate").unlink()
        for client in clients:
            client.collect_scores("more")
    assert calls.sizes == [2, 2, 72]


def test_batches_keep_the_token_budget(serve, spec, make_table, calls, right):
    table = make_table(30)
    with serve(spec(max_tokens_per_batch=100)) as service:
        assert right(table, range(30), ask_all(service, table, range(30))["base"])
        assert service.stats()["base"].batches == len(calls.sizes) > 5
    assert max(calls.sizes) <= 2 * 100 // 3


def test_the_least_loaded_of_two_replicas_comes_first(serve, spec, make_table, folder, calls, right):
    table = make_table(30)
    with serve(spec(replicas=2, max_tokens_per_batch=60)) as service:
        service.start_replicas()
        gate = folder / "gate"
        gate.touch()
        client = client_of(service, table)
        client.request_scores(0, range(30))
        calls.wait_for(2)
        assert len(set(calls.pids)) == 2
        gate.unlink()
        assert right(table, range(30), client.collect_scores(0)["base"])
        assert service.stats()["base"].replicas_started == 2


@pytest.mark.parametrize("letters", [1, 2])
def test_a_batch_survives_the_death_of_its_replica(serve, spec, make_table, folder, calls, right, letters):
    table = make_table(6)
    (folder / "die").write_text("x" * letters)
    with serve(spec()) as service:
        assert right(table, ROWS, ask_all(service, table)["base"])
        stats = service.stats()["base"]
        assert (stats.retries, stats.replicas_started, stats.scored) == (letters, letters + 1, 12)
    assert len(set(calls.pids)) == letters + 1


def test_an_idle_replica_killed_from_outside_is_replaced(serve, spec, make_table, right):
    table = make_table(6)
    with serve(spec()) as service:
        ask_all(service, table, [0])
        (pid,) = ray.get(service.routers["base"].replica_pids.remote())
        os.kill(pid, signal.SIGKILL)
        assert right(table, ROWS, ask_all(service, table)["base"])
        stats = service.stats()["base"]
        assert (stats.replicas_started, stats.scored) == (2, 12)


def test_replicas_that_always_die_give_an_error_to_everyone_and_later_asks_begin_anew(
    serve, spec, make_table, folder, right
):
    table = make_table(6)
    (folder / "die").write_text("x" * 100)
    with serve(spec()) as service:
        clients = [client_of(service, table) for _ in range(2)]
        for client in clients:
            client.request_scores(0, ROWS)
        for client in clients:
            with pytest.raises(ScoringError, match=r"reference 'base'.* 3 times"):
                client.collect_scores(0)
        (folder / "die").unlink()
        assert right(table, ROWS, ask_all(service, table)["base"])
    assert running_polyref_actors() == []


def test_a_replica_that_cannot_load_is_an_error_at_once(serve, spec, make_table, folder):
    (folder / "refuse").touch()
    with serve(spec()) as service:
        with pytest.raises(ScoringError, match="reference 'base': RuntimeError: no such weights"):
            service.start_replicas()
        with pytest.raises(ScoringError, match="no such weights"):
            ask_all(service, make_table(6))
        assert service.stats()["base"].retries == 0


def test_a_replica_that_fits_nowhere_is_an_error_in_time(serve, spec, make_table):
    told = r"no node had room .*1 no-such-thing.* within 0\.5 s"
    nowhere = spec(resources={"no-such-thing": 1.0}, start_timeout_s=0.5)
    with serve(nowhere) as service, pytest.raises(ScoringError, match=told):
        ask_all(service, make_table(6))


def test_a_score_that_is_not_finite_fails_only_its_askers_and_is_not_stored(
    serve, spec, make_table, folder, right
):
    table = make_table(6)
    (folder / "nan").touch()
    with serve(spec()) as service:
        with pytest.raises(ScoringError, match=r"reference 'base' gave .* digest [0-9a-f]{32}"):
            ask_all(service, table)
        assert service.count_missing({"base": table}) == {"base": 1}
        (folder / "nan").unlink()
        assert right(table, ROWS, ask_all(service, table)["base"])


@pytest.mark.parametrize("damage", ["not a number", "positive", "entropy", "length"])
def test_a_score_that_cannot_be_one_is_made_again_by_another_process(
    serve, spec, make_table, folder, calls, right, damage
):
    table = make_table(6)
    (folder / "wrong once").write_text(damage)
    with serve(spec()) as service:
        assert right(table, ROWS, ask_all(service, table)["base"])
        assert len(set(calls.pids)) == 2
        assert service.stats()["base"].retries == 1


def test_a_frozen_replica_is_replaced_after_its_deadline(serve, spec, make_table, folder, calls, right):
    table = make_table(6)
    (folder / "freeze").touch()
    with serve(spec(answer_timeout_s=0.25)) as service:
        assert right(table, ROWS, ask_all(service, table)["base"])
        frozen, alive = dict.fromkeys(calls.pids)
        assert service.stats()["base"].replicas_started == 2
        wait_until(lambda: gone(frozen))
        assert not gone(alive)


def test_a_replica_that_always_hangs_is_an_error_that_says_so(serve, spec, make_table, folder):
    (folder / "gate").touch()
    with serve(spec(answer_timeout_s=0.1, max_retries=1)) as service:
        with pytest.raises(ScoringError, match=r"did not answer a batch of \d+ tokens .*answer_minutes"):
            ask_all(service, make_table(6))
        (folder / "gate").unlink()


def test_a_replica_that_loads_for_ever_is_an_error_that_says_so(ray_running, spec, make_table, tmp_path):
    service = start_references(
        [spec(load_timeout_s=0.2, max_retries=1)], tmp_path / "storage", replica_class=Sleeper
    )
    with service, pytest.raises(ScoringError, match=r"did not load its model within 0\.2 s .*load_minutes"):
        service.start_replicas()


class Sleeper(Replica):
    """A replica whose weights never arrive."""

    def setup(self) -> None:
        time.sleep(600)


def test_an_idle_replica_takes_the_batch_of_a_stuck_one(serve, spec, make_table, folder, calls, right):
    """No deadline passes in this test: the copy's answer counts, and the stuck replica is left alone."""
    with serve(spec(replicas=2, max_tokens_per_batch=40)) as service:
        service.start_replicas()
        ask_all(service, make_table(12, seed=1))
        (folder / "freeze").touch()
        table = make_table(6)
        assert right(table, ROWS, ask_all(service, table)["base"])
        stats = service.stats()["base"]
        assert (stats.replicas_started, stats.retries) == (2, 0)
        assert stats.copies >= 1
        for pid in set(calls.pids):
            os.kill(pid, signal.SIGCONT)


def test_a_frozen_router_is_restarted_and_open_requests_with_it(
    serve, spec, make_table, folder, calls, right, monkeypatch
):
    monkeypatch.setattr(references_client, "PING_EVERY_S", 0.5)
    monkeypatch.setattr(references_client, "PING_TIMEOUT_S", 15.0)
    table = make_table(6)
    (folder / "gate").touch()
    with serve(spec()) as service:
        client = client_of(service, table)
        client.request_scores(0, ROWS)
        calls.wait_for(1)
        os.kill(ray.get(service.routers["base"].ping.remote()), signal.SIGSTOP)
        (folder / "gate").unlink()
        assert right(table, ROWS, client.collect_scores(0)["base"])


def test_secrets_reach_replicas_and_lie_in_no_control_service(
    ray_running, make_table, folder, tmp_path, monkeypatch
):
    """The memory of Ray's control service is searched for them, as somebody on its machine could."""
    token, shown = f"hf_{os.urandom(12).hex()}", f"shown-{os.urandom(12).hex()}"
    monkeypatch.setenv("HF_TOKEN", token)
    spec = build_reference_spec(
        shown,
        ModelConfig(model=str(folder)),
        "e" * 32,
        device_type="cpu",
        bundle={"CPU": 0.1},
        replicas=1,
        start_timeout_s=60,
    )
    with start_references([spec], tmp_path / "storage", replica_class=TokenReader) as service:
        client = ReferenceClient({"x": service.routers[shown]}, {"x": make_table(1)})
        client.request_scores(0, [0])
        assert client.collect_scores(0)["x"].chosen[0] == -len(token)
        (control,) = [p for p in psutil.process_iter(["name"]) if p.name() == "gcs_server" and is_ours(p)]
        memory = read_memory(control.pid)
        assert shown.encode() in memory
        assert token.encode() not in memory


class TokenReader(Replica):
    """A replica whose scores are the length of its hub's token."""

    def setup(self) -> None:
        assert self._spec.secrets is not None
        self._spec.secrets.export_to_environment()

    def score(self, request):
        scores = Scores(
            *(np.full(len(request), number) for number in (-float(len(os.environ["HF_TOKEN"])), 0, 0.5))
        )
        scores.lengths[:] = [n for group in request.unpack() for n in group.scored_lengths]
        return scores, 1


def is_ours(process):
    address = ray.get_runtime_context().gcs_address
    return f"--gcs_server_port={address.rpartition(':')[2]}" in process.cmdline() or any(
        str(connection.laddr.port) == address.rpartition(":")[2]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    )


def read_memory(pid):
    """All of a process's memory that can be written to."""
    parts = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, access = line.split()[:2]
            if access.startswith("rw"):
                start, end = (int(number, 16) for number in span.split("-"))
                memory.seek(start)
                with contextlib.suppress(OSError):
                    parts.append(memory.read(end - start))
    return b"".join(parts)


def test_a_killed_router_comes_back_and_open_requests_with_it(serve, spec, make_table, folder, calls, right):
    table = make_table(6)
    gate = folder / "gate"
    gate.touch()
    with serve(spec()) as service:
        client = client_of(service, table)
        client.request_scores(0, ROWS)
        calls.wait_for(1)
        ray.kill(service.routers["base"], no_restart=False)
        gate.unlink()
        assert right(table, ROWS, client.collect_scores(0)["base"])
        assert service.stats()["base"].replicas_started == 1  # of the new process


def test_a_router_that_is_gone_is_an_error(serve, spec, make_table):
    service = serve(spec())
    client = client_of(service, make_table(6))
    addresses = service.addresses
    service.shutdown()
    service.shutdown()
    client.request_scores(0, ROWS)
    with pytest.raises(ScoringError, match="reference 'base': its router died"):
        client.collect_scores(0)
    with pytest.raises(ScoringError, match="is not running"):
        connect_to_routers(addresses)


def test_score_all_fills_the_store_with_progress_and_frees_the_replicas(
    serve, spec, make_table, tmp_path, folder, monkeypatch
):
    monkeypatch.setattr("orchestrator.references.bulk.PLANNED_ROWS", 4)
    monkeypatch.setattr("orchestrator.references.service.BULK_REQUESTS", 1)
    tables = {"base": make_table(30), "other": make_table(10, seed=1)}
    specs = [spec(), spec(name="other", fingerprint="0" * 32)]
    seen: list[tuple[str, int, int, list[str]]] = []
    with serve(*specs) as service:
        ask_all(service, tables["base"], range(5))
        service.score_all(tables, lambda *progress: seen.append(progress))
        assert service.count_missing(tables) == {"base": 0, "other": 0}
        service.release()
        for router in service.routers.values():
            assert ray.get(router.replica_pids.remote()) == []
        store = ScoreStore(tmp_path / "storage", "f" * 32)
        different = {
            name: len({(p.prompt.tobytes(), r.tobytes()) for p in table for r in (p.chosen, p.rejected)})
            for name, table in tables.items()
        }
        assert len(store) == service.stats()["base"].scored == different["base"]
    for name in tables:
        counts = [done for n, done, total, _ in seen if n == name and total == different[name]]
        assert counts == sorted(counts)
        assert counts[-1] == different[name]


def test_scores_reach_storage_while_the_run_goes_on(serve, spec, make_table, tmp_path):
    with serve(spec(), flush_s=0.05) as service:
        ask_all(service, make_table(6))
        deadline = time.monotonic() + 60
        while len(ScoreStore(tmp_path / "storage", "f" * 32)) < 12:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_references_of_one_fingerprint_share_a_router(serve, spec, make_table, right):
    table = make_table(6)
    with serve(spec(), spec(name="twin")) as service:
        answers = ask_all(service, table)
        assert right(table, ROWS, answers["base"])
        assert right(table, ROWS, answers["twin"])
        assert service.stats()["base"] == service.stats()["twin"]
        assert service.stats()["base"].scored == 12
        with serve(spec()) as second:
            assert second.addresses["base"] == service.addresses["base"]
        assert right(table, ROWS, ask_all(service, table)["base"])  # the second did not end it


def test_other_processes_of_the_job_connect_by_name(serve, spec, make_table, right):
    table = make_table(6)
    with serve(spec()) as service:

        @ray.remote(num_cpus=0)
        def elsewhere(addresses, table):
            client = ReferenceClient(connect_to_routers(addresses), {"base": table})
            client.request_scores(0, ROWS)
            return client.collect_scores(0)["base"]

        assert right(table, ROWS, ray.get(elsewhere.remote(service.addresses, table)))


def test_rows_without_a_rejected_response(serve, spec, make_table, right):
    table = make_table(6, completions_only=True)
    with serve(spec()) as service:
        arrays = ask_all(service, table)["base"]
        assert right(table, ROWS, arrays)
        assert not arrays.missing.any()
        assert service.stats()["base"].requested == 6


def test_an_in_process_reference_shares_the_store(serve, spec, make_table):
    table = make_table(6)
    with serve(spec(replicas=0)) as service:
        client = client_of(service, table, scored_by_workers=["base"])
        client.request_scores(0, ROWS)
        assert client.collect_scores(0)["base"].missing.all()
        numbers = np.arange(4.0)
        made = ReferenceArrays(-numbers, -9 - numbers, numbers + 1, numbers + 5, numbers / 4, numbers / 8)
        client.store_scores("base", ROWS[:4], made)
        client.close()
        client.request_scores(1, ROWS[1:])
        arrays = client.collect_scores(1)["base"]
        assert arrays.missing.tolist() == [False, False, False, True, True]
        for name in (
            "chosen",
            "rejected",
            "chosen_lengths",
            "rejected_lengths",
            "chosen_entropy",
            "rejected_entropy",
        ):
            assert getattr(arrays, name)[:3].tolist() == getattr(made, name)[1:].tolist()
        assert service.stats()["base"].replicas_started == 0
        with pytest.raises(ScoringError, match="scored by the workers themselves"):
            ask_all(service, table)
        unsound = [np.full(1, value) for value in (np.nan, -1.0, 1.0, 1.0, 0.5, 0.5)]
        client.store_scores("base", [5], ReferenceArrays(*unsound))
        with pytest.raises(ScoringError, match="not finite"):
            client.close()
    again = serve(spec(replicas=0))
    assert again.count_missing({"base": table}) == {"base": 4}
    again.shutdown()


def test_samples_are_scored_and_counted_apart_and_not_stored(serve, spec, make_table, right, tmp_path):
    table = make_table(6)
    with serve(spec()) as service:
        client = client_of(service, table)
        client.request_sample_scores("x", group_pairs(table, ROWS), ["base"])
        with pytest.raises(ValueError, match="still open"):
            client.request_sample_scores("x", [], ["base"])
        scores = client.collect_sample_scores("x")["base"]
        assert right(table, ROWS, in_pairs(scores))
        stats = service.stats()["base"]
        assert (stats.sampled, stats.requested, stats.coalesced, stats.scored, stats.batches) == (
            12,
            0,
            0,
            0,
            1,
        )
        service.flush()
        assert service.count_missing({"base": table}) == {"base": 12}
        assert not (tmp_path / "storage" / "scores").exists()


def test_a_sample_that_is_asked_for_in_earnest_is_stored(serve, spec, make_table, folder, calls, right):
    table = make_table(6)
    (folder / "gate").touch()
    with serve(spec()) as service:
        client = client_of(service, table)
        client.request_sample_scores(0, group_pairs(table, ROWS), ["base"])
        calls.wait_for(1)
        client.request_scores(0, ROWS[:2])
        client.request_sample_scores(1, group_pairs(table, ROWS[1:3]), ["base"])
        while ray.get(service.routers["base"].stats.remote()).sampled < 16:
            time.sleep(0.01)
        (folder / "gate").unlink()
        assert right(table, ROWS[:2], client.collect_scores(0)["base"])
        assert right(table, ROWS, in_pairs(client.collect_sample_scores(0)["base"]))
        assert right(table, ROWS[1:3], in_pairs(client.collect_sample_scores(1)["base"]))
        stats = service.stats()["base"]
        assert (stats.sampled, stats.requested, stats.coalesced, stats.scored, stats.batches) == (
            16,
            4,
            4,
            4,
            1,
        )
        assert service.count_missing({"base": table}) == {"base": 8}


def in_pairs(scores):
    columns = (scores.logps, scores.lengths, scores.entropies)
    return ReferenceArrays(*(column[side::2] for column in columns for side in (0, 1)))


def test_a_reward_model_is_an_actor_that_workers_share(ray_running, tmp_path):
    with torch.random.fork_rng():
        model = LlamaForSequenceClassification(tiny.llama_config(num_labels=1))
    folder = tiny.save(tmp_path / "judge", model, tiny.byte_tokenizer())
    judge = start_reward_scorer(RewardConfig(model=str(folder)), start_timeout_s=60)
    prompts, responses = ["Good: ", "Bad: "], ["yes", "no"]
    here = RewardModelActor(RewardConfig(model=str(folder)), gpu=False, cpus=1)
    expected = here.score(prompts, responses)

    @ray.remote(num_cpus=0)
    def worker(judge):
        return judge.score(prompts, responses)

    assert ray.get(worker.remote(judge)) == expected
    judge.close()
    with pytest.raises(RunFailed, match=rf"reward\.model {folder} died"):
        judge.score(prompts, responses)


def test_a_reward_model_that_cannot_be_had_is_an_error_at_once(ray_running, tmp_path):
    missing = RewardConfig(model=str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match=r"evaluation\.sampling\.reward\.model: .* no such file"):
        start_reward_scorer(missing, start_timeout_s=60)
    nowhere = missing.model_copy(update={"resources": Resources(custom={"no-such-thing": 1})})
    with pytest.raises(
        RunFailed, match=r"no node had room for it \(0\.1 CPU, 1 no-such-thing\) within 0\.5 s"
    ):
        start_reward_scorer(nowhere, start_timeout_s=0.5)


def test_routers_and_tables_must_match(make_table):
    with pytest.raises(ValueError, match="token tables for"):
        ReferenceClient({"base": object()}, {"other": make_table(1)})


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "Z" in Path(f"/proc/{pid}/status").read_text().split("State:")[1].split("\n")[0]


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_shutdown_ends_the_replicas_too(serve, spec):
    with serve(spec(replicas=2)) as service:
        service.start_replicas()
        pids = ray.get(service.routers["base"].replica_pids.remote())
        assert len(pids) == 2
    wait_until(lambda: all(map(gone, pids)))


DRIVER = """
import sys, time
from pathlib import Path
import ray
from models.config import ModelConfig
from orchestrator.references.messages import ReferenceSpec
from orchestrator.references.replica import Replica
from orchestrator.references.service import start_references

class Idle(Replica):
    def setup(self): pass

ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
spec = ReferenceSpec("base", ModelConfig(model="m"), "d" * 32, num_cpus=0.1)
service = start_references([spec], sys.argv[2], replica_class=Idle)
service.start_replicas()
pids = ray.get(service.routers["base"].replica_pids.remote())
Path(sys.argv[2], "unfinished").write_text(f"{service.addresses['base']} {pids[0]}")
Path(sys.argv[2], "unfinished").rename(Path(sys.argv[2], "running"))
time.sleep(600)
"""


def test_a_killed_driver_leaves_no_actor(ray_running, tmp_path):
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, address, str(tmp_path)], cwd=ROOT)
    try:
        wait_until(lambda: (tmp_path / "running").exists() or driver.poll() is not None)
        name, pid = (tmp_path / "running").read_text().split()
        assert name in running_polyref_actors()
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: gone(int(pid)) and name not in running_polyref_actors())


def test_neither_driver_nor_router_needs_torch():
    code = "import sys, orchestrator.references.service; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
