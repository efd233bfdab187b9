"""Render a pair as the texts that one model reads, with its chat template, prefix and end-of-turn tokens."""

import datetime
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from preferences.pairs import BadRow, DataError, Message, Pair, count_common_prefix
from preferences.tokens.time_limit import limit_computing

MAX_RENDERING_S = 5.0
"""Computing time after which a chat template counts as endless; a long conversation takes hundredths."""
LONGEST_RENDERING = 1 << 28
"""Characters of a conversation; more than any context window holds."""
_DATE_CALL = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(["'])((?:(?!\1).)*)\1\s*\)""")
_OTHER_DATE_USE = re.compile(r"strftime_now(?!\s+is\s+(?:not\s+)?defined)")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_SENTINELS = ("\n", "\ue000")
_PROBES = ("a", " a", "The cat", "1", ".")


@dataclass(frozen=True, eq=False)
class Rendering:
    """The tokenizer, chat template and length limit with which one model reads pairs.

    `chat_template` overrides the tokenizer's own; `template_kwargs` are passed to it, and `date` is today's
    to a template that writes it. `max_positions` is the longest prompt with response, in tokens, that the
    model accepts, `vocabulary` the number of token ids that it has; None if there is no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_positions: int | None = None
    vocabulary: int | None = None
    date: datetime.date | None = None

    @cached_property
    def prefix_ids(self) -> list[int]:
        """Tokens that the tokenizer's own rule puts before a text (BOS, or nothing)."""
        bare = self.encode(["a"])[0]
        with_prefix: list[int] = self.tokenizer("a", verbose=False)["input_ids"]
        if not bare:
            return with_prefix[:1] if with_prefix[:1] == [self.tokenizer.bos_token_id] else []
        return next(
            with_prefix[:i] for i in range(len(with_prefix)) if with_prefix[i : i + len(bare)] == bare
        )

    @cached_property
    def end_id(self) -> int:
        """The token that is appended to a response without an end-of-turn token."""
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                f"the tokenizer {self.tokenizer.name_or_path} has no EOS token to end a response with; "
                "set its eos_token"
            )
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def end_tokens(self) -> dict[int, str]:
        """Tokens that end a turn when they come last, by id: EOS, and special tokens such as `<|eot_id|>`."""
        never = {self.tokenizer.unk_token_id, self.tokenizer.bos_token_id} - {self.end_id}
        special = {
            number: token.content
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special and number not in never
        }
        return {**special, self.end_id: str(self.tokenizer.eos_token)}

    @property
    def writes_date(self) -> bool:
        """Whether the chat template writes today's date, by the function that transformers gives it."""
        template = self.chat_template or self.tokenizer.chat_template
        return "strftime_now" in json.dumps(template, default=str)

    @cached_property
    def text_sentinel(self) -> str:
        """A text that stands for the end of a prompt while a response is encoded.

        SentencePiece tokenizers put a blank before a text, and a response that is encoded by itself would
        begin with it. Empty for a tokenizer that begins every text as it continues one.
        """
        for sentinel in self._iterate_sentinels():
            if self._is_separate(sentinel):
                behind = self.encode_behind([sentinel] * len(_PROBES), _PROBES)
                return "" if behind == self.encode(_PROBES) else sentinel
        return ""

    def _iterate_sentinels(self) -> Iterator[str]:
        """Yield texts that may stand for a prompt, those first that no token joins with what follows them."""
        tokens = sorted(self.tokenizer.get_vocab())
        yield from (text for text in _SENTINELS if not any(text in token[:-1] for token in tokens))
        joined = Counter(chain.from_iterable(set(token[:-1]) for token in tokens))
        characters = [token for token in tokens if len(token) == 1]
        yield from sorted(characters, key=lambda text: (joined[text], text.isalnum()))[:20]

    def _is_separate(self, sentinel: str) -> bool:
        """Return whether a text keeps its own tokens, none of them unknown, when other text follows it."""
        ids = self.encode([sentinel])[0]
        return (
            bool(ids)
            and self.tokenizer.unk_token_id not in ids
            and sentinel not in self._added_tokens
            and all(row[: len(ids)] == ids for row in self.encode([sentinel + text for text in _PROBES]))
        )

    @cached_property
    def _added_tokens(self) -> tuple[str, ...]:
        """The tokens that are split off before a text is tokenised, longest first."""
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values()} - {""}
        return tuple(sorted(tokens, key=len, reverse=True))

    @cached_property
    def _blank_eating_tokens(self) -> tuple[str, ...]:
        """Those among the added tokens to which the blanks behind them belong."""
        eating = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.rstrip}
        return tuple(token for token in self._added_tokens if token in eating)

    def choose_sentinel(self, prompt: str) -> str:
        """Return a text that stands for the prompt while its response is encoded.

        That is an added token, such as `[/INST]`, if the prompt ends with one: a text may begin differently
        behind it than behind other text.
        """
        if not self.text_sentinel or not prompt:
            return ""
        for end, tokens in ((prompt, self._added_tokens), (prompt.rstrip(), self._blank_eating_tokens)):
            if end.endswith(tokens):
                return next(token for token in tokens if end.endswith(token))
        return self.text_sentinel

    def encode_behind(self, sentinels: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as it continues its sentinel, without those of the sentinel."""
        rows = self.encode([sentinel + text for sentinel, text in zip(sentinels, texts, strict=True)])
        different = list(dict.fromkeys(sentinels))
        known = dict(zip(different, self.encode(different), strict=True))
        return [
            row[len(known[sentinel]) :]
            if row[: len(known[sentinel])] == known[sentinel]
            else self.encode([text])[0]  # the sentinel has merged with the text
            for sentinel, text, row in zip(sentinels, texts, rows, strict=True)
        ]

    def encode_segments(self, prompt: str, segments: Sequence[tuple[str, bool]]) -> list[int]:
        """Return the ids of a response in parts, each as it continues the text before it.

        Ids of a part that is not scored are complements (`~id`).
        """
        ids: list[int] = []
        for text, is_scored in segments:
            part = self.encode_response(prompt, text)
            ids += part if is_scored else [~token for token in part]
            prompt += text
        return ids

    def encode_response(self, prompt: str, response: str) -> list[int]:
        """Return the ids of a response as it continues its prompt."""
        return self.encode_behind([self.choose_sentinel(prompt)], [response])[0]

    @cached_property
    def identity(self) -> str:
        """A digest that is equal for two renderings that turn every pair into the same tokens."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        parts = [
            fast.to_str() if fast is not None else str(id(self.tokenizer)),
            self.tokenizer.eos_token_id,
            self.prefix_ids,
            self.chat_template or self.tokenizer.chat_template,
            dict(self.template_kwargs),
            self.date,
            self.tokenizer.special_tokens_map,  # templates read bos_token and the like
        ]
        return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as it is, with nothing added before or after it."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return list(encoded["input_ids"])

    def apply_template(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool,
        **kwargs: Any,
    ) -> str:
        """Return the conversation in the model's markup.

        transformers renders it in Jinja's sandbox, which has no access to files or Python's insides.

        Raises:
            jinja2.TemplateError: the template refuses the conversation, or fails in any other way.
            DataError: the template does not come to an end.
        """
        template = self.chat_template
        if self.date is not None:
            template = _write_date(self.tokenizer.get_chat_template(template, tools), self.date)
        try:
            with self.limit_time():
                _refuse_powers(self.tokenizer.get_chat_template(template, tools))
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=template,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **{**kwargs, **self.template_kwargs},
                )
        except DataError:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError) as error:
            raise jinja2.TemplateError(str(error) or type(error).__name__) from error
        return _check_rendered(str(text))

    def limit_time(self, name: str = "") -> AbstractContextManager[None]:
        """Return a context in which a template that does not come to an end raises DataError.

        `name` is what messages call the model; default: its folder.
        """
        return limit_computing(
            MAX_RENDERING_S,
            lambda: DataError(
                f"the chat template of {name or self.tokenizer.name_or_path or 'a model'} has computed for "
                f"{MAX_RENDERING_S:g} s and has not come to an end; set another chat_template for that model"
            ),
        )


