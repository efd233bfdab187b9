"""Understand the columns of a source: what they are known to mean, or the question that they leave open."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from preferences.config import LABEL_FIELDS, SourceConfig
from preferences.pairs import DataError
from preferences.reading.labels import parse_number
from preferences.reading.layouts import LAYOUTS, PROMPT_NAMES, Layout
from preferences.reading.sources import read_sample

Row = Mapping[str, Any]
SAMPLE_ROWS = 100
"""Rows that are looked at."""
_SIDES = re.compile(r"^(.*?)[ _-]?(a|b|A|B|0|1|2)$")
_TELLING = re.compile(r"winner|prefer|better|choice|label|strength|rank|score|rating|vote", re.I)
_MOST_CANDIDATES = 4


@dataclass(frozen=True)
class Understanding:
    """How a source is read: its settings, completed, and the `data:` section that says what was added.

    `text` is empty where field names say everything.
    """

    source: SourceConfig
    text: str = ""


def understand_source(source: SourceConfig) -> Understanding:
    """Look at the first rows of a source, and complete its settings with what its columns are known to mean.

    Raises:
        DataError: the source cannot be read, or which response is the better one would be a guess.
    """
    sample = read_sample(source, SAMPLE_ROWS)
    columns = list(dict.fromkeys(name for row in sample for name in row))
    return understand_rows(source, columns, sample)


def understand_rows(source: SourceConfig, columns: Sequence[str], sample: Sequence[Row]) -> Understanding:
    """Complete the settings of a source with what its columns are known to mean.

    Args:
        source: the settings, which are never changed where they say something.
        columns: all columns of the source, or those of the sample.
        sample: some of its rows.

    Raises:
        DataError: which response is the better one would be a guess; the message has the lines to choose.
    """
    layout = next((known for known in LAYOUTS if known.columns <= set(columns)), None)
    if layout is not None and layout.refusal and not (source.columns or source.pair):
        raise DataError(f"{source.source}: read as {layout.name}: {layout.refusal}")
    if layout is not None and layout.question and _lacks_label(source, columns):
        raise _ask_for_label(source, layout.name, list(layout.question), layout.settings.get("pair"))
    added = _list_additions(source, layout, columns, sample)
    completed = source.model_copy(
        update={
            name: {**value, **source.columns} if name == "columns" else _parse_setting(name, value)
            for name, value in added.items()
        }
    )
    _refuse_nameless_winner(completed, layout, columns, sample)
    return Understanding(completed, _format_text(added, layout, completed))


def _lacks_label(source: SourceConfig, columns: Sequence[str]) -> bool:
    named = [source.columns.get(field, field) for field in LABEL_FIELDS]
    return source.label is None and not any(name in columns for name in named if name is not None)


def _parse_setting(name: str, value: Any) -> Any:
    """Return a setting of a layout as the settings hold it."""
    return getattr(SourceConfig.model_validate({"source": "-", name: value}), name)


def _list_additions(
    source: SourceConfig, layout: Layout | None, columns: Sequence[str], sample: Sequence[Row]
) -> dict[str, Any]:
    """List the settings that are added to the user's."""
    settings = dict(layout.settings) if layout is not None else {}
    added: dict[str, Any] = {}
    by_name = {"chosen", "rejected"} <= set(columns)  # which says who won
    names_responses = by_name or bool({"chosen", "rejected", "completions"} & set(source.columns))
    if source.pair is None and not names_responses and "pair" in settings:
        added["pair"] = settings["pair"]
    pair = added.get("pair") or (list(source.pair) if source.pair else None)
    if "label" in settings and pair == settings.get("pair") and _lacks_label(source, columns):
        added["label"] = settings["label"]
    own = settings.get("columns", {}) if layout is not None else _find_prompt(source, columns, sample)
    extra = {
        field: path
        for field, path in own.items()
        if field not in source.columns and (field not in columns or path.partition(".")[0] == field)
    }
    if extra and not (names_responses and {"completions"} & set(extra)):
        added["columns"] = extra
    return added


def _find_prompt(source: SourceConfig, columns: Sequence[str], sample: Sequence[Row]) -> dict[str, str]:
    """Find the column of the prompt beside chosen and rejected, if none is called so."""
    has_prompt = {"prompt", "context"} & (set(columns) | set(source.columns))
    if has_prompt or not ({"chosen", "rejected"} <= set(columns) or source.pair or source.columns):
        return {}
    name = next((name for name in PROMPT_NAMES if name in columns), None)
    if name is None or not all(isinstance(row.get(name), str | list) for row in sample):
        return {}
    has_input = name == "instruction" and "input" in columns
    return {"prompt": name} | ({"input": "input"} if has_input else {})


