"""Tokenise pairs: one table for each model that reads them, of the pairs that fit all of them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

    def take(self, indices: npt.NDArray[np.int64]) -> "TokenTable":
        """Return the pairs at `indices`, in that order."""
        rejected = None if self.rejected is None else self.rejected.take(indices)
        return TokenTable(self.prompts.take(indices), self.chosen.take(indices), rejected)


@dataclass(frozen=True, slots=True)
class TokenizedPairs:
    """A table for each rendering, whose row i is pair `kept_indices[i]`, and the pairs left out, by reason.

    `truncated` counts the remaining pairs that were truncated.
    """

    tables: dict[str, TokenTable]
    kept_indices: npt.NDArray[np.int64]
    skipped: Counter[str]
    truncated: int = 0


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
    model's positions. Prompt and response are tokenised separately. `progress(done, total)` counts pairs
    times renderings. Raises `DataError` if a pair is refused, or no pair is left.
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
        job.skip_long_pairs(tables, name, rendering)
    kept = np.flatnonzero(job.fits)
    if not len(kept):
        reasons = ", ".join(f"{count} {reason}" for reason, count in job.skipped.most_common())
        raise DataError(
            f"no pair is left of {len(pairs)} ({reasons}); raise data.max_length, or see the first one in "
            "full with data.on_long_row: stop and data.on_bad_row: stop"
        )
    if len(kept) < len(pairs):
        remaining = {first: tables[first].take(kept) for first in name_by_identity.values()}
        tables = {
            name: remaining[name_by_identity[rendering.identity]] for name, rendering in renderings.items()
        }
    return TokenizedPairs(tables, kept, job.skipped, sum(bool(job.fits[i]) for i in job.truncated))


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
                _encode_unique(
                    rendering,
                    [answer[k] if k < len(answer) else ("", False) for answer in answers],
                    lambda ids, has_end_token: add_end_token(rendering, ids) if has_end_token else ids,
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


def _encode_unique(
    rendering: Rendering, texts: list[tuple[str, bool]], complete: Callable[[list[int], Any], list[int]]
) -> list[list[int]]:
    """Return the ids of each text, encoding repeated texts once: ranked completions repeat theirs."""
    different = list(dict.fromkeys(texts))
    ids = rendering.encode([text for text, _ in different])
    known = {key: complete(row, key[1]) for key, row in zip(different, ids, strict=True)}
    return [known[key] for key in texts]
