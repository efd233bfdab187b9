"""Tokenise pairs under the tokenizer and template of every model that reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from preferences.pairs import BadRow, DataError, Pair
from preferences.tokens.rendering import RenderedPair, Rendering, render_pair
from preferences.tokens.truncation import TruncatedPair, add_end_token, add_prompt_prefix, truncate_pair

_NOTHING = RenderedPair("", True, ("", ""), (False, False))


@dataclass(frozen=True)
class TokenizationSettings:
    """How pairs are rendered and tokenised, whatever their source.

    Attributes:
        renderings: of every model by its name in messages, no two alike; the first is the policy's.
        template_kwargs: arguments of every model's chat template.
        truncate_to: most tokens of a prompt with response, and of a prompt, in the policy's tokens; None if
            long pairs are left as they are.
        on_bad_row: whether a pair that cannot be tokenised stops, or is marked with the reason.
        vocabularies: by the place of a rendering, the model of fewest token ids that reads it, and how many.
    """

    renderings: Mapping[str, Rendering]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    truncate_to: tuple[int, int] | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    vocabularies: Mapping[int, tuple[str, int]] = field(default_factory=dict)

    @property
    def policy(self) -> str:
        """The name of the first rendering."""
        return next(iter(self.renderings))


@dataclass
class TokenizedPairs:
    """Token ids of N pairs under every rendering.

    Attributes:
        columns: by rendering, lists of the ids of prompts, chosen and rejected responses: N each.
        problems: why each pair cannot be used, or None.
        truncated: indices of the pairs that were truncated.
        boundary_merges: by rendering, places of the examined pairs in which a token of prompt and response as
            one text would reach over the boundary between them.
    """

    columns: dict[str, tuple[list[list[int]], list[list[int]], list[list[int]]]]
    problems: list[str | None]
    truncated: set[int]
    boundary_merges: dict[str, list[str]]


def tokenize_pairs(
    pairs: Sequence[Pair], settings: TokenizationSettings, *, examined: Sequence[int] = ()
) -> TokenizedPairs:
    """Tokenise every pair under every rendering.

    Prompt and response are tokenised so that they are as in one text; where a token would reach over the
    boundary they are tokenised apart, for which the pairs at `examined` are looked at.

    Raises:
        BadRow: a pair that cannot be rendered or has no tokens, unless bad rows are skipped.
        DataError: a model has no chat template, or lacks a token id that its tokenizer gives.
    """
    return _TokenizationJob(pairs, settings, examined).run()


class _TokenizationJob:
    """State of one call of `tokenize_pairs`: pairs that have a problem, and the cut form of those cut."""

    def __init__(
        self, pairs: Sequence[Pair], settings: TokenizationSettings, examined: Sequence[int]
    ) -> None:
        self._pairs, self._settings, self._examined = pairs, settings, examined
        self._problems: list[str | None] = [None] * len(pairs)
        self._truncated: dict[int, TruncatedPair] = {}

    def run(self) -> TokenizedPairs:
        columns, merges = {}, {}
        for number, (name, rendering) in enumerate(self._settings.renderings.items()):
            columns[name] = self._tokenize(name, rendering)
            if number in self._settings.vocabularies:
                self._refuse_unknown_ids(columns[name], rendering, *self._settings.vocabularies[number])
        for name, rendering in self._settings.renderings.items():
            merges[name] = self._find_boundary_merges(name, rendering)
        return TokenizedPairs(columns, self._problems, set(self._truncated), merges)

    def _tokenize(
        self, name: str, rendering: Rendering
    ) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        texts = [self._render_texts(i, name, rendering) for i in range(len(self._pairs))]
        prompts = _encode_prompts(rendering, [(text.prompt, text.is_templated) for text in texts])
        chosen, rejected = (_encode_responses(rendering, texts, side) for side in (0, 1))
        self._mark_untrainable(prompts, chosen, rejected, name)
        if name == self._settings.policy and self._settings.truncate_to is not None:
            self._truncate_long_pairs(prompts, chosen, rejected, rendering)
        return prompts, chosen, rejected

    def _render_texts(self, i: int, name: str, rendering: Rendering) -> RenderedPair:
        if self._problems[i] is not None:
            return _NOTHING
        kwargs = dict(self._settings.template_kwargs)
        try:
            with rendering.limit_time(name):  # once for all texts of the pair
                if i in self._truncated:
                    return self._truncated[i].render_for(rendering, name, kwargs)
                return render_pair(self._pairs[i], rendering, name, kwargs)
        except BadRow as bad:
            self._mark_bad(i, bad)
            return _NOTHING

    def _mark_untrainable(
        self, prompts: list[list[int]], chosen: list[list[int]], rejected: list[list[int]], name: str
    ) -> None:
        """Mark pairs that train nothing: a text without tokens, or the same tokens in both responses."""
        for i, pair in enumerate(self._pairs):
            if self._problems[i] is not None:
                continue
            responses = {"chosen": chosen[i]} | ({} if pair.rejected is None else {"rejected": rejected[i]})
            least = 1 if i in self._truncated else 2  # more than the end-of-turn token
            bare = [field for field, ids in responses.items() if len(ids) < least]
            if bare or not prompts[i]:
                detail = f"{bare[0] if bare else 'prompt'} has no tokens under the tokenizer of {name}"
                self._mark_bad(i, BadRow(pair.source, "no tokens", detail))
            elif name == self._settings.policy and chosen[i] == rejected[i]:
                detail = f"chosen and rejected are the same tokens under the tokenizer of {name}"
                self._mark_bad(i, BadRow(pair.source, "chosen equals rejected", detail))

    def _truncate_long_pairs(
        self,
        prompts: list[list[int]],
        chosen: list[list[int]],
        rejected: list[list[int]],
        rendering: Rendering,
    ) -> None:
        settings = self._settings
        assert settings.truncate_to is not None
        max_length, max_prompt = settings.truncate_to
        for i, pair in enumerate(self._pairs):
            longest = len(prompts[i]) + max(len(chosen[i]), len(rejected[i]))
            fits = len(prompts[i]) <= max_prompt and longest <= max_length
            if fits or self._problems[i] is not None:
                continue
            shorter = truncate_pair(
                pair,
                rendering,
                settings.policy,
                dict(settings.template_kwargs),
                max_prompt=max_prompt,
                max_length=max_length,
            )
            if shorter is None:
                self._problems[i] = f"too long for {settings.policy}, and no use when cut"
                continue
            self._truncated[i] = shorter
            prompts[i] = shorter.prompt
            for column, ids in zip((chosen, rejected), shorter.responses, strict=False):
                column[i] = ids

    def _refuse_unknown_ids(
        self, columns: Sequence[list[list[int]]], rendering: Rendering, name: str, limit: int
    ) -> None:
        """Raise DataError for a token id beyond those that a model has an embedding for."""
        for column in columns:
            for i, ids in enumerate(column):
                if not ids or (max(ids) < limit and min(ids) >= -limit):  # a complement is at least -limit
                    continue
                unknown = max(max(ids), -1 - min(ids))
                text = rendering.tokenizer.convert_ids_to_tokens(unknown)
                raise DataError(
                    f"{self._pairs[i].source}: the tokenizer of {name} gives token {unknown} ({text!r}), and "
                    f"the model has {limit} token ids; use the tokenizer that belongs to the model, or give "
                    "the model embeddings for its new tokens"
                )

    def _find_boundary_merges(self, name: str, rendering: Rendering) -> list[str]:
        """Return the examined pairs whose tokens are not those of prompt and response as one text."""
        sample = [i for i in self._examined if self._problems[i] is None and i not in self._truncated]
        texts = [(i, self._render_texts(i, name, rendering)) for i in sample]
        both = [(i, text.prompt, answer) for i, text in texts for answer in text.responses]
        prompts = rendering.encode([prompt for _, prompt, _ in both])
        responses = rendering.encode_behind(
            [rendering.choose_sentinel(prompt) for _, prompt, _ in both], [answer for *_, answer in both]
        )
        wholes = rendering.encode([prompt + answer for _, prompt, answer in both])
        parts = zip(both, prompts, responses, wholes, strict=True)
        merged = dict.fromkeys(key[0] for key, first, second, whole in parts if first + second != whole)
        return [self._pairs[i].source for i in merged]

    def _mark_bad(self, i: int, bad: BadRow) -> None:
        if self._settings.on_bad_row == "stop":
            raise bad
        self._problems[i] = bad.reason


def _encode_prompts(rendering: Rendering, texts: list[tuple[str, bool]]) -> list[list[int]]:
    """Return the ids of each prompt, encoding repeated texts once: ranked completions repeat theirs."""
    different = list(dict.fromkeys(texts))
    ids = rendering.encode([text for text, _ in different])
    known = {
        key: add_prompt_prefix(rendering, row, is_templated=key[1])
        for key, row in zip(different, ids, strict=True)
    }
    return [known[key] for key in texts]


def _encode_responses(rendering: Rendering, texts: list[RenderedPair], side: int) -> list[list[int]]:
    """Return the ids of each response after its prompt, with an end token where it has one.

    Ids that are read and not scored are complements.
    """
    turns = {
        i: rendering.encode_segments(text.prompt, segments)
        for i, text in enumerate(texts)
        if side < len(text.responses) and (segments := text.segments[side]) is not None
    }
    keys = [
        (rendering.choose_sentinel(text.prompt), text.responses[side], text.has_end_token[side])
        if side < len(text.responses) and i not in turns
        else ("", "", False)
        for i, text in enumerate(texts)
    ]
    different = list(dict.fromkeys(keys))
    ids = rendering.encode_behind([key[0] for key in different], [key[1] for key in different])
    known = {
        key: add_end_token(rendering, row) if key[2] else row for key, row in zip(different, ids, strict=True)
    }
    return [add_end_token(rendering, turns[i]) if i in turns else known[key] for i, key in enumerate(keys)]