# ---- who won ----


def _refuse_nameless_winner(
    source: SourceConfig, layout: Layout | None, columns: Sequence[str], sample: Sequence[Row]
) -> None:
    """Refuse responses of which neither is the better one by name, without a label."""
    pair = source.pair or _find_nameless_pair(source, columns)
    if pair is None or not _lacks_label(source, columns):
        return
    known = [label for label in [layout.settings.get("label")] if label] if layout is not None else []
    known += list(layout.alternatives) if layout is not None else []
    candidates = known or list(_propose_labels(pair, columns, sample))[:_MOST_CANDIDATES]
    raise _ask_for_label(source, None, candidates, None if source.pair else pair)


def _find_nameless_pair(source: SourceConfig, columns: Sequence[str]) -> tuple[str, str] | None:
    """Find two columns that hold the responses and differ by a number or a letter at their end only."""
    mapped = [source.columns.get(side) for side in ("chosen", "rejected")]
    if all(mapped):
        names = [str(name) for name in mapped]
        stems = {found[1] for name in names if (found := _SIDES.match(name)) is not None}
        is_nameless = len(stems) == 1 and all(_SIDES.match(name) for name in names)
        return (names[0], names[1]) if is_nameless else None
    if any(mapped) or {"chosen", "rejected", "completions", "completion"} & set(columns):
        return None
    for first, second in pairwise(columns):
        one, two = _SIDES.match(first), _SIDES.match(second)
        if one and two and one[1] == two[1] and re.search("response|answer|completion|output", one[1], re.I):
            return first, second
    return None


def _propose_labels(
    pair: Sequence[str], columns: Sequence[str], sample: Sequence[Row]
) -> Iterator[dict[str, Any]]:
    """Propose labels from the columns that may tell which response is better."""
    telling = [name for name in columns if _TELLING.search(name) and name not in pair]
    for first, second in pairwise(telling):
        one, two = _SIDES.match(first), _SIDES.match(second)
        if one and two and one[1] == two[1]:
            yield {"type": "scores", "columns": [first, second], "temperature": 1.0}
    for name in telling:
        values = [row[name] for row in sample if row.get(name) is not None]
        if not values or any(isinstance(value, list | dict) for value in values):
            continue
        numbers = [parse_number(value) for value in values]
        if all(number is not None for number in numbers) and min(n for n in numbers if n is not None) < 0:
            reach = max(abs(number) for number in numbers if number is not None)
            for side in ("second", "first"):
                yield {"type": "strength", "column": name, "range": [-reach, reach], "prefers": side}
        elif 2 <= len(different := sorted(set(map(str, values)))) <= 4:
            first, second, *ties = sorted(different, key=lambda value: "tie" in value)
            yield _describe_winner(name, first, second, ties)
            yield _describe_winner(name, second, first, ties)


def _describe_winner(column: str, first: str, second: str, ties: list[str]) -> dict[str, Any]:
    label: dict[str, Any] = {"type": "winner", "column": column, "first": first, "second": second}
    return label | ({"tie": ties} if ties else {})


def _ask_for_label(
    source: SourceConfig, name: str | None, candidates: list[Any], pair: Sequence[str] | None
) -> DataError:
    """Make the error that asks which response is the better one, with lines to copy."""
    which = f"read as {name}, " if name else ""
    lines = [f"pair: {_to_yaml(list(pair))}"] if pair else []
    shown = [f"label: {_to_yaml(candidate)}" for candidate in candidates] or [
        "label: {type: winner, column: ..., first: ..., second: ...}"
    ]
    shown.append("label: {type: first}   # the first response is always the better one")
    choices = "\n  ".join([*lines, *shown])
    return DataError(
        f"{source.source}: {which}the columns of the responses do not say which one people preferred. Say it "
        f"in the data section with one of these labels"
        f"{', and the pair' if lines else ''}:\n  {choices}"
    )


def _format_text(added: Mapping[str, Any], layout: Layout | None, source: SourceConfig) -> str:
    lines = [f"  {name}: {_to_yaml(value)}" for name, value in added.items()]
    if (layout is not None and source.label is None) or added.get("label"):
        alternatives = layout.alternatives if layout is not None else ()
        lines += [f"  # label: {_to_yaml(label)}" for label in alternatives]
    return "\n".join(["data:", *lines]) if lines else ""


def _to_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).strip()
