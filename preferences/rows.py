"""One row of a file or data set, as it was written, becomes pairs: columns named, texts and labels checked."""

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

from preferences.config import FIELDS, METADATA_COLUMNS, DataConfig, did_you_mean
from preferences.labels import number, soft_label
from preferences.pairs import BadRow, DataError, Message, Pair, shared_length, shared_text

Row = Mapping[str, Any]


def check_columns(names: Iterable[str], place: str, config: DataConfig) -> None:
    """Refuse a column that is neither a field, nor mapped, nor ignored.

    Stops whatever `on_bad_row` says: the remedy is in the run file, not in a row.
    """
    read = {column_of(field, config) for field in FIELDS}
    switched_off = {field for field in FIELDS if field in config.columns and config.columns[field] is None}
    passed_over = METADATA_COLUMNS + config.ignore
    unknown = [
        name
        for name in names
        if name not in read
        and name not in switched_off
        and not any(fnmatchcase(name, pattern) for pattern in passed_over)
    ]
    if unknown:
        one = unknown[0]
        raise DataError(
            f"{place}: unknown column{'s' if len(unknown) > 1 else ''} "
            f"{', '.join(repr(name) for name in unknown)}{did_you_mean(one, FIELDS)}; say which field it holds with "
            f"data.columns: {{<field>: {one}}} (fields: {', '.join(FIELDS)}), or do not read it with "
            f"data.ignore: [{', '.join(unknown)}]"
        )


def column_of(field: str, config: DataConfig) -> str | None:
    """The column that holds a field; None when it is not to be read."""
    return config.columns.get(field, field)


def pairs_of(row: Row, place: str, config: DataConfig, *, completions_only: bool) -> list[Pair]:
    """The pairs of one row: one, or as many as ranked completions make.

    Raises `BadRow`, naming `place`, the field and the remedy.
    """
    fields = _named(row, place, config)
    tools = _tools(fields.pop("tools", None), place)
    if "prompt" in fields and "context" in fields:
        raise BadRow(place, "two prompts", "give prompt or context, not both (data.columns: {context: null})")
    if "context" in fields:
        fields["prompt"] = fields.pop("context")
    if "completions" in fields:
        pairs = _ranked(fields, place, config, tools)
    elif "completion" in fields and "chosen" not in fields:
        if not completions_only:
            raise BadRow(
                place,
                "a completion without a rival",
                "a row of prompt and completion trains the preset sft only; a preference needs chosen and rejected",
            )
        return [_completion(fields, place, tools)]
    elif completions_only and "chosen" in fields and "rejected" not in fields:
        return [_completion({**fields, "completion": fields["chosen"]}, place, tools)]
    else:
        pairs = [_pair(fields, place, tools)]
    if completions_only:
        return _chosen_alone(pairs)
    return pairs


def _named(row: Row, place: str, config: DataConfig) -> dict[str, Any]:
    """The row's fields under their own names; a null is the same as an absent column."""
    fields = {}
    for field in FIELDS:
        column = column_of(field, config)
        if column is None:
            continue
        if column in row:
            if row[column] is not None:
                fields[field] = row[column]
        elif field in config.columns:
            raise BadRow(
                place,
                "missing field",
                f"data.columns reads {field} from column {column!r}, which the row does not have"
                f"{did_you_mean(column, list(row))}; it has {', '.join(map(repr, row)) or 'none'}",
            )
    return fields


