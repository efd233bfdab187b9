"""Build pairs from one row of a file or data set: map columns to fields, check texts and labels."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

from preferences.config import FIELDS, MAPPED_FIELDS, RowSettings
from preferences.pairs import BadRow, DataError, Pair
from preferences.reading.json_text import JsonError, parse_json
from preferences.reading.labels import Row, compute_soft_label, find_value, parse_number, parse_weight
from preferences.reading.messages import (
    add_system_message,
    check_prompt,
    check_response,
    describe_value,
    parse_text_or_messages,
    split_off_prompt,
)

NO_MISSPELLINGS = ("content", "contents", "rank", "tool", "score")
"""Columns whose names are near a field's and mean something else in data sets."""
_NEAR = 0.88
PAIRWISE = ("chosen", "rejected", "completion", "soft_label", "votes_chosen", "votes_rejected")
"""Fields that a row of ranked completions cannot have."""


def check_columns(names: Iterable[str], place: str, config: RowSettings) -> None:
    """Refuse a column whose name is nearly that of a field which no column has; pass over all others.

    A misspelt `soft_label` would silently train on hard labels. Raises `DataError` even if `on_bad_row` is
    `skip`: the remedy is in the run file, not in a row.
    """
    columns = list(names)
    read = {name for path in _list_paths(config) for name in (path, path.partition(".")[0])}
    missing = [field for field in FIELDS if field not in columns and field not in config.columns]
    for name in columns:
        if (
            name in FIELDS
            or name in read
            or any(fnmatchcase(name, pattern) for pattern in (*NO_MISSPELLINGS, *config.ignore))
        ):
            continue
        field = next((field for field in missing if _is_misspelling(name, field)), None)
        if field is not None:
            raise DataError(
                f"{place}: column {name!r} is nearly {field!r}, and may be meant for it; rename it, say "
                f"data.columns: {{{field}: {name}}}, or do not read it with data.ignore: [{name}]"
            )


def _is_misspelling(name: str, field: str) -> bool:
    """Return whether a column's name is so near to a field's that it may be meant for it."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    if plain.startswith(f"{field}_") or plain.endswith(f"_{field}"):
        return False  # a name with more words than the field's
    return difflib.SequenceMatcher(a=plain, b=field).ratio() >= _NEAR


def list_columns_read(names: Iterable[str], config: RowSettings) -> list[str]:
    """List the columns, of those that there are, from which anything is read."""
    paths = _list_paths(config)
    return [name for name in names if any(p == name or p.startswith(f"{name}.") for p in paths)]


def _list_paths(config: RowSettings) -> list[str]:
    """List the columns, or parts of columns, that the settings read."""
    fields = [get_column(field, config) for field in FIELDS]
    label = () if config.label is None else config.label.columns_read
    return [path for path in (*fields, *label, config.weight) if path is not None]


def get_column(field: str, config: RowSettings) -> str | None:
    """Return the column, or part of one, that holds a field; None if it is not to be read."""
    if config.pair is not None and field in ("chosen", "rejected"):
        return config.pair[field == "rejected"]
    return config.columns.get(field, None if field in MAPPED_FIELDS else field)


@dataclass(frozen=True)
class _RowParts:
    """One row: its fields under their own names, and what all pairs made of it share."""

    row: Row
    fields: dict[str, Any]
    place: str
    config: RowSettings
    tools: list[dict[str, Any]] | None
    system: str | None
    weight: float


def build_pairs(row: Row, place: str, config: RowSettings, *, completions_only: bool) -> list[Pair]:
    """Build the pairs of one row: one, or as many as ranked completions make.

    Raises `BadRow`, naming `place`, the field and the remedy.
    """
    fields = _select_fields(row, place, config)
    if "prompt" in fields and "context" in fields:
        raise BadRow(place, "two prompts", "give prompt or context, not both (data.columns: {context: null})")
    if "context" in fields:
        fields["prompt"] = fields.pop("context")
    parts = _RowParts(
        row=row,
        place=place,
        config=config,
        tools=_parse_tools(fields.pop("tools", None), place),
        system=_parse_system(fields.pop("system", None), place),
        weight=parse_weight(row, config.weight, place),
        fields=_append_input(fields, place),
    )
    if "completions" in fields:
        pairs = _build_ranked_pairs(parts)
    elif "completion" in fields and "chosen" not in fields:
        if not completions_only:
            raise BadRow(
                place,
                "a completion without a rival",
                "prompt and completion train the preset sft only; a preference needs chosen and rejected",
            )
        return [_build_completion(parts)]
    elif completions_only and "chosen" in fields and "rejected" not in fields:
        completion = {**parts.fields, "completion": fields["chosen"]}
        return [_build_completion(replace(parts, fields=completion))]
    else:
        pairs = [_build_pair(parts)]
    if completions_only:
        return _keep_chosen_only(pairs)
    return pairs


def _select_fields(row: Row, place: str, config: RowSettings) -> dict[str, Any]:
    """Return the row's fields under their own names; a null is the same as an absent column."""
    fields = {}
    for field in FIELDS:
        path = get_column(field, config)
        if path is None:
            continue
        if path in row:
            value = row[path]
        elif field in config.columns or (config.pair is not None and field in ("chosen", "rejected")):
            setting = "data.pair" if config.pair is not None and path in config.pair else "data.columns"
            value = find_value(row, path, place, f"{setting} for {field}")
        else:
            continue
        if value is not None:
            fields[field] = value
    return fields


