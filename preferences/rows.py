"""Build pairs from one row of a file or data set: map columns to fields, check texts and labels."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

from preferences.config import FIELDS, METADATA_COLUMNS, DataConfig, suggest_name
from preferences.labels import compute_soft_label, parse_number
from preferences.messages import (
    check_prompt,
    check_response,
    describe_value,
    parse_text_or_messages,
    split_off_prompt,
)
from preferences.pairs import BadRow, DataError, Pair

Row = Mapping[str, Any]
PAIRWISE = ("chosen", "rejected", "completion", "soft_label", "votes_chosen", "votes_rejected")
"""Fields that a row of ranked completions cannot have."""


def check_columns(names: Iterable[str], place: str, config: DataConfig) -> None:
    """Refuse a column that is neither a field, nor mapped, nor ignored.

    Raises `DataError` even if `on_bad_row` is `skip`: the remedy is in the run file, not in a row.
    """
    read = {get_column(field, config) for field in FIELDS}
    switched_off = {field for field in FIELDS if field in config.columns and config.columns[field] is None}
    ignored = METADATA_COLUMNS + config.ignore
    unknown = [
        name
        for name in names
        if name not in read
        and name not in switched_off
        and not any(fnmatchcase(name, pattern) for pattern in ignored)
    ]
    if unknown:
        one = unknown[0]
        raise DataError(
            f"{place}: unknown column{'s' if len(unknown) > 1 else ''} "
            f"{', '.join(repr(name) for name in unknown)}{suggest_name(one, FIELDS)}; say which field it "
            f"holds with data.columns: {{<field>: {one}}} (fields: {', '.join(FIELDS)}), or do not read it "
            f"with data.ignore: [{', '.join(unknown)}]"
        )


def get_column(field: str, config: DataConfig) -> str | None:
    """Return the column that holds a field; None if it is not to be read."""
    return config.columns.get(field, field)


def build_pairs(row: Row, place: str, config: DataConfig, *, completions_only: bool) -> list[Pair]:
    """Build the pairs of one row: one, or as many as ranked completions make.

    Raises `BadRow`, naming `place`, the field and the remedy.
    """
    fields = _select_fields(row, place, config)
    tools = _parse_tools(fields.pop("tools", None), place)
    if "prompt" in fields and "context" in fields:
        raise BadRow(place, "two prompts", "give prompt or context, not both (data.columns: {context: null})")
    if "context" in fields:
        fields["prompt"] = fields.pop("context")
    if "completions" in fields:
        pairs = _build_ranked_pairs(fields, place, config, tools)
    elif "completion" in fields and "chosen" not in fields:
        if not completions_only:
            raise BadRow(
                place,
                "a completion without a rival",
                "prompt and completion train the preset sft only; a preference needs chosen and rejected",
            )
        return [_build_completion(fields, place, tools)]
    elif completions_only and "chosen" in fields and "rejected" not in fields:
        return [_build_completion({**fields, "completion": fields["chosen"]}, place, tools)]
    else:
        pairs = [_build_pair(fields, place, tools)]
    if completions_only:
        return _keep_chosen_only(pairs)
    return pairs


def _select_fields(row: Row, place: str, config: DataConfig) -> dict[str, Any]:
    """Return the row's fields under their own names; a null is the same as an absent column."""
    fields = {}
    for field in FIELDS:
        column = get_column(field, config)
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
                f"{suggest_name(column, list(row))}; it has {', '.join(map(repr, row)) or 'none'}",
            )
    return fields


