"""Labels of a search's points, metrics and trials: the fields that vary, their short names and values."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.config.sections import KL_PREFIX
from orchestrator.search.journal import TrialRecord

FAMILY, BETA = "loss.preset", "loss.beta"
ABSENT = "–"
_LOG_RATIO = 20.0  # largest over smallest number, from which a scale is logarithmic
_ALIASES = {"learning_rate": "lr"}  # the usual abbreviation
_SILENT = ("preset", "type", "use")  # last parts of a field that say less than the part before them


def find_varied_fields(points: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the fields whose values differ between the points as drawn; absence is a value."""
    points = list(points)
    fields = dict.fromkeys(field for point in points for field in point)
    return [field for field in fields if len({repr(point.get(field, ABSENT)) for point in points}) > 1]


def flatten_point(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return every field by its dotted name, also those of a section that was set as a whole."""
    fields: dict[str, Any] = {}
    for field, value in point.items():
        if isinstance(value, Mapping):
            fields |= flatten_point({f"{field}.{part}": item for part, item in value.items()})
        else:
            fields[field] = value
    return fields


def list_shown_fields(records: Iterable[TrialRecord]) -> list[str]:
    """Return the fields that a search's points differ in, or controls from them in loss and beta."""
    records = list(records)
    fields = find_varied_fields(
        flatten_point(record.point) for record in records if record.control_of is None
    )
    varied = find_varied_fields(flatten_point(record.point) for record in records)
    return [field for field in (FAMILY, BETA) if field in varied and field not in fields] + fields


def shorten_field_names(fields: Sequence[str]) -> dict[str, str]:
    """Shorten each dotted field to its last part, or to as many parts as distinguish it from the others.

    `loss.dispersion.type` is `dispersion`, `references.use` is `references`, `loss.preset` is `loss`.
    """
    parts = {field: _drop_silent_part(field.split(".")) for field in fields}
    names = {}
    for field, path in parts.items():
        others = [other for name, other in parts.items() if name != field]
        length = next(
            (
                n
                for n in range(1, len(path))
                if len(path[-n]) > 2 and all(path[-n:] != o[-n:] for o in others)
            ),
            len(path),
        )
        name = ".".join(path[-length:])
        names[field] = _ALIASES.get(name, name)
    return names


def format_value(value: Any) -> str:
    """Format a drawn value shortly: 1e-6, base+sft, none."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        number = f"{value:.3g}"
        mantissa, e, exponent = number.partition("e")
        return f"{mantissa}e{int(exponent)}" if e else number
    if isinstance(value, list | tuple):
        return "+".join(map(format_value, value))
    return str(value)


def describe_point(point: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Describe a point by its fields in `names` that are set: `gdpo, beta 0.2, lr 5e-6`."""
    values = flatten_point(point)
    items = [(field, name, format_value(values.get(field))) for field, name in names.items()]
    items = [item for item in items if item[2] != format_value(None)]
    return ", ".join(value if field == FAMILY else f"{name} {value}" for field, name, value in items)


def is_number(value: Any) -> bool:
    """Whether a drawn value lies on a scale of numbers; booleans do not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def spans_decades(values: Sequence[float]) -> bool:
    """Whether numbers span more than a linear scale can show."""
    return min(values) > 0 and max(values) / min(values) >= _LOG_RATIO


def format_metric_name(metric: str) -> str:
    """Format a metric's key for people: `accuracy`, `KL to base`, `margin at KL`."""
    if metric.startswith(KL_PREFIX):
        return f"KL to {metric.removeprefix(KL_PREFIX)}"
    name = metric.removeprefix("eval/").replace("_", " ")
    return {"margin at kl": "margin at KL", "reward at kl": "reward at KL"}.get(name, name)


def loss_family(record: TrialRecord) -> str:
    """Return the loss that a trial drew; the trials of a search that draws none are one family."""
    return str(record.point.get(FAMILY, "the run file's loss"))


def read_result(record: TrialRecord, metric: str) -> float | None:
    """Return the metric of a trial that ended; None if the trial failed or the value is not finite."""
    value = record.result.get(metric) if record.status in ("finished", "stopped") else None
    return value if value is not None and math.isfinite(value) else None


def format_trial_numbers(records: Iterable[TrialRecord]) -> str:
    """Format trial numbers, consecutive ones as a range: `4–6`, `4, 9`."""
    spans: list[list[int]] = []
    for number in sorted(record.number for record in records):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)


def format_trials(records: Sequence[TrialRecord]) -> str:
    """Format trials by number: `trial 4`, `trials 4–6`."""
    return f"trial{'s' if len(records) > 1 else ''} {format_trial_numbers(records)}"


def find_kl_metric(records: Iterable[TrialRecord], primary: str | None) -> str | None:
    """Return the key of the policy's divergence from `primary`, if any trial measured it.

    Without `primary` it is that of the only reference measured, or None if there are several.
    """
    measured = {key for record in records for key in record.result if key.startswith(KL_PREFIX)}
    if primary is not None:
        return KL_PREFIX + primary if KL_PREFIX + primary in measured else None
    return measured.pop() if len(measured) == 1 else None


def _drop_silent_part(parts: list[str]) -> list[str]:
    return parts[:-1] if len(parts) > 1 and parts[-1] in _SILENT else parts
