"""Rows that are too long for the policy, cut for it by tokens and for every other model by the same text."""

from dataclasses import dataclass, replace
from typing import Any

from preferences.pairs import DataError, Message, Pair
from preferences.rendering import Rendering, Texts, render, responses_of

ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Cut:
    """A pair that fits. `pair` holds the cut texts, `ended` says which responses kept their end."""

    pair: Pair
    prompt: list[int]
    responses: list[list[int]]
    ended: tuple[bool, ...]

    def texts(self, rendering: Rendering, name: str, kwargs: dict[str, Any]) -> Texts:
        """The cut pair for another model: a response that was cut ends where the policy's does, openly."""
        texts = render(self.pair, rendering, name, kwargs)
        contents = [_content(response) for response in responses_of(self.pair)]
        responses = tuple(
            text if ended else content
            for text, content, ended in zip(texts.responses, contents, self.ended, strict=True)
        )
        return replace(texts, responses=responses, ended=self.ended)


def cut(
    pair: Pair, rendering: Rendering, name: str, kwargs: dict[str, Any], *, max_prompt: int, max_length: int
) -> Cut | None:
    """Make a pair fit `max_prompt` and `max_length` tokens under the policy's rendering.

    A plain prompt loses tokens on the left. A conversation loses its oldest turns, then the beginning of its
    last question: never its markup, never its system message. A response loses tokens on the right, down to
    what the prompt leaves, and its end-of-turn token. No character is cut in two. None when no cut can help:
    nothing of the prompt or a response is left, or both responses are left the same.
    """
    if getattr(rendering.tokenizer, "backend_tokenizer", None) is None:
        raise DataError(
            f"on_long_row: truncate needs a fast tokenizer, and {name} has none; try on_long_row: skip"
        )
    shorter = _shorter_prompt(pair, rendering, name, kwargs, max_prompt)
    if shorter is None:
        return None
    pair, texts, prompt = shorter
    room = max_length - len(prompt)
    ids, ended, contents = [], [], []
    for text, response in zip(texts.responses, responses_of(pair), strict=True):
        whole = finished(rendering, rendering.encode([text])[0])
        kept, characters = (whole, len(text)) if len(whole) <= room else _head(rendering, text, room)
        content = _content(response)
        if len(whole) > room:
            begins = text.find(content.strip()) if texts.marked_up else 0
            content = text[begins:characters] if begins >= 0 else ""
        if not content.strip():
            return None
        ids.append(kept)
        ended.append(len(whole) <= room)
        contents.append(content)
    if len(ids) == 2 and ids[0] == ids[1]:
        return None
    answers = [_with_content(old, new) for old, new in zip(responses_of(pair), contents, strict=True)]
    pair = replace(pair, chosen=answers[0], rejected=answers[1] if len(answers) > 1 else None)
    return Cut(pair, prompt, ids, tuple(ended))


def finished(rendering: Rendering, ids: list[int]) -> list[int]:
    """A response with its end-of-turn token, which the template may have put already."""
    return ids if ids and ids[-1] in rendering.ends else [*ids, rendering.end]


def begun(rendering: Rendering, ids: list[int], *, marked_up: bool) -> list[int]:
    """A prompt with what the tokenizer puts before it, which the text may hold already."""
    first = rendering.beginning
    return ids if marked_up or ids[: len(first)] == first else first + ids


def _shorter_prompt(
    pair: Pair, rendering: Rendering, name: str, kwargs: dict[str, Any], limit: int
) -> tuple[Pair, Texts, list[int]] | None:
    def tried(candidate: Pair) -> tuple[Pair, Texts, list[int]]:
        texts = render(candidate, rendering, name, kwargs)
        ids = begun(rendering, rendering.encode([texts.prompt])[0], marked_up=texts.marked_up)
        return candidate, texts, ids

    shorter = tried(pair)
    if len(shorter[2]) <= limit:
        return shorter
    if isinstance(pair.prompt, str):
        room = limit - len(rendering.beginning)
        if room < 1:
            return None
        ids, characters = _tail(rendering, pair.prompt, room)
        pair, texts, _ = tried(replace(pair, prompt=pair.prompt[characters:]))
        return (pair, texts, rendering.beginning + ids) if ids else None
    messages = pair.prompt
    system = [message for message in messages[:1] if message["role"] in ("system", "developer")]
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for first in questions:
        shorter = tried(replace(pair, prompt=[*system, *messages[first:]]))
        if len(shorter[2]) <= limit:
            return shorter
    if not questions:
        return None
    question, rest = messages[questions[-1]], messages[questions[-1] + 1 :]
    content: str = question["content"]
    for _ in range(ATTEMPTS):  # tokens may merge anew at the cut, so that one cut need not do
        room = len(rendering.encode([content])[0]) - (len(shorter[2]) - limit)
        if room < 1:
            return None
        content = content[_tail(rendering, content, room)[1] :]
        shorter = tried(replace(pair, prompt=[*system, {**question, "content": content}, *rest]))
        if len(shorter[2]) <= limit:
            return shorter
    return None


def _head(rendering: Rendering, text: str, room: int) -> tuple[list[int], int]:
    """The first tokens of a text, at most `room`, and the characters they spell."""
    ids, spans = _spans(rendering, text)
    last = min(room, len(ids))
    while 0 < last < len(ids) and spans[last][0] < spans[last - 1][1]:  # two tokens share a character
        last -= 1
    if last == 0:
        return [], 0
    spelt = _spelt(rendering, ids[:last])
    return ids[:last], len(spelt) if text.startswith(spelt) else spans[last - 1][1]


def _tail(rendering: Rendering, text: str, room: int) -> tuple[list[int], int]:
    """The last tokens of a text, at most `room`, and the character they begin at."""
    ids, spans = _spans(rendering, text)
    first = max(0, len(ids) - room)
    while 0 < first < len(ids) and spans[first][0] < spans[first - 1][1]:
        first += 1
    if first == 0 or first == len(ids):
        return ids[first:], 0 if first == 0 else len(text)
    spelt = _spelt(rendering, ids[first:])
    return ids[first:], len(text) - len(spelt) if text.endswith(spelt) else spans[first - 1][1]


def _spans(rendering: Rendering, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = rendering.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _spelt(rendering: Rendering, ids: list[int]) -> str:
    """What tokens spell. The spans of byte-level tokens may leave out their blanks, so they will not do."""
    return str(rendering.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _content(response: str | list[Message]) -> str:
    return response if isinstance(response, str) else str(response[0]["content"])


def _with_content(response: str | list[Message], content: str) -> str | list[Message]:
    return content if isinstance(response, str) else [{**response[0], "content": content}]
