"""Tokenise pairs: one table for each model that reads them, of the pairs that fit all of them."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from preferences.config import DataConfig
from preferences.pairs import BadRow, DataError, Pair
from preferences.rendering import RenderedPair, render_pair
from preferences.rendering import Rendering as Rendering
from preferences.truncation import TruncatedPair, add_end_token, add_prompt_prefix, truncate_pair

Ids = npt.NDArray[np.int32]
CHUNK = 2048
BOUNDARY_SAMPLE = 512
"""Most pairs that are examined for tokens that reach over the boundary of prompt and response."""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """Token ids of one pair; a response includes its end-of-turn token unless it was truncated."""

    prompt: Ids
    chosen: Ids
    rejected: Ids | None


@dataclass(frozen=True, slots=True)
class RaggedArray:
    """Sequences of unequal length in two arrays: `flat` ids, and `offsets` (N + 1,) at which each begins."""

    flat: Ids
    offsets: npt.NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> "RaggedArray":
        """Build from one list of ids for each row."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum()))
        return cls(flat, _compute_offsets(lengths))

    @classmethod
    def concatenate(cls, parts: Sequence["RaggedArray"]) -> "RaggedArray":
        """Concatenate the rows of all parts."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([part.flat for part in parts]), _compute_offsets(lengths))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) number of ids in each row."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Ids:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: npt.NDArray[np.int64]) -> "RaggedArray":
        """Return the rows at `indices`, in that order."""
        lengths = self.lengths[indices]
        offsets = _compute_offsets(lengths)
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][indices] - offsets[:-1], lengths)
        return RaggedArray(self.flat[places], offsets)


def _compute_offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Token ids of N pairs by column, cheap to send to a worker. `rejected` is None for completions only."""

    prompts: RaggedArray
    chosen: RaggedArray
    rejected: RaggedArray | None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> TokenPair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        rejected = None if self.rejected is None else self.rejected[index]
        return TokenPair(self.prompts[index], self.chosen[index], rejected)

    @property
    def prompt_lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of the prompts."""
        return self.prompts.lengths

    @property
    def chosen_lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of the chosen responses, end-of-turn tokens included."""
        return self.chosen.lengths

    @property
    def rejected_lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of the rejected responses; zeros if there are none."""
        return np.zeros(len(self), np.int64) if self.rejected is None else self.rejected.lengths

    @property
    def pair_lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of a pair with its prompt counted once, for `batches.split_over_ranks`."""
        return self.prompt_lengths + self.chosen_lengths + self.rejected_lengths

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of the prompt with the longer response."""
        return self.prompt_lengths + np.maximum(self.chosen_lengths, self.rejected_lengths)

    def digest(self) -> str:
        """Return the SHA-256 of all token ids and of where each row begins."""
        digest = hashlib.sha256()
        for column in (self.prompts, self.chosen, self.rejected):
            if column is not None:
                digest.update(np.ascontiguousarray(column.offsets, dtype="<i8").tobytes())
                digest.update(np.ascontiguousarray(column.flat, dtype="<i4").tobytes())
        return digest.hexdigest()

    def take(self, indices: npt.NDArray[np.int64]) -> "TokenTable":
        """Return the pairs at `indices`, in that order."""
        rejected = None if self.rejected is None else self.rejected.take(indices)
        return TokenTable(self.prompts.take(indices), self.chosen.take(indices), rejected)


@dataclass(frozen=True, slots=True)
class TokenizedPairs:
    """A table for each rendering, whose row i is pair `kept_indices[i]`, and the pairs left out, by reason.

    `truncated` counts the remaining pairs that were truncated. `boundary_merges` has, by rendering, indices
    of the pairs in which a token of prompt and response as one text would reach over the boundary between
    them, among `examined` pairs.
    """

    tables: dict[str, TokenTable]
    kept_indices: npt.NDArray[np.int64]
    skipped: Counter[str]
    truncated: int = 0
    boundary_merges: dict[str, list[int]] = field(default_factory=dict)
    examined: int = 0


def tokenize_pairs(
    pairs: Sequence[Pair],
    renderings: Mapping[str, Rendering],
    config: DataConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizedPairs:
    """Tokenise every pair under every rendering, the first being the policy's.

    A pair is left out for all models when it cannot be rendered for one (`on_bad_row`), or is too long for
    one (`on_long_row`): longer than `max_prompt_length` or `max_length` in the policy's tokens, or than a
    model's positions. Prompt and response are tokenised so that they are as in one text; where a token would
    reach over the boundary they are tokenised separately, and a sample of the pairs is examined for that.
    `progress(done, total)` counts pairs times renderings. Raises `DataError` if a pair is refused, no pair is
    left, or a model lacks a token id that its tokenizer gives.
    """
    if not pairs:
        raise DataError("there are no pairs to tokenize")
    policy = next(iter(renderings))
    job = _TokenizationJob(
        pairs, config, policy, Counter(), np.ones(len(pairs), bool), {}, progress, len(renderings)
    )
    tables: dict[str, TokenTable] = {}
    name_by_identity: dict[str, str] = {}
    for name, rendering in renderings.items():
        first = name_by_identity.setdefault(rendering.identity, name)
        tables[name] = job.build_table(name, rendering) if first == name else tables[first]
        job.refuse_unknown_ids(tables[name], name, rendering)
        job.skip_long_pairs(tables, name, rendering)
    kept = np.flatnonzero(job.fits)
    if not len(kept):
        reasons = ", ".join(f"{count} {reason}" for reason, count in job.skipped.most_common())
        raise DataError(
            f"no pair is left of {len(pairs)} ({reasons}); raise data.max_length, or see the first one in "
            "full with data.on_long_row: stop and data.on_bad_row: stop"
        )
    first_names = name_by_identity.values()
    if len(kept) < len(pairs):
        remaining = {first: tables[first].take(kept) for first in first_names}
        tables = {
            name: remaining[name_by_identity[rendering.identity]] for name, rendering in renderings.items()
        }
    whole = [int(i) for i in kept if i not in job.truncated]
    sample = whole[:: math.ceil(len(whole) / BOUNDARY_SAMPLE) or 1]
    merges = {first: job.find_boundary_merges(sample, first, renderings[first]) for first in first_names}
    return TokenizedPairs(
        tables,
        kept,
        job.skipped,
        sum(bool(job.fits[i]) for i in job.truncated),
        {name: merges[name_by_identity[rendering.identity]] for name, rendering in renderings.items()},
        len(sample),
    )


@dataclass(slots=True)
class _TokenizationJob:
    """State of one call of `tokenize_pairs`: which pairs still fit, and the truncated form of those cut."""

    pairs: Sequence[Pair]
    config: DataConfig
    policy: str
    skipped: Counter[str]
    fits: npt.NDArray[np.bool_]
    truncated: dict[int, TruncatedPair]
    progress: Callable[[int, int], None] | None
    renderings: int
    done_count: int = 0

    def build_table(self, name: str, rendering: Rendering) -> TokenTable:
        chunks = []
        for first in range(0, len(self.pairs), CHUNK):
            rows = range(first, min(first + CHUNK, len(self.pairs)))
            chunks.append(self._tokenize_chunk(name, rendering, rows))
            self._report_progress(len(rows))
        prompts, chosen, rejected = zip(*chunks, strict=True)
        return TokenTable(
            RaggedArray.concatenate(prompts),
            RaggedArray.concatenate(chosen),
            None if self.pairs[0].rejected is None else RaggedArray.concatenate(rejected),
        )

    def _tokenize_chunk(
        self, name: str, rendering: Rendering, rows: range
    ) -> tuple[RaggedArray, RaggedArray, RaggedArray]:
        texts = [self._render_texts(i, name, rendering) for i in rows]
        prompts = [(text.prompt, text.is_templated) for text in texts]
        answers = [list(zip(text.responses, text.has_end_token, strict=True)) for text in texts]
        columns = [
            _encode_unique(
                rendering,
                prompts,
                lambda ids, is_templated: add_prompt_prefix(rendering, ids, is_templated=is_templated),
            ),
            *(
                _encode_responses(
                    rendering,
                    [text.prompt for text in texts],
                    [answer[k] if k < len(answer) else ("", False) for answer in answers],
                )
                for k in range(2)
            ),
        ]
        self._skip_untrainable(columns, name, rows)
        if name == self.policy and self.config.on_long_row == "truncate":
            self._truncate_long_pairs(columns, rendering, rows)
        return (
            RaggedArray.from_rows(columns[0]),
            RaggedArray.from_rows(columns[1]),
            RaggedArray.from_rows(columns[2]),
        )

    def _render_texts(self, i: int, name: str, rendering: Rendering) -> RenderedPair:
        if not self.fits[i]:
            return RenderedPair("", True, ("", ""), (False, False))
        kwargs = self.config.chat_template_kwargs
        try:
            if i in self.truncated:
                return self.truncated[i].render_for(rendering, name, kwargs)
            return render_pair(self.pairs[i], rendering, name, kwargs)
        except BadRow as bad:
            self._skip_pair(i, bad)
            return RenderedPair("", True, ("", ""), (False, False))

    def _skip_untrainable(self, columns: list[list[list[int]]], name: str, rows: range) -> None:
        """Skip pairs that train nothing: a text without tokens, or the same tokens in both responses."""
        for k, i in enumerate(rows):
            prompt, chosen, rejected = (column[k] for column in columns)
            responses = (
                {"chosen": chosen}
                if self.pairs[i].rejected is None
                else {"chosen": chosen, "rejected": rejected}
            )
            least = 1 if i in self.truncated else 2  # more than the end-of-turn token
            bare = [field for field, ids in responses.items() if len(ids) < least]
            if not self.fits[i]:
                continue
            if bare or not prompt:
                detail = f"{bare[0] if bare else 'prompt'} has no tokens under the tokenizer of {name}"
                self._skip_pair(i, BadRow(self.pairs[i].source, "no tokens", detail))
            elif name == self.policy and chosen == rejected:
                detail = f"chosen and rejected are the same tokens under the tokenizer of {name}"
                self._skip_pair(i, BadRow(self.pairs[i].source, "chosen equals rejected", detail))

    def _truncate_long_pairs(self, columns: list[list[list[int]]], rendering: Rendering, rows: range) -> None:
        max_length, max_prompt = _compute_limits(self.config, rendering)
        for k, i in enumerate(rows):
            prompt, chosen, rejected = (column[k] for column in columns)
            longest = len(prompt) + max(len(chosen), len(rejected))
            if not self.fits[i] or (len(prompt) <= max_prompt and longest <= max_length):
                continue
            shorter = truncate_pair(
                self.pairs[i],
                rendering,
                self.policy,
                self.config.chat_template_kwargs,
                max_prompt=max_prompt,
                max_length=max_length,
            )
            if shorter is None:
                self.fits[i] = False
                self.skipped[f"too long for {self.policy}, and no use when cut"] += 1
                continue
            self.truncated[i] = shorter
            columns[0][k] = shorter.prompt
            for column, ids in zip(columns[1:], shorter.responses, strict=False):
                column[k] = ids

    def refuse_unknown_ids(self, table: TokenTable, name: str, rendering: Rendering) -> None:
        """Raise DataError for a token id beyond those that the model has an embedding for."""
        limit = rendering.vocabulary
        for column in (table.prompts, table.chosen, table.rejected):
            if limit is None or column is None or not len(column.flat) or column.flat.max() < limit:
                continue
            place = int(np.argmax(column.flat >= limit))
            row, token = (
                int(np.searchsorted(column.offsets, place, side="right")) - 1,
                int(column.flat[place]),
            )
            text = rendering.tokenizer.convert_ids_to_tokens(token)
            raise DataError(
                f"{self.pairs[row].source}: the tokenizer of {name} gives token {token} ({text!r}), and the "
                f"model has {limit} token ids; use the tokenizer that belongs to the model, or give the "
                "model embeddings for its new tokens"
            )

    def find_boundary_merges(self, sample: Sequence[int], name: str, rendering: Rendering) -> list[int]:
        """Return the pairs of the sample whose tokens are not those of prompt and response as one text."""
        texts = [self._render_texts(i, name, rendering) for i in sample]
        both = [
            (i, text.prompt, answer)
            for i, text in zip(sample, texts, strict=True)
            for answer in text.responses
        ]
        prompts = rendering.encode([prompt for _, prompt, _ in both])
        responses = rendering.encode_behind(
            [rendering.choose_sentinel(prompt) for _, prompt, _ in both], [answer for *_, answer in both]
        )
        wholes = rendering.encode([prompt + answer for _, prompt, answer in both])
        parts = zip(both, prompts, responses, wholes, strict=True)
        return list(dict.fromkeys(key[0] for key, first, second, whole in parts if first + second != whole))

    def skip_long_pairs(self, tables: Mapping[str, TokenTable], name: str, rendering: Rendering) -> None:
        table = tables[name]
        if name == self.policy:
            max_length, max_prompt = _compute_limits(self.config, rendering)
            long = (table.sequence_lengths > max_length) | (table.prompt_lengths > max_prompt)
        elif rendering.max_positions is not None:
            max_length, max_prompt = rendering.max_positions, rendering.max_positions
            long = table.sequence_lengths > max_length
        else:
            return
        for i in np.flatnonzero(long & self.fits).tolist():
            if self.config.on_long_row == "stop":
                raise DataError(
                    f"{self.pairs[i].source}: too long for {name}: {table.sequence_lengths[i]} tokens, "
                    f"{table.prompt_lengths[i]} of them the prompt, and {max_length} fit, {max_prompt} of "
                    "them the prompt; raise data.max_length and data.max_prompt_length as far as the model "
                    "has positions, or set data.on_long_row to skip or truncate"
                )
            self.fits[i] = False
            self.skipped[f"too long for {name}"] += 1

    def _skip_pair(self, i: int, bad: BadRow) -> None:
        if self.config.on_bad_row == "stop":
            raise bad
        self.fits[i] = False
        self.skipped[bad.reason] += 1

    def _report_progress(self, count: int) -> None:
        self.done_count += count
        if self.progress is not None:
            self.progress(self.done_count, self.renderings * len(self.pairs))


def _compute_limits(config: DataConfig, policy: Rendering) -> tuple[int, int]:
    """Return the most tokens of a prompt with response, and of a prompt, under the policy's rendering."""
    max_length = min(config.max_length, policy.max_positions or config.max_length)
    return max_length, min(config.max_prompt_length, max_length - 1)


def _encode_responses(
    rendering: Rendering, prompts: list[str], answers: list[tuple[str, bool]]
) -> list[list[int]]:
    """Return the ids of each response after its prompt, with an end token where the flag says so."""
    keys = [
        (rendering.choose_sentinel(prompt), text, has_end)
        for prompt, (text, has_end) in zip(prompts, answers, strict=True)
    ]
    different = list(dict.fromkeys(keys))
    ids = rendering.encode_behind([key[0] for key in different], [key[1] for key in different])
    known = {
        key: add_end_token(rendering, row) if key[2] else row for key, row in zip(different, ids, strict=True)
    }
    return [known[key] for key in keys]


def _encode_unique(
    rendering: Rendering, texts: list[tuple[str, bool]], complete: Callable[[list[int], Any], list[int]]
) -> list[list[int]]:
    """Return the ids of each text, encoding repeated texts once: ranked completions repeat theirs."""
    different = list(dict.fromkeys(texts))
    ids = rendering.encode([text for text, _ in different])
    known = {key: complete(row, key[1]) for key, row in zip(different, ids, strict=True)}
    return [known[key] for key in texts]
