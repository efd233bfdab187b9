"""Texts and messages of a row: checked, and the prompt told apart from the responses."""

from typing import Any

from preferences.pairs import BadRow, Message, shared_length, shared_text


def split_off_prompt(
    prompt: str | list[Message] | None, responses: list[Any], place: str
) -> tuple[str | list[Message], list[Any]]:
    """The prompt, and the responses without it, whichever of the ecosystem's ways the row was written in."""
    conversations = not isinstance(responses[0], str)
    if prompt is None:
        if len(responses) < 2:
            raise BadRow(
                place, "missing field", "prompt is missing or empty; give the text that was completed"
            )
        length = (shared_length if conversations else shared_text)(*responses)
        return responses[0][:length], [response[length:] for response in responses]
    if isinstance(prompt, str) and conversations:
        return _prompt_among_messages(prompt, responses, place)
    if not isinstance(prompt, str):
        responses = [response if conversations else [_answer(response)] for response in responses]
        if all(response[: len(prompt)] == prompt for response in responses):
            responses = [response[len(prompt) :] for response in responses]
    return prompt, responses


def _prompt_among_messages(
    prompt: str, responses: list[list[Message]], place: str
) -> tuple[list[Message], list[list[Message]]]:
    """A text prompt beside message lists: the question they answer, or a copy of the one they begin with."""
    if all(len(response) == 1 for response in responses):
        return [{"role": "user", "content": prompt}], responses
    length = shared_length(*responses) if len(responses) > 1 else len(responses[0]) - 1
    if not any(message["content"].strip() == prompt.strip() for message in responses[0][:length]):
        raise BadRow(
            place,
            "two prompts",
            "prompt is not among the messages that chosen and rejected share; data.columns: {prompt: null} "
            "takes the shared messages as the prompt",
        )
    return responses[0][:length], [response[length:] for response in responses]


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def checked_prompt(prompt: str | list[Message], place: str) -> str | list[Message]:
    """The prompt, if there is something to answer."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow(
                place,
                "no prompt",
                "prompt is empty, and chosen and rejected begin with no words in common; give a prompt",
            )
    elif not prompt:
        raise BadRow(place, "no prompt", "there is no message before the response; give a prompt")
    elif prompt[-1]["role"] == "assistant":
        raise BadRow(
            place,
            "bad messages",
            "the prompt ends with an assistant message; end it with what is to be answered",
        )
    elif prompt[-1]["role"] == "user" and not prompt[-1]["content"].strip():
        raise BadRow(place, "no prompt", "the last message of the prompt is empty")
    return prompt


def checked_response(response: str | list[Message], field: str, place: str) -> str | list[Message]:
    """The response, if it is a text or one assistant message that says or calls something."""
    if isinstance(response, str):
        if not response.strip():
            raise BadRow(place, "empty response", f"{field} is empty after the prompt")
        return response
    if len(response) != 1:
        raise BadRow(
            place,
            "bad messages",
            f"{field} has {len(response)} messages after the prompt; the loss is on one final assistant "
            "message, so the turns before it must be the same in chosen and rejected",
        )
    if response[0]["role"] != "assistant":
        raise BadRow(
            place,
            "bad messages",
            f"the last message of {field} must be from assistant, got {response[0]['role']!r}",
        )
    if not response[0]["content"].strip() and not response[0].get("tool_calls"):
        raise BadRow(place, "empty response", f"the last message of {field} is empty")
    return response


def text_or_messages(value: Any, field: str, place: str) -> str | list[Message]:
    """A column's value, if it is text or a list of well-formed messages."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(place, "empty text", f"{field} is missing or empty")
        return value
    if not isinstance(value, list):
        raise BadRow(place, "not text", f"{field} must be text or a list of messages, got {kind(value)}")
    if not value:
        raise BadRow(place, "empty text", f"{field} is an empty list of messages")
    return [_message(message, f"{field}[{i}]", place) for i, message in enumerate(value)]


def _message(value: Any, field: str, place: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow(place, "bad messages", f"{field} must be a message {{role, content}}, got {kind(value)}")
    message = {name: part for name, part in value.items() if part is not None}
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise BadRow(
            place,
            "bad messages",
            f"{field} has no role; a message is {{role: user, content: ...}}, got {list(value)}",
        )
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list):  # the content parts of multimodal formats, when all of them are text
        content = _joined(content)
    if not isinstance(content, str):
        raise BadRow(
            place, "bad messages", f"{field} must have a text as content; images and sound cannot be read"
        )
    return {"role": message.pop("role"), **message, "content": content}


def _joined(parts: list[Any]) -> str | None:
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts
    ]
    return None if None in texts else "".join(str(text) for text in texts)


def kind(value: Any) -> str:
    """What was found instead, for an error message."""
    return f"{type(value).__name__} {str(value)[:40]!r}"
