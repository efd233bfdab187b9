"""Truncate pairs that are too long for the policy, by its tokens, and to the same text for other models."""

from dataclasses import dataclass, replace
from typing import Any

from preferences.pairs import DataError, Message, Pair
from preferences.tokens.rendering import RenderedPair, Rendering, get_responses, render_pair

ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class TruncatedPair:
    """A pair cut to fit: `pair` has the cut texts, `has_end_token` says which responses keep their end."""

    pair: Pair
    prompt: list[int]
    responses: list[list[int]]
    has_end_token: tuple[bool, ...]

    def render_for(self, rendering: Rendering, name: str, kwargs: dict[str, Any]) -> RenderedPair:
        """Render for another model: a cut response ends where the policy's does, without an end token."""
        texts = render_pair(self.pair, rendering, name, kwargs)
        contents = [_get_content(response) for response in get_responses(self.pair)]
        responses = tuple(
            text if has_end else content
            for text, content, has_end in zip(texts.responses, contents, self.has_end_token, strict=True)
        )
        return replace(texts, responses=responses, has_end_token=self.has_end_token)


def truncate_pair(
    pair: Pair, rendering: Rendering, name: str, kwargs: dict[str, Any], *, max_prompt: int, max_length: int
) -> TruncatedPair | None:
    """Truncate a pair to `max_prompt` and `max_length` tokens under the policy's rendering.

    A plain prompt loses tokens on the left. A conversation loses its oldest turns, then the beginning of its
    last question: never its markup, never its system message. A response loses tokens on the right, down to
    the room that the prompt leaves, and its end-of-turn token. No character is cut in two. Returns None if no
    cut helps: nothing of the prompt or a response is left, or both responses become the same.
    """
    if getattr(rendering.tokenizer, "backend_tokenizer", None) is None:
        raise DataError(
            f"on_long_row: truncate needs a fast tokenizer, and {name} has none; try on_long_row: skip"
        )
    shorter = _shorten_prompt(pair, rendering, name, kwargs, max_prompt)
    has_turns = any(not isinstance(answer, str) and len(answer) > 1 for answer in get_responses(pair))
    if shorter is None or has_turns:  # a cut would leave a tool's answer without its question
        return None
    pair, texts, prompt = shorter
    room = max_length - len(prompt)
    ids, has_end_token, contents = [], [], []
    for text, response in zip(texts.responses, get_responses(pair), strict=True):
        whole = add_end_token(rendering, rendering.encode_response(texts.prompt, text))
        kept_ids, characters = (
            (whole, len(text))
            if len(whole) <= room
            else _take_first_tokens(rendering, texts.prompt, text, room)
        )
        content = _get_content(response)
        if len(whole) > room:
            start = text.find(content.strip()) if texts.is_templated else 0
            content = text[start:characters] if start >= 0 else ""
        if not content.strip():
            return None
        ids.append(kept_ids)
        has_end_token.append(len(whole) <= room)
        contents.append(content)
    if len(ids) == 2 and ids[0] == ids[1]:
        return None
    answers = [_replace_content(old, new) for old, new in zip(get_responses(pair), contents, strict=True)]
    pair = replace(pair, chosen=answers[0], rejected=answers[1] if len(answers) > 1 else None)
    return TruncatedPair(pair, prompt, ids, tuple(has_end_token))


def add_end_token(rendering: Rendering, ids: list[int]) -> list[int]:
    """Append the end-of-turn token to a response, unless the template has put it already."""
    return ids if ids and ids[-1] in rendering.end_tokens else [*ids, rendering.end_id]


def add_prompt_prefix(rendering: Rendering, ids: list[int], *, is_templated: bool) -> list[int]:
    """Prepend the tokenizer's prefix tokens to a prompt, unless the text has them already."""
    first = rendering.prefix_ids
    return ids if is_templated or ids[: len(first)] == first else first + ids