def _append_input(fields: dict[str, Any], place: str) -> dict[str, Any]:
    """Append the `input` of an instruction to the prompt, on a line of its own."""
    addition = fields.pop("input", None)
    if addition is None or addition == "":
        return fields
    if not isinstance(addition, str) or not isinstance(fields.get("prompt"), str):
        raise BadRow(place, "bad input", "input is a text behind a prompt that is a text too")
    return {**fields, "prompt": f"{fields['prompt']}\n{addition}"}


def _build_pair(parts: _RowParts) -> Pair:
    fields, place = parts.fields, parts.place
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
    prompt, responses = add_system_message(parts.system, prompt, responses, place)
    label = compute_soft_label(fields, parts.row, parts.config.label, place)
    if label is None and parts.config.pair is not None:
        raise BadRow(
            place,
            "no label",
            f"neither of {' and '.join(parts.config.pair)} is the better one by name, and the row has no "
            "label: set data.label, or soft_label or votes of the first",
        )
    pair = Pair(
        check_prompt(prompt, place),
        check_response(responses[0], "chosen", place),
        check_response(responses[1], "rejected", place),
        soft_label=1.0 if label is None else label,
        source=place,
        tools=parts.tools,
        weight=parts.weight,
    )
    return _refuse_tools_on_text(pair, place).put_majority_first()


def _build_completion(parts: _RowParts) -> Pair:
    fields, place = parts.fields, parts.place
    completion = parse_text_or_messages(fields["completion"], "completion", place)
    prompt = parse_text_or_messages(fields["prompt"], "prompt", place) if "prompt" in fields else None
    if prompt is None and not isinstance(completion, str):  # a whole conversation
        prompt, completion = completion[:-1], completion[-1:]
    prompt, responses = split_off_prompt(prompt, [completion], place)
    prompt, (completion,) = add_system_message(parts.system, prompt, responses, place)
    pair = Pair(
        check_prompt(prompt, place),
        check_response(completion, "completion", place),
        None,
        source=place,
        tools=parts.tools,
        weight=parts.weight,
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


def _build_ranked_pairs(parts: _RowParts) -> list[Pair]:
    """Pair every two completions (or neighbours in rank), with the better one as `chosen`.

    Completions are listed best first; `ranks` (1 is best) or `scores` (more is better) override that. Two
    completions of equal rank make no pair, and a completion whose rank or score is null is left out.
    """
    fields, place, config = parts.fields, parts.place, parts.config
    for name in PAIRWISE:
        if name in fields:
            raise BadRow(place, "two kinds of row", f"a row of ranked completions cannot also have {name}")
    if config.label is not None:
        raise BadRow(place, "two kinds of row", "a row of ranked completions has no data.label: leave it out")
    completions = _parse_list(fields["completions"], "completions", place)
    ranks = _parse_ranks(fields, completions, place)
    ranked = sorted((rank, i) for i, rank in enumerate(ranks) if rank is not None)
    levels = sorted({rank for rank, _ in ranked})
    pairs = []
    for (best_rank, better), (worst_rank, worse) in combinations(ranked, 2):
        distance = levels.index(worst_rank) - levels.index(best_rank)
        if distance == 0 or (config.ranked_pairs == "adjacent" and distance > 1):
            continue
        both = {"prompt": fields.get("prompt"), "chosen": completions[better], "rejected": completions[worse]}
        present = {name: value for name, value in both.items() if value is not None}
        where = f"{place} (completions {better + 1} and {worse + 1})"
        pairs.append(_build_pair(replace(parts, fields=present, place=where)))
    if not pairs:
        raise BadRow(place, "no ranked pair", "completions must hold at least two of different rank")
    return pairs


def _parse_ranks(fields: dict[str, Any], completions: list[Any], place: str) -> list[float | None]:
    """Return the rank of each completion, the least the best: as ranks say, scores, or the order."""
    given = [name for name in ("ranks", "scores") if name in fields]
    if not given:
        return list(range(len(completions)))
    if len(given) == 2:
        raise BadRow(place, "bad ranks", "ranks and scores both order the completions; keep one of them")
    name, sign = given[0], 1 if given[0] == "ranks" else -1
    ranks = _parse_list(fields[name], name, place)
    if len(ranks) != len(completions):
        raise BadRow(
            place,
            "bad ranks",
            f"{name} has {len(ranks)} entries for {len(completions)} completions; give one for each",
        )
    numbers = [None if rank is None else parse_number(rank) for rank in ranks]
    for rank, number in zip(ranks, numbers, strict=True):
        if rank is not None and number is None:
            raise BadRow(place, "bad ranks", f"{name} must be numbers or null, got {describe_value(rank)}")
    return [None if number is None else sign * number for number in numbers]


def _parse_list(value: Any, field: str, place: str) -> list[Any]:
    """Return the value of a list column; in a CSV file it is written as JSON."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except JsonError as error:
            raise BadRow(
                place, f"bad {field}", f"{field} must be a list, or JSON text of one, and is {error.detail}"
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


def _parse_system(value: Any, place: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise BadRow(place, "bad system", f"system must be a text, got {describe_value(value)}")
    return value or None


def _refuse_tools_on_text(pair: Pair, place: str) -> Pair:
    if pair.tools and not pair.is_chat:
        raise BadRow(
            place, "bad tools", "tools reach the model through the chat template, so prompt must be messages"
        )
    return pair
