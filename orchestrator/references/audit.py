"""An audit of the score store: replicas score some of its responses anew, and the scores are compared."""

from dataclasses import dataclass

import numpy as np

from orchestrator.references.client import TokenTableLike, group_pairs, wait_for_answer
from orchestrator.references.messages import PromptGroup, Score, ScoreRequest
from orchestrator.references.service import ReferenceService
from orchestrator.references.tolerance import allow_difference

SEED = 0
ROWS_PER_LOOKUP = 1024


@dataclass(frozen=True)
class ScoreDifference:
    """A stored score that its reference does not give now; `row` is the table's, `side` the response's."""

    row: int
    side: str
    stored: Score
    rescored: Score

    def __str__(self) -> str:
        old, new = self.stored, self.rescored
        return (
            f"{self.side}: stored log-prob {old.logp:.6g} and entropy {old.entropy:.4g} over {old.length} "
            f"tokens, now {new.logp:.6g} and {new.entropy:.4g} over {new.length}"
        )


@dataclass(frozen=True)
class Audit:
    """How many responses were scored anew, and those whose stored score differs."""

    responses: int
    differences: list[ScoreDifference]


@dataclass(frozen=True)
class _StoredResponse:
    row: int
    side: str
    group: PromptGroup
    score: Score


def audit_scores(
    service: ReferenceService, name: str, table: TokenTableLike, count: int, *, tolerance: float
) -> Audit:
    """Have a reference's replicas score up to `count` stored responses of a table anew, and compare.

    Args:
        service: the running references.
        name: the reference, which must have replicas; none is started if nothing of the table is stored.
        table: rows in the reference's tokens; the responses are a sample of them.
        count: most responses.
        tolerance: nats per token that a log-prob may differ by, and what a mean entropy may.

    Raises:
        ScoringError, ModelError: the reference cannot score.
    """
    stored = _draw_stored_responses(service, name, table, count)
    if not stored:
        return Audit(0, [])
    request = ScoreRequest.pack([response.group for response in stored])
    scores = wait_for_answer(name, service.routers[name], service.routers[name].rescore.remote(request))
    differences = [
        ScoreDifference(response.row, response.side, response.score, scores[index])
        for index, response in enumerate(stored)
        if scores_differ(response.score, scores[index], tolerance)
    ]
    return Audit(len(stored), differences)


def scores_differ(one: Score, other: Score, tolerance: float) -> bool:
    """Return whether two scores of a response differ by more than rounding."""
    return (
        one.length != other.length
        or abs(one.logp - other.logp) > allow_difference(tolerance, one.length)
        or abs(one.entropy - other.entropy) > tolerance
    )


def _draw_stored_responses(
    service: ReferenceService, name: str, table: TokenTableLike, count: int
) -> list[_StoredResponse]:
    """Draw different responses that the store has, until there are enough."""
    order = np.random.default_rng(SEED).permutation(len(table))
    drawn: dict[bytes, _StoredResponse] = {}
    router = service.routers[name]
    for start in range(0, len(order), ROWS_PER_LOOKUP):
        rows = order[start : start + ROWS_PER_LOOKUP]
        groups = group_pairs(table, rows)
        keys = ScoreRequest.pack(groups).keys
        found = iter(wait_for_answer(name, router, router.lookup.remote(keys)))
        for row, group in zip(rows.tolist(), groups, strict=True):
            for side, response, key in zip(("chosen", "rejected"), group.responses, group.keys, strict=False):
                score = next(found)
                if len(drawn) < count and not np.isnan(score.logp):
                    single = PromptGroup(group.prompt, [response], [key])
                    drawn.setdefault(key, _StoredResponse(row, side, single, score))
        if len(drawn) >= count:
            break
    return list(drawn.values())