@lru_cache
def _refuse_powers(template: str) -> None:
    """Refuse `**`: Python computes a power of large numbers in one step, which no time limit can stop."""
    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateError:
        return  # which rendering reports
    if any(kind == "operator" and text == "**" for _, kind, text in tokens):
        raise DataError(
            "the chat template computes a power (**), which may have no end; set another chat_template"
        )


def _check_rendered(text: str) -> str:
    """Return a rendered text; raise TemplateError for one that cannot be tokenised."""
    if len(text) > LONGEST_RENDERING:
        raise jinja2.TemplateError(f"it writes {len(text):,} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise jinja2.TemplateError(f"it writes half a character (\\u{half:04x})") from None
    return text


def _write_date(template: str, date: datetime.date) -> str:
    """Replace a template's calls of `strftime_now`, which reads the clock, by what they give on a date.

    Raises DataError for a call whose format is not written in the template.
    """
    written = _DATE_CALL.sub(lambda call: json.dumps(date.strftime(call[2]), ensure_ascii=False), template)
    if _OTHER_DATE_USE.search(_COMMENT.sub("", written)):
        raise DataError(
            "the chat template writes today's date in a format that it computes, so the tokens of tomorrow "
            "would be others; set a chat_template that calls strftime_now with a format such as '%d %b %Y'"
        )
    return written


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """The texts to tokenise, with the prompt separate from the responses.

    `is_templated`: the chat template has added what belongs before the prompt, so BOS is not added.
    `has_end_token`: for each response, whether it ends with an end-of-turn token (not if it was truncated).
    `segments`: for each response of several messages, its text in parts, and whether each part is the
    assistant's, which the loss is on; None for a response that is the assistant's as a whole.
    """

    prompt: str
    is_templated: bool
    responses: tuple[str, ...]
    has_end_token: tuple[bool, ...]
    segments: tuple[tuple[tuple[str, bool], ...] | None, ...] = (None, None)


def get_responses(pair: Pair) -> list[str | list[Message]]:
    """Return the one or two responses of a pair."""
    return [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]


def render_pair(pair: Pair, rendering: Rendering, name: str, kwargs: Mapping[str, Any]) -> RenderedPair:
    """Render the texts of a pair for the model `name`.

    Plain text is left as it is. For messages the prompt is the template's rendering up to where the answer
    begins, and a response is what the template adds to it for the final assistant turn, without the
    whitespace after the end-of-turn token and with one such token only.

    Some templates open the answer differently in a generation prompt than in a recorded turn (`<think>`): as
    in TRL, the prompt then ends where the two differ. If they differ before the answer's opening, the
    template rewrites earlier turns and the prompt cannot be separated from a response: `BadRow`.
    """
    responses = get_responses(pair)
    if isinstance(pair.prompt, str):
        return RenderedPair(
            pair.prompt, False, tuple(str(text) for text in responses), (True,) * len(responses)
        )
    if not (rendering.chat_template or rendering.tokenizer.chat_template):
        raise DataError(
            f"{pair.source}: the pair is a conversation, and the tokenizer of {name} has no chat template; "
            f"set chat_template for {name}, or give prompt and responses as plain text"
        )
    try:
        prompt = rendering.apply_template(pair.prompt, pair.tools, add_generation_prompt=True, **kwargs)
        wholes = [
            rendering.apply_template(
                [*pair.prompt, *answer], pair.tools, add_generation_prompt=False, **kwargs
            )
            for answer in responses
            if not isinstance(answer, str)
        ]
        if not all(whole.startswith(prompt) for whole in wholes):
            bare = rendering.apply_template(pair.prompt, pair.tools, add_generation_prompt=False, **kwargs)
            for whole in wholes:
                prompt = prompt[: count_common_prefix(prompt, whole)]
            if not prompt.startswith(bare):
                raise BadRow(
                    pair.source,
                    "unsuited to the chat template",
                    f"the chat template of {name} changes the prompt's turns once they are answered, so the "
                    f"response cannot be separated; set another chat_template for {name}",
                )
        answers = tuple(_strip_repeated_ends(whole[len(prompt) :], rendering) for whole in wholes)
        segments = tuple(
            _split_turns(pair, answer, prompt, text, rendering, name, kwargs)
            for answer, text in zip(responses, answers, strict=True)
        )
    except jinja2.TemplateError as error:
        raise BadRow(
            pair.source,
            "unsuited to the chat template",
            f"the chat template of {name} refuses the messages ({error})",
        ) from error
    return RenderedPair(prompt, True, answers, (True,) * len(answers), segments)


def _split_turns(
    pair: Pair,
    response: str | list[Message],
    prompt: str,
    text: str,
    rendering: Rendering,
    name: str,
    kwargs: Mapping[str, Any],
) -> tuple[tuple[str, bool], ...] | None:
    """Split the text of several messages into the assistant's turns, with their ends, and what is between.

    A turn begins where the template's rendering of all messages before it asks for an answer, and ends where
    the rendering of the messages up to it does; or, if the template writes a turn otherwise when it is the
    last, behind its first end-of-turn token. Whitespace after that belongs to what follows. None for a single
    message.
    """
    if isinstance(response, str) or len(response) == 1:
        return None
    whole = prompt + text
    parts: list[tuple[str, bool]] = []
    place = len(prompt)
    for number, message in enumerate(response):
        if message["role"] != "assistant":
            continue
        before, done = [*pair.prompt, *response[:number]], [*pair.prompt, *response[: number + 1]]
        start = count_common_prefix(
            whole, rendering.apply_template(before, pair.tools, add_generation_prompt=True, **kwargs)
        )
        bare = rendering.apply_template(before, pair.tools, add_generation_prompt=False, **kwargs).rstrip()
        end: int | None = len(whole)
        if number + 1 < len(response):
            alone = rendering.apply_template(done, pair.tools, add_generation_prompt=False, **kwargs).rstrip()
            end = len(alone) if whole.startswith(alone) else _find_end_token(whole, start, rendering)
        if not whole.startswith(bare) or end is None or start < place:
            raise BadRow(
                pair.source,
                "unsuited to the chat template",
                f"the chat template of {name} changes the assistant's turns once others follow, so they "
                f"cannot be told apart; set another chat_template for {name}",
            )
        parts += [(whole[place:start], False)] if start > place else []
        parts.append((whole[start:end], True))
        place = end
    return tuple(parts)


def _find_end_token(text: str, start: int, rendering: Rendering) -> int | None:
    """Return where the first end-of-turn token from `start` on ends; None if there is none."""
    ends = [(text.find(token, start), len(token)) for token in rendering.end_tokens.values() if token]
    return min((place + length for place, length in ends if place >= 0), default=None)


def _strip_repeated_ends(answer: str, rendering: Rendering) -> str:
    """Remove whitespace after the end-of-turn token, and an EOS after another end-of-turn token."""
    answer = answer.rstrip()
    ends = tuple(rendering.end_tokens.values())
    eos = rendering.end_tokens[rendering.end_id]
    while answer.endswith(eos) and (shorter := answer.removesuffix(eos).rstrip()).endswith(ends):
        answer = shorter
    return answer
