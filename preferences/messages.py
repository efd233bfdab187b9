"""Check the texts and messages of a row, and separate its prompt from the responses."""

from typing import Any

from preferences.pairs import BadRow, Message, count_common_prefix, find_implicit_prompt_end


def split_off_prompt(
    prompt: str | list[Message] | None, responses: list[Any], place: str
) -> tuple[str | list[Message], list[Any]]:
    """Return the prompt, and the responses without it, for each of the row formats in common use."""
    conversations = not isinstance(responses[0], str)
    if prompt is None:
        if len(responses) < 2:
            raise BadRow(
                place, "missing field", "prompt is missing or empty; give the text that was completed"
            )
        length = (count_common_prefix if conversations else find_implicit_prompt_end)(*responses)
        return responses[0][:length], [response[length:] for response in responses]
    if isinstance(prompt, str) and conversations:
        return _find_prompt_in_messages(prompt, responses, place)
    if not isinstance(prompt, str):
        responses = [response if conversations else [_build_answer(response)] for response in responses]
        if all(response[: len(prompt)] == prompt for response in responses):
            responses = [response[len(prompt) :] for response in responses]
    return prompt, responses


def _find_prompt_in_messages(
    prompt: str, responses: list[list[Message]], place: str
) -> tuple[list[Message], list[list[Message]]]:
    """Return the messages of a text prompt beside message lists, and the responses without them.

    The text is the question that the responses answer, or repeats one of the messages that they share.
    """
    if all(len(response) == 1 for response in responses):
        return [{"role": "user", "content": prompt}], responses
    length = count_common_prefix(*responses) if len(responses) > 1 else len(responses[0]) - 1
    if not any(message["content"].strip() == prompt.strip() for message in responses[0][:length]):
        raise BadRow(
            place,
            "two prompts",
            "prompt is not among the messages that chosen and rejected share; data.columns: {prompt: null} "
            "takes the shared messages as the prompt",
        )
    return responses[0][:length], [response[length:] for response in responses]


def _build_answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def check_prompt(prompt: str | list[Message], place: str) -> str | list[Message]:
    """Return the prompt, and refuse one that leaves nothing to answer."""
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


def check_response(response: str | list[Message], field: str, place: str) -> str | list[Message]:
    """Return the response, and refuse any but a text or one assistant message with content or tool calls."""
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


def parse_text_or_messages(value: Any, field: str, place: str) -> str | list[Message]:
    """Return a column's value, and refuse any but text or a list of well-formed messages."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(place, "empty text", f"{field} is missing or empty")
        return value
    if not isinstance(value, list):
        raise BadRow(
            place, "not text", f"{field} must be text or a list of messages, got {describe_value(value)}"
        )
    if not value:
        raise BadRow(place, "empty text", f"{field} is an empty list of messages")
    return [_parse_message(message, f"{field}[{i}]", place) for i, message in enumerate(value)]


def _parse_message(value: Any, field: str, place: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow(
            place, "bad messages", f"{field} must be a message {{role, content}}, got {describe_value(value)}"
        )
    message = {name: part for name, part in value.items() if part is not None}
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise BadRow(
            place,
            "bad messages",
            f"{field} has no role; a message is {{role: user, content: ...}}, got {list(value)}",
        )
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list):  # the content parts of multimodal formats, if all of them are text
        content = _join_text_parts(content)
    if not isinstance(content, str):
        raise BadRow(
            place, "bad messages", f"{field} must have a text as content; images and sound cannot be read"
        )
    return {"role": message.pop("role"), **message, "content": content}


def _join_text_parts(parts: list[Any]) -> str | None:
    """Join content parts; None if one of them is not text."""
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts
    ]
    return None if None in texts else "".join(str(text) for text in texts)


def describe_value(value: Any) -> str:
    """Describe a value of the wrong type for an error message."""
    return f"{type(value).__name__} {str(value)[:40]!r}"