def _shorten_prompt(
    pair: Pair, rendering: Rendering, name: str, kwargs: dict[str, Any], limit: int
) -> tuple[Pair, RenderedPair, list[int]] | None:
    def encode_candidate(candidate: Pair) -> tuple[Pair, RenderedPair, list[int]]:
        texts = render_pair(candidate, rendering, name, kwargs)
        ids = add_prompt_prefix(
            rendering, rendering.encode([texts.prompt])[0], is_templated=texts.is_templated
        )
        return candidate, texts, ids

    shorter = encode_candidate(pair)
    if len(shorter[2]) <= limit:
        return shorter
    if isinstance(pair.prompt, str):
        room = limit - len(rendering.prefix_ids)
        if room < 1:
            return None
        ids, characters = _take_last_tokens(rendering, pair.prompt, room)
        pair, texts, _ = encode_candidate(replace(pair, prompt=pair.prompt[characters:]))
        return (pair, texts, rendering.prefix_ids + ids) if ids else None
    messages = pair.prompt
    system = [message for message in messages[:1] if message["role"] in ("system", "developer")]
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for first in questions:
        shorter = encode_candidate(replace(pair, prompt=[*system, *messages[first:]]))
        if len(shorter[2]) <= limit:
            return shorter
    if not questions:
        return None
    question, rest = messages[questions[-1]], messages[questions[-1] + 1 :]
    content: str = question["content"]
    for _ in range(ATTEMPTS):  # tokens may merge anew at the cut, so one cut may not be enough
        room = len(rendering.encode([content])[0]) - (len(shorter[2]) - limit)
        if room < 1:
            return None
        content = content[_take_last_tokens(rendering, content, room)[1] :]
        shorter = encode_candidate(replace(pair, prompt=[*system, {**question, "content": content}, *rest]))
        if len(shorter[2]) <= limit:
            return shorter
    return None


def _take_first_tokens(rendering: Rendering, prompt: str, text: str, room: int) -> tuple[list[int], int]:
    """Return a response's first tokens, at most `room`, and the number of characters they decode to."""
    ids, spans = _encode_response_with_spans(rendering, prompt, text)
    last = min(room, len(ids))
    while 0 < last < len(ids) and spans[last][0] < spans[last - 1][1]:  # two tokens share a character
        last -= 1
    if last == 0:
        return [], 0
    decoded = _decode_ids(rendering, ids[:last])
    return ids[:last], len(decoded) if text.startswith(decoded) else spans[last - 1][1]


def _take_last_tokens(rendering: Rendering, text: str, room: int) -> tuple[list[int], int]:
    """Return the last tokens of a text, at most `room`, and the position of their first character."""
    ids, spans = _encode_with_spans(rendering, text)
    first = max(0, len(ids) - room)
    while 0 < first < len(ids) and spans[first][0] < spans[first - 1][1]:
        first += 1
    if first == 0 or first == len(ids):
        return ids[first:], 0 if first == 0 else len(text)
    decoded = _decode_ids(rendering, ids[first:])
    return ids[first:], len(text) - len(decoded) if text.endswith(decoded) else spans[first - 1][1]


def _encode_response_with_spans(
    rendering: Rendering, prompt: str, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Encode a response as it continues its prompt; spans count from the response's first character."""
    response, sentinel = rendering.encode_response(prompt, text), rendering.choose_sentinel(prompt)
    ids, spans = _encode_with_spans(rendering, sentinel + text)
    skipped = len(ids) - len(response)
    if ids[skipped:] != response:
        return _encode_with_spans(rendering, text)
    return response, [(max(0, first - len(sentinel)), end - len(sentinel)) for first, end in spans[skipped:]]


def _encode_with_spans(rendering: Rendering, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = rendering.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _decode_ids(rendering: Rendering, ids: list[int]) -> str:
    """Decode tokens to text, because the spans of byte-level tokens may leave out their whitespace."""
    return str(rendering.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _get_content(response: str | list[Message]) -> str:
    return response if isinstance(response, str) else str(response[0]["content"])


def _replace_content(response: str | list[Message], content: str) -> str | list[Message]:
    return content if isinstance(response, str) else [{**response[0], "content": content}]
