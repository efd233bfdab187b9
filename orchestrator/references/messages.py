"""Messages between worker, router and replica: plain numpy columns, never lists of Python numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from models.config import ModelConfig
from orchestrator.cluster.worker_environment import SealedSecrets
from orchestrator.errors import RunFailed

Ids = NDArray[np.int32]
Offsets = NDArray[np.int64]
Floats = NDArray[np.float64]
Keys = NDArray[np.uint8]
"""(S, 16): one digest per response, see `store.digest_response`."""

KEY_BYTES = 16
ROUNDING = 1e-3
"""How far rounding may take a token's log-prob above 0 and an entropy out of [0, 1]."""


ScoreKind = Literal["log-prob", "reward"]


class ScoringError(RunFailed):
    """A reference cannot score; the message names the reference and says why."""


@dataclass(frozen=True)
class ReferenceSpec:
    """One frozen reference: its model and fingerprint, and the number and resources of its replicas.

    `config` must be resolved and pinned (a folder every node sees, or a hub id with its revision), because
    each replica locates it on its own node. A replica runs on CUDA where `num_gpus` is above 0, else on the
    CPU; the fingerprint must have been computed for that device. `replicas=0` is a reference that the workers
    score themselves: its router only serves the store.
    """

    name: str
    config: ModelConfig
    fingerprint: str
    kind: ScoreKind = "log-prob"
    """What a score is: a reward model's reward is stored in place of a log-prob."""
    replicas: int = 1
    num_cpus: float = 0.5
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    max_tokens_per_batch: int = 16384
    max_retries: int = 5
    """How often in a row replicas, or the replicas of one batch, may die before open requests fail."""
    secrets: SealedSecrets | None = None
    """Tokens of hubs and storage for the processes of router and replicas."""
    start_timeout_s: float = 600.0
    """How long a replica may wait for free resources; loading the model is not counted."""
    load_timeout_s: float = 3600.0
    """How long a replica may load its model; it is replaced after that."""
    answer_timeout_s: float = 300.0
    """How long a replica may take for any batch; one that should take long by the speed seen gets more."""


class PromptGroup(NamedTuple):
    """A prompt and the responses to score after it, with their keys."""

    prompt: Ids
    responses: list[Ids]
    keys: list[bytes]

    @property
    def tokens(self) -> int:
        """Tokens of the shared row: the prompt once, every response once."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def scored_lengths(self) -> list[int]:
        """Number of scored tokens of each response; ids that are only read are stored as complements."""
        return [int(np.count_nonzero(response >= 0)) for response in self.responses]


class Score(NamedTuple):
    """One response's summed log-prob (nats), tokens, and mean token entropy over log V in [0, 1]."""

    logp: float
    length: int
    entropy: float


@dataclass(frozen=True)
class Scores:
    """Columns of S scores; `logps` and `entropies` are NaN (and `lengths` 0) where a score is unknown."""

    logps: Floats
    lengths: Offsets
    entropies: Floats

    @classmethod
    def unknown(cls, count: int) -> Self:
        """Return `count` unknown scores, to be filled in."""
        return cls(np.full(count, np.nan), np.zeros(count, dtype=np.int64), np.full(count, np.nan))

    def __len__(self) -> int:
        return len(self.logps)

    def __getitem__(self, index: int) -> Score:
        return Score(float(self.logps[index]), int(self.lengths[index]), float(self.entropies[index]))

    def __setitem__(self, index: int, score: Score) -> None:
        self.logps[index], self.lengths[index], self.entropies[index] = score

    @property
    def missing(self) -> NDArray[np.bool_]:
        """(S,): whether each score is unknown."""
        return np.isnan(self.logps)

    def find_possible(self, kind: ScoreKind) -> NDArray[np.bool_]:
        """(S,): whether each score can be one of its kind.

        A log-prob is at most 0 and its entropy in [0, 1], but for rounding; a reward is any finite number.
        """
        finite = np.isfinite(self.logps) & np.isfinite(self.entropies) & (self.lengths >= 0)
        if kind == "reward":
            return finite
        highest = ROUNDING * np.maximum(self.lengths, 1)
        is_entropy = (self.entropies >= -ROUNDING) & (self.entropies <= 1 + ROUNDING)
        return finite & (self.logps <= highest) & is_entropy


@dataclass(frozen=True)
class ScoreRequest:
    """G prompts and their S responses as flat ids with offsets; each prompt is sent once."""

    prompts: Ids
    prompt_offsets: Offsets  # (G + 1,) into prompts
    responses: Ids
    response_offsets: Offsets  # (S + 1,) into responses
    group_offsets: Offsets  # (G + 1,) into the S responses
    keys: Keys  # (S, 16)

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def pack(cls, groups: Sequence[PromptGroup]) -> Self:
        """Concatenate groups; responses keep their order, group by group."""
        responses = [response for group in groups for response in group.responses]
        keys = b"".join(key for group in groups for key in group.keys)
        return cls(
            prompts=_concatenate([group.prompt for group in groups]),
            prompt_offsets=_compute_offsets([len(group.prompt) for group in groups]),
            responses=_concatenate(responses),
            response_offsets=_compute_offsets([len(response) for response in responses]),
            group_offsets=_compute_offsets([len(group.responses) for group in groups]),
            keys=np.frombuffer(keys, dtype=np.uint8).reshape(-1, KEY_BYTES),
        )

    def unpack(self) -> list[PromptGroup]:
        """Return the groups, as views into the columns."""
        offsets, groups = self.response_offsets, []
        for g in range(len(self.prompt_offsets) - 1):
            prompt = self.prompts[self.prompt_offsets[g] : self.prompt_offsets[g + 1]]
            span = range(self.group_offsets[g], self.group_offsets[g + 1])
            responses = [self.responses[offsets[s] : offsets[s + 1]] for s in span]
            groups.append(PromptGroup(prompt, responses, [self.keys[s].tobytes() for s in span]))
        return groups


@dataclass(frozen=True)
class RouterStats:
    """Counts since the router's process began; requested = from_store + coalesced + newly queued."""

    requested: int = 0
    from_store: int = 0
    coalesced: int = 0
    """Responses that were already in flight for another request (or requested twice in one)."""
    scored: int = 0
    sampled: int = 0
    """Responses that were scored without being stored; in none of the counts above."""
    audited: int = 0
    """Stored responses that were scored anew to compare; in none of the counts above."""
    batches: int = 0
    """Batches that replicas answered."""
    forwards: int = 0
    """Forward passes those batches took."""
    retries: int = 0
    copies: int = 0
    """Batches that a second replica got because the first took unusually long."""
    replicas_started: int = 0


def _concatenate(arrays: Sequence[Ids]) -> Ids:
    return np.concatenate(arrays, dtype=np.int32) if arrays else np.zeros(0, dtype=np.int32)


def _compute_offsets(lengths: Sequence[int]) -> Offsets:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
