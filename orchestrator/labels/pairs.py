"""The pairs to label: read as texts, in the order in which their source has them."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from orchestrator.errors import UsageError
from preferences.config import SourceConfig
from preferences.load import load_pairs
from preferences.pairs import Message, Pair


@dataclass(frozen=True)
class UnlabelledPairs:
    """Pairs to label.

    Attributes:
        pairs: `chosen` and `rejected` as the source has them, so that `soft_label` is in [0, 1].
        has_human_labels: whether people disagreed about any pair.
        skipped: rows left out, by reason.
        digest: of what all of them say, in order.
    """

    pairs: Sequence[Pair]
    has_human_labels: bool
    skipped: Counter[str]
    digest: str

    def take(self, rows: Sequence[int]) -> "UnlabelledPairs":
        """Return the pairs at `rows`, in that order."""
        return replace(self, pairs=[self.pairs[row] for row in rows])


def read_unlabelled_pairs(
    sources: Sequence[SourceConfig], *, limit: int | None, on_bad_row: Literal["stop", "skip"]
) -> UnlabelledPairs:
    """Read the pairs of all sources in turn, at most `limit` of them.

    Raises:
        DataError: a source or a row cannot be used.
        UsageError: some pairs are plain text and others are messages.
    """
    loaded = [load_pairs(source, on_bad_row=on_bad_row) for source in sources]
    pairs = [_restore_order(pair) for part in loaded for pair in part.pairs][:limit]
    kinds = {pair.is_chat: pair for pair in reversed(pairs)}
    if len(kinds) > 1:
        raise UsageError(
            f"{kinds[False].source} is plain text and {kinds[True].source} is messages, and one file of "
            "labels has one of them; label them one by one"
        )
    return UnlabelledPairs(
        pairs,
        any(0 < pair.soft_label < 1 for pair in pairs),
        sum((part.skipped for part in loaded), Counter()),
        _digest_pairs(pairs),
    )


def _restore_order(pair: Pair) -> Pair:
    """Return the pair as its source has it: loading has put the response that most people preferred first."""
    if not pair.swapped or pair.rejected is None:
        return pair
    return replace(
        pair, chosen=pair.rejected, rejected=pair.chosen, soft_label=1 - pair.soft_label, swapped=False
    )


def _digest_pairs(pairs: Sequence[Pair]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        parts = [pair.prompt, pair.chosen, pair.rejected, pair.soft_label, pair.tools]
        digest.update(json.dumps(parts, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def format_text(text: str | list[Message]) -> str:
    """Return what a judge reads of a prompt or response: a lone turn as it is, several behind their roles."""
    if isinstance(text, str):
        return text.strip()
    turns = [(str(message["role"]), _format_turn(message)) for message in text]
    if len(turns) == 1 and turns[0][0] in ("user", "assistant"):
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in turns)


def _format_turn(message: Message) -> str:
    parts: list[Any] = [message.get("content") or "", message.get("tool_calls")]
    return "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts if part).strip()
