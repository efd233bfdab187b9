"""Check the texts and messages of a row, and separate its prompt from the responses."""

from typing import Any

from preferences.pairs import BadRow, Message, count_common_prefix, find_implicit_prompt_end

TOOL_ROLES = ("tool", "function", "ipython")
"""Roles of what a tool answers, as chat templates have them."""
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Roles of ShareGPT's messages, by what it calls them where that differs."""


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


def add_system_message(
    system: str | None, prompt: str | list[Message], responses: list[Any], place: str
) -> tuple[str | list[Message], list[Any]]:
    """Put a row's system text before its conversation; a prompt that is a text becomes the user's message."""
    if system is None:
        return prompt, responses
    message = {"role": "system", "content": system}
    if isinstance(prompt, str):
        return [message, {"role": "user", "content": prompt}], [[_build_answer(text)] for text in responses]
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"] != system:
            raise BadRow(
                place,
                "two system messages",
                "the row has a system text and its prompt another; data.columns: {system: null} keeps the "
                "prompt's",
            )
        return prompt, responses
    return [message, *prompt], responses


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
    """Return the response, and refuse any but a text, or turns of the assistant and of its tools."""
    if isinstance(response, str):
        if not response.strip():
            raise BadRow(place, "empty response", f"{field} is empty after the prompt")
        return response
    others = {message["role"] for message in response} - {"assistant", *TOOL_ROLES}
    if len(response) != 1 and (not response or others or response[0]["role"] != "assistant"):
        raise BadRow(
            place,
            "bad messages",
            f"{field} has {len(response)} messages after the prompt; the loss is on the turns of the "
            "assistant and its tools, so the turns before them must be the same in chosen and rejected",
        )
    if response[-1]["role"] != "assistant":
        raise BadRow(
            place,
            "bad messages",
            f"the last message of {field} must be from assistant, got {response[-1]['role']!r}",
        )
    if any(
        message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls")
        for message in response
    ):
        raise BadRow(place, "empty response", f"a message of the assistant in {field} is empty")
    return response


def parse_text_or_messages(value: Any, field: str, place: str) -> str | list[Message]:
    """Return a column's value, and refuse any but text, a message, or a list of well-formed messages."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(place, "empty text", f"{field} is missing or empty")
        return value
    if isinstance(value, dict):
        return [_parse_message(value, field, place)]
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
    if "from" in message and "role" not in message:  # ShareGPT's form
        role = str(message.pop("from"))
        message = {"role": SHAREGPT_ROLES.get(role, role), "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise BadRow(
            place,
            "bad messages",
            f"{field} has no role; a message is {{role: user, content: ...}}, got {list(value)}",
        )
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list):  # the content parts of multimodal formats, if all of them are text
        content = _join_text_parts(content, field, place)
    if not isinstance(content, str):
        raise BadRow(
            place, "bad messages", f"{field} must have a text as content, got {describe_value(content)}"
        )
    return {"role": message.pop("role"), **message, "content": content}


def _join_text_parts(parts: list[Any], field: str, place: str) -> str:
    """Join content parts, and refuse those that are not text by their type."""
    texts = []
    for part in parts:
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(
                place,
                "not text",
                f"{field} has content of type {kind or type(part).__name__}, and polyref reads text only",
            )
        texts.append(part["text"])
    return "".join(texts)


def describe_value(value: Any) -> str:
    """Describe a value of the wrong type for an error message."""
    return f"{type(value).__name__} {str(value)[:40]!r}"