def _pair(fields: dict[str, Any], place: str, tools: list[dict[str, Any]] | None) -> Pair:
    for field in ("chosen", "rejected"):
        if field not in fields:
            raise BadRow(
                place,
                "missing field",
                f"{field} is missing or empty; if another column holds it, say data.columns: {{{field}: <column>}}",
            )
    chosen, rejected = (_text_or_messages(fields[name], name, place) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(place, "text and messages mixed", "chosen and rejected must both be text or both message lists")
    if chosen == rejected:
        raise BadRow(place, "chosen equals rejected", "chosen and rejected are the same, so there is no preference")
    prompt = _prompt(fields.get("prompt"), place)
    prompt, responses = _split_off_prompt(prompt, [chosen, rejected], place)
    pair = Pair(
        _checked_prompt(prompt, place),
        *(_response(response, name, place) for response, name in zip(responses, ("chosen", "rejected"), strict=True)),
        soft_label=soft_label(fields, place),
        source=place,
        tools=tools,
    )
    return _tools_need_messages(pair, place).majority_first()


def _completion(fields: dict[str, Any], place: str, tools: list[dict[str, Any]] | None) -> Pair:
    completion = _text_or_messages(fields["completion"], "completion", place)
    prompt = _prompt(fields.get("prompt"), place)
    if prompt is None and not isinstance(completion, str):
        prompt, completion = completion[:-1], completion[-1:]  # a whole conversation: its last turn is trained on
    prompt, (completion,) = _split_off_prompt(prompt, [completion], place)
    pair = Pair(
        _checked_prompt(prompt, place), _response(completion, "completion", place), None, source=place, tools=tools
    )
    return _tools_need_messages(pair, place)


def _chosen_alone(pairs: list[Pair]) -> list[Pair]:
    """The preferred responses of one row, each once."""
    kept: list[Pair] = []
    for pair in pairs:
        alone = Pair(
            pair.prompt, pair.chosen, None, source=pair.source, tools=pair.tools, turned_round=pair.turned_round
        )
        if all(alone.chosen != other.chosen for other in kept):
            kept.append(alone)
    return kept


def _ranked(
    fields: dict[str, Any], place: str, config: DataConfig, tools: list[dict[str, Any]] | None
) -> list[Pair]:
    """Every two completions (or neighbours in rank) as a pair, the better one chosen.

    Completions stand best first; a `ranks` column (1 is best) overrides that. Two completions of equal rank
    make no pair, and a completion whose rank is null is left out.
    """
    surplus = [name for name in ("chosen", "rejected", "completion", "soft_label", "votes_chosen") if name in fields]
    if surplus:
        raise BadRow(place, "two kinds of row", f"a row of ranked completions cannot also have {surplus[0]}")
    completions = _from_json(fields["completions"], "completions", place)
    ranks = _ranks(fields, completions, place)
    order = sorted((i for i, rank in enumerate(ranks) if rank is not None), key=lambda i: (ranks[i], i))
    levels = sorted({ranks[i] for i in order})
    pairs = []
    for better, worse in combinations(order, 2):
        apart = levels.index(ranks[worse]) - levels.index(ranks[better])
        if apart == 0 or (config.ranked_pairs == "adjacent" and apart > 1):
            continue
        both = {"prompt": fields.get("prompt"), "chosen": completions[better], "rejected": completions[worse]}
        where = f"{place} (completions {better + 1} and {worse + 1})"
        pairs.append(_pair({name: value for name, value in both.items() if value is not None}, where, tools))
    if not pairs:
        raise BadRow(place, "no ranked pair", "completions must hold at least two of different rank")
    return pairs


def _ranks(fields: dict[str, Any], completions: list[Any], place: str) -> list[Any]:
    if "ranks" not in fields:
        return list(range(len(completions)))
    ranks = _from_json(fields["ranks"], "ranks", place)
    if len(ranks) != len(completions):
        raise BadRow(
            place, "bad ranks", f"ranks has {len(ranks)} entries for {len(completions)} completions; give one for each"
        )
    for rank in ranks:
        if rank is not None and number(rank) is None:
            raise BadRow(place, "bad ranks", f"ranks must be numbers, 1 the best, or null, got {rank!r}")
    return [None if rank is None else number(rank) for rank in ranks]


def _from_json(value: Any, field: str, place: str) -> list[Any]:
    """A list column; in a CSV file it is written as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(place, f"bad {field}", f"{field} must be a list, or JSON text of one ({error})") from None
    if not isinstance(value, list):
        raise BadRow(place, f"bad {field}", f"{field} must be a list, got {_kind(value)}")
    return value


def _tools(value: Any, place: str) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    tools = _from_json(value, "tools", place)
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(place, "bad tools", "tools must be a list of JSON schemas, one object for each tool")
    return tools or None


def _tools_need_messages(pair: Pair, place: str) -> Pair:
    if pair.tools and not pair.is_chat:
        raise BadRow(place, "bad tools", "tools reach the model through the chat template, so prompt must be messages")
    return pair


def _prompt(value: Any, place: str) -> str | list[Message] | None:
    return None if value is None else _text_or_messages(value, "prompt", place)


def _split_off_prompt(
    prompt: str | list[Message] | None, responses: list[Any], place: str
) -> tuple[str | list[Message], list[Any]]:
    """The prompt, and the responses without it, whichever of the ecosystem's ways the row was written in."""
    conversations = not isinstance(responses[0], str)
    if prompt is None:
        if len(responses) < 2:
            raise BadRow(place, "missing field", "prompt is missing or empty; give the text that was completed")
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


def _checked_prompt(prompt: str | list[Message], place: str) -> str | list[Message]:
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
            place, "bad messages", "the prompt ends with an assistant message; end it with what is to be answered"
        )
    elif prompt[-1]["role"] == "user" and not prompt[-1]["content"].strip():
        raise BadRow(place, "no prompt", "the last message of the prompt is empty")
    return prompt


def _response(response: str | list[Message], field: str, place: str) -> str | list[Message]:
    if isinstance(response, str):
        if not response.strip():
            raise BadRow(place, "empty response", f"{field} is empty after the prompt")
        return response
    if len(response) != 1:
        raise BadRow(
            place,
            "bad messages",
            f"{field} has {len(response)} messages after the prompt; the loss is on one final assistant message, so "
            "the turns before it must be the same in chosen and rejected",
        )
    if response[0]["role"] != "assistant":
        raise BadRow(
            place, "bad messages", f"the last message of {field} must be from assistant, got {response[0]['role']!r}"
        )
    if not response[0]["content"].strip() and not response[0].get("tool_calls"):
        raise BadRow(place, "empty response", f"the last message of {field} is empty")
    return response


def _text_or_messages(value: Any, field: str, place: str) -> str | list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(place, "empty text", f"{field} is missing or empty")
        return value
    if not isinstance(value, list):
        raise BadRow(place, "not text", f"{field} must be text or a list of messages, got {_kind(value)}")
    if not value:
        raise BadRow(place, "empty text", f"{field} is an empty list of messages")
    return [_message(message, f"{field}[{i}]", place) for i, message in enumerate(value)]


def _message(value: Any, field: str, place: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow(place, "bad messages", f"{field} must be a message {{role, content}}, got {_kind(value)}")
    message = {name: part for name, part in value.items() if part is not None}
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise BadRow(
            place, "bad messages", f"{field} has no role; a message is {{role: user, content: ...}}, got {list(value)}"
        )
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list):  # the content parts of multimodal formats, when all of them are text
        content = _joined(content)
    if not isinstance(content, str):
        raise BadRow(place, "bad messages", f"{field} must have a text as content; images and sound cannot be read")
    return {"role": message.pop("role"), **message, "content": content}


def _joined(parts: list[Any]) -> str | None:
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    return None if None in texts else "".join(str(text) for text in texts)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
