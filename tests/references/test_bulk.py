"""Scores of a whole table: the same to the last bit, however many replicas there are and whatever happens."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.cloudpickle
import xxhash

from orchestrator.references import bulk, service
from orchestrator.references.bulk import BulkPlan, digest_table
from orchestrator.references.messages import ScoreRequest, Scores
from orchestrator.references.service import start_references
from orchestrator.references.store import ScoreStore
from tests.references.conftest import SumReplica, Table

# Ray's workers cannot import test files.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class MoodyReplica(SumReplica):
    """Scores that depend on all of their batch, as a model's last bits do."""

    def score(self, request: ScoreRequest) -> tuple[Scores, int]:
        scores, forwards = super().score(request)
        mood = xxhash.xxh32_intdigest(request.prompts.tobytes() + request.responses.tobytes())
        return Scores(scores.logps - mood / 2**32, scores.lengths, scores.entropies), forwards


class Stop(Exception):
    """The driver ends here."""


def test_a_plan_has_every_response_once_in_full_batches(make_table, monkeypatch):
    monkeypatch.setattr(bulk, "PLANNED_ROWS", 16)
    rows = make_table(60)
    table = Table([*rows, *rows[:20], *make_table(20, seed=1)])
    plan = BulkPlan(table, budget=120)
    batches = [batch for part in plan for batch in part]
    keys = [key.tobytes() for batch in batches for key in batch.keys]
    assert len(keys) == len(set(keys)) == len(plan)
    assert set(keys) == {key.tobytes() for key in digest_table(table)}
    for batch in batches:
        tokens = [group.tokens for group in batch.unpack()]
        assert len(tokens) * max(tokens) <= 120 or len(tokens) == 1
    assert len(batches) < len(keys) / 3


def test_scores_of_a_table_are_the_same_bits_whatever_happens(
    ray_running, spec, make_table, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(bulk, "PLANNED_ROWS", 16)
    table = make_table(64)

    def score(name: str, replicas: int, stop_after: float = np.inf) -> dict[str, list[float]]:
        def stop(_name: str, done: int, _total: int, _notes: Sequence[str]) -> None:
            if done >= stop_after:
                raise Stop

        described = spec(replicas=replicas, max_tokens_per_batch=120)
        with start_references([described], tmp_path / name, replica_class=MoodyReplica) as service:
            service.score_all({"base": table}, stop)
        return read_scores(tmp_path / name, table)

    undisturbed = score("undisturbed", replicas=1)
    (folder / "die").write_text("xx")
    assert score("killed replicas", replicas=3) == undisturbed
    with pytest.raises(Stop):
        score("killed driver", replicas=2, stop_after=40)
    assert 0 < len(read_scores(tmp_path / "killed driver", table)["known"]) < 128
    assert score("killed driver", replicas=2) == undisturbed


class RemoteMethod:
    """A method that is called as one of a Ray actor is."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class ListedRouter:
    """A router without Ray, whose answers are there at once: the store is a set of keys."""

    def __init__(self, known: set[bytes]) -> None:
        self.known, self.sent = known, 0
        for name in ("missing", "lookup", "score", "flush"):
            setattr(self, name, RemoteMethod(getattr(self, f"_{name}")))

    def _find_missing(self, keys: np.ndarray) -> np.ndarray:
        return np.array([key.tobytes() not in self.known for key in keys])

    def _missing(self, keys: np.ndarray) -> int:
        return len({key.tobytes() for key in keys[self._find_missing(keys)]})

    def _lookup(self, keys: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(missing=self._find_missing(keys))

    def _score(self, batch: ScoreRequest, *, as_batch: bool) -> str:
        assert as_batch
        self.known |= {key.tobytes() for key in batch.keys}
        self.sent += 1
        return f"answer {self.sent}"

    def _flush(self) -> None: ...


def test_progress_begins_with_what_the_store_has_and_counts_each_score_once(
    spec: Any, make_table: Callable[..., Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PLANNED_ROWS", 8)
    monkeypatch.setattr(service, "wait_for_answer", lambda _name, _router, answer: answer)
    monkeypatch.setattr(service.ray, "wait", lambda answers, **_: (answers[:1], answers[1:]))
    table = make_table(64)
    keys = [key.tobytes() for key in digest_table(table)]
    router = ListedRouter(set(keys[:40]))
    references = service.ReferenceService(
        {"base": router}, {"base": "base"}, {}, [spec(max_tokens_per_batch=120)]
    )
    seen: list[tuple[int, int, Sequence[str]]] = []
    references.score_all({"base": table}, lambda _name, *progress: seen.append(progress))

    total, stored = len(set(keys)), len(set(keys[:40]))
    share = f"{100 * stored // total} % from store"
    assert seen[0] == (stored, total, [share, "queue 0"])
    assert seen[-1] == (total, total, [share])
    counts = [done for done, *_ in seen]
    assert counts == sorted(counts)
    assert len(seen) == 2 + router.sent, "batches that the store has are not reported again"
    queues = [int(notes[1].removeprefix("queue ")) for *_, notes in seen[1:-2]]
    assert queues[0] == total - stored - (counts[1] - stored), "all that is asked for and not answered"
    assert queues == sorted(queues, reverse=True)

    seen.clear()
    references.score_all({"base": table}, lambda _name, *progress: seen.append(progress))
    assert {progress[:2] for progress in seen} == {(total, total)}
    assert seen[0][2] == ["100 % from store"]


def read_scores(storage: Path, table: Table) -> dict[str, list[float]]:
    scores = ScoreStore(storage, "f" * 32).lookup(digest_table(table))
    known = np.flatnonzero(~scores.missing)
    return {"known": known.tolist(), "logps": scores.logps[known].tolist()}
