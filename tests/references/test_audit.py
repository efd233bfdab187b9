"""An audit of stored scores: it reads no store, changes none, and tells a wrong score from rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from orchestrator.references.audit import audit_scores, scores_differ
from orchestrator.references.messages import Score
from orchestrator.references.store import ScoreStore, digest_response
from orchestrator.references.tolerance import SLACK_TOKENS


def change_logps(folder: Path, change: Callable[[bytes, float], float]) -> None:
    """Replace the files of a store by ones with changed log-probs, under names without a digest."""
    for number, path in enumerate(sorted(folder.glob("*.parquet"))):
        table = pq.read_table(path)
        column = table.schema.get_field_index("logp")
        keys, logps = table["key"].to_pylist(), table["logp"].to_pylist()
        changed = [change(key, logp) for key, logp in zip(keys, logps, strict=True)]
        pq.write_table(
            table.set_column(column, table.schema.field(column), [changed]), folder / f"{number}.parquet"
        )
        path.unlink()


def test_a_wrong_score_is_found_by_its_row_and_nothing_is_stored(
    serve: Any, spec: Any, make_table: Callable[..., Any], tmp_path: Path
) -> None:
    table, folder = make_table(20), tmp_path / "storage" / "scores" / ("f" * 32)
    with serve(spec()) as service:
        service.score_all({"base": table})
    wrong = {digest_response(table[row].prompt, table[row].chosen) for row in (3, 11)}
    change_logps(folder, lambda key, logp: logp - 5 * (key in wrong))
    files = {path: path.read_bytes() for path in folder.iterdir()}
    with serve(spec()) as service:
        audit = audit_scores(service, "base", table, 1000, tolerance=1e-3)
        stats = service.stats()["base"]
    assert audit.responses == stats.audited == 40
    assert (stats.requested, stats.scored, stats.sampled) == (0, 0, 0)
    assert sorted((found.row, found.side) for found in audit.differences) == [(3, "chosen"), (11, "chosen")]
    found = audit.differences[0]
    assert found.stored.logp == found.rescored.logp - 5
    assert "chosen: stored log-prob" in str(found)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def test_an_audit_takes_as_many_responses_as_asked_and_needs_stored_ones(
    serve: Any, spec: Any, make_table: Callable[..., Any], tmp_path: Path
) -> None:
    table = make_table(20)
    with serve(spec()) as service:
        assert audit_scores(service, "base", table, 7, tolerance=1e-3).responses == 0
        assert service.stats()["base"].replicas_started == 0
        service.score_all({"base": table})
        audit = audit_scores(service, "base", table, 7, tolerance=1e-3)
        assert (audit.responses, audit.differences) == (7, [])
        assert service.stats()["base"].audited == 7


@pytest.mark.parametrize(
    ("other", "differ"),
    [
        (Score(-20.0, 10, 0.5), False),
        (Score(-20.0 - 0.9e-3 * (10 + SLACK_TOKENS), 10, 0.5), False),
        (Score(-20.0 - 1.1e-3 * (10 + SLACK_TOKENS), 10, 0.5), True),
        (Score(-20.0, 10, 0.502), True),
        (Score(-20.0, 11, 0.5), True),
    ],
)
def test_rounding_is_no_difference(other: Score, differ: bool) -> None:
    assert scores_differ(Score(-20.0, 10, 0.5), other, 1e-3) == differ


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_stored_score_that_is_not_finite_is_made_again(
    value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ScoreStore(tmp_path, "f" * 32)
    for number in range(4):
        store.put(bytes([number]) * 16, Score(-1.0 - number, 3, 0.5))
    store.flush()
    change_logps(Path(store.folder), lambda key, logp: logp if any(key) else value)
    store = ScoreStore(tmp_path, "f" * 32)
    assert len(store) == 3
    assert store.get(bytes(16)) is None
    assert "1 scores cannot be right and are made again" in caplog.text
    store.put(bytes(16), Score(-1.0, 3, 0.5))
    assert store.get(bytes(16)) == Score(-1.0, 3, 0.5)