def _build_pair(fields: dict[str, Any], place: str, tools: list[dict[str, Any]] | None) -> Pair:
    for field in ("chosen", "rejected"):
        if field not in fields:
            raise BadRow(
                place,
                "missing field",
                f"{field} is missing or empty; if another column holds it, set data.columns: "
                f"{{{field}: <column>}}",
            )
    chosen, rejected = (parse_text_or_messages(fields[name], name, place) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(
            place, "text and messages mixed", "chosen and rejected must both be text or both message lists"
        )
    if chosen == rejected:
        raise BadRow(
            place, "chosen equals rejected", "chosen and rejected are the same, so there is no preference"
        )
    prompt = parse_text_or_messages(fields["prompt"], "prompt", place) if "prompt" in fields else None
    prompt, responses = split_off_prompt(prompt, [chosen, rejected], place)
    pair = Pair(
        check_prompt(prompt, place),
        check_response(responses[0], "chosen", place),
        check_response(responses[1], "rejected", place),
        soft_label=compute_soft_label(fields, place),
        source=place,
        tools=tools,
    )
    return _refuse_tools_on_text(pair, place).put_majority_first()


def _build_completion(fields: dict[str, Any], place: str, tools: list[dict[str, Any]] | None) -> Pair:
    completion = parse_text_or_messages(fields["completion"], "completion", place)
    prompt = parse_text_or_messages(fields["prompt"], "prompt", place) if "prompt" in fields else None
    if prompt is None and not isinstance(completion, str):  # a whole conversation
        prompt, completion = completion[:-1], completion[-1:]
    prompt, (completion,) = split_off_prompt(prompt, [completion], place)
    pair = Pair(
        check_prompt(prompt, place),
        check_response(completion, "completion", place),
        None,
        source=place,
        tools=tools,
    )
    return _refuse_tools_on_text(pair, place)


def _keep_chosen_only(pairs: list[Pair]) -> list[Pair]:
    """Return the preferred responses of one row without `rejected`, each once."""
    completions: list[Pair] = []
    for pair in pairs:
        completion = replace(pair, rejected=None, soft_label=1.0)
        if all(completion.chosen != other.chosen for other in completions):
            completions.append(completion)
    return completions


def _build_ranked_pairs(
    fields: dict[str, Any], place: str, config: DataConfig, tools: list[dict[str, Any]] | None
) -> list[Pair]:
    """Pair every two completions (or neighbours in rank), with the better one as `chosen`.

    Completions are listed best first; a `ranks` column (1 is best) overrides that. Two completions of equal
    rank make no pair, and a completion whose rank is null is left out.
    """
    for name in PAIRWISE:
        if name in fields:
            raise BadRow(place, "two kinds of row", f"a row of ranked completions cannot also have {name}")
    completions = _parse_list(fields["completions"], "completions", place)
    ranks = _parse_ranks(fields, completions, place)
    order = sorted((i for i, rank in enumerate(ranks) if rank is not None), key=lambda i: (ranks[i], i))
    levels = sorted({ranks[i] for i in order})
    pairs = []
    for better, worse in combinations(order, 2):
        distance = levels.index(ranks[worse]) - levels.index(ranks[better])
        if distance == 0 or (config.ranked_pairs == "adjacent" and distance > 1):
            continue
        both = {"prompt": fields.get("prompt"), "chosen": completions[better], "rejected": completions[worse]}
        where = f"{place} (completions {better + 1} and {worse + 1})"
        pairs.append(
            _build_pair({name: value for name, value in both.items() if value is not None}, where, tools)
        )
    if not pairs:
        raise BadRow(place, "no ranked pair", "completions must hold at least two of different rank")
    return pairs


def _parse_ranks(fields: dict[str, Any], completions: list[Any], place: str) -> list[Any]:
    if "ranks" not in fields:
        return list(range(len(completions)))
    ranks = _parse_list(fields["ranks"], "ranks", place)
    if len(ranks) != len(completions):
        raise BadRow(
            place,
            "bad ranks",
            f"ranks has {len(ranks)} entries for {len(completions)} completions; give one for each",
        )
    for rank in ranks:
        if rank is not None and parse_number(rank) is None:
            raise BadRow(place, "bad ranks", f"ranks must be numbers, 1 the best, or null, got {rank!r}")
    return [None if rank is None else parse_number(rank) for rank in ranks]


def _parse_list(value: Any, field: str, place: str) -> list[Any]:
    """Return the value of a list column; in a CSV file it is written as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(
                place, f"bad {field}", f"{field} must be a list, or JSON text of one ({error})"
            ) from None
    if not isinstance(value, list):
        raise BadRow(place, f"bad {field}", f"{field} must be a list, got {describe_value(value)}")
    return value


def _parse_tools(value: Any, place: str) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    tools = _parse_list(value, "tools", place)
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(place, "bad tools", "tools must be a list of JSON schemas, one object for each tool")
    return tools or None


def _refuse_tools_on_text(pair: Pair, place: str) -> Pair:
    if pair.tools and not pair.is_chat:
        raise BadRow(
            place, "bad tools", "tools reach the model through the chat template, so prompt must be messages"
        )
    return pair
