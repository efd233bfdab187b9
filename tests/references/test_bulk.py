"""Scores of a whole table: the same to the last bit, however many replicas there are and whatever happens."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import ray.cloudpickle
import xxhash

from orchestrator.references import bulk
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


def read_scores(storage: Path, table: Table) -> dict[str, list[float]]:
    scores = ScoreStore(storage, "f" * 32).lookup(digest_table(table))
    known = np.flatnonzero(~scores.missing)
    return {"known": known.tolist(), "logps": scores.logps[known].tolist()}
