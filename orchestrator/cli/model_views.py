"""How `polyref models` shows versions to people: a screen of 80 columns and more, no line wrapped.

Programs get tab-separated lines or JSON instead, from `orchestrator.cli.models`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from orchestrator.config.sections import METRICS
from orchestrator.registry.aliases import (
    EVAL_DIGEST_TAG,
    NO_PRIMARY,
    PIN_PREFIX,
    PRIMARY_TAG,
    REFERENCE_PREFIX,
)
from orchestrator.registry.changed_settings import list_changed_settings, list_default_params
from orchestrator.registry.display import (
    INTERVAL,
    format_measurement,
    shorten_metric_name,
    shorten_source_name,
)
from orchestrator.registry.lineage import Lineage
from orchestrator.registry.versions import ADAPTER_DIGEST_TAG, DIGEST_TAG, shorten_digest
from orchestrator.tracking.mlflow import to_metric_key

_NO_VALUE = "-"
_GAP, _MIN_WIDTH = "  ", 6
_UNITS = ((365 * 86400, "y"), (30 * 86400, "mo"), (86400, "d"), (3600, "h"), (60, "min"))
_UNIMPORTANT = ("name", "storage_path", "tracking.", "placement.")
"""Settings whose difference between two runs changes no result."""


@dataclass(frozen=True)
class Measurement:
    """A metric of a version: its value, and half of its 95 % interval if that was measured."""

    metric: str
    value: float
    interval: float | None = None

    def __str__(self) -> str:
        return format_measurement(self.value, self.interval)


@dataclass(frozen=True, kw_only=True)
class VersionView:
    """What is shown of a version.

    Attributes:
        created: seconds since 1970.
        tags: those of the version in the registry.
        run, run_id: the name and id of its MLflow run; None if that was deleted or there was none.
        judged: the metric that it is judged by; None if it was not evaluated.
        metrics: as registered, with their intervals.
        params: settings of its MLflow run.
        lineage: what `lineage.json` says; None for a version of another program.
    """

    name: str
    version: int
    aliases: Sequence[str]
    created: float
    tags: Mapping[str, str]
    run: str | None = None
    run_id: str | None = None
    judged: Measurement | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    lineage: Lineage | None = None


def format_age(created: float, now: float) -> str:
    """Format how long ago something was, from seconds since 1970: `3 h ago`."""
    seconds = max(now - created, 0)
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= size), (0, ""))
    return f"{seconds // size:.0f} {unit} ago" if unit else "just now"


def format_time(created: float) -> str:
    """Format seconds since 1970 as a full time in UTC."""
    return f"{datetime.fromtimestamp(created, UTC):%Y-%m-%dT%H:%MZ}"


def print_version_list(versions: Sequence[VersionView], now: float) -> None:
    """Print one line per version."""
    rows = [
        [
            f"{version.name}/{version.version}",
            ",".join(version.aliases),
            version.tags.get("loss.preset", ""),
            f"{shorten_metric_name(version.judged.metric)} {version.judged}" if version.judged else "",
            version.run or "",
            format_age(version.created, now),
        ]
        for version in versions
    ]
    header = ["version", "aliases", "loss", "judged by", "run", "age"]
    _print_table([header, *rows], has_header=True, may_shrink=(0, 1, 4))


def print_version(version: VersionView, now: float) -> None:
    """Print one version in sections: what it is, its results, its origin, its settings, its software."""
    aliases = f"  ({', '.join(version.aliases)})" if version.aliases else ""
    _print_title(f"{version.name}/{version.version}{aliases}")
    _print_table(_list_facts(version, now), indent=_GAP)
    if results := _list_results(version):
        _print_title("Results", before=True)
        _print_table(results, has_header=results[0][0] == "", indent=_GAP)
    _print_title("Trained", before=True)
    _print_table(_list_origin(version), indent=_GAP)
    lineage = version.lineage
    if lineage is None:
        return
    config = {**lineage.config, "loss": lineage.loss}  # with the value that `auto` came to
    if changed := list_changed_settings(config, lineage.preset):
        _print_title("Settings that differ from the defaults", before=True)
        _print_table([[name, _format_setting(value)] for name, value in sorted(changed.items())], indent=_GAP)
    _print_title("Software", before=True)
    versions = {"polyref": lineage.code.get("polyref.version", "unknown"), **lineage.libraries}
    if commit := lineage.code.get("mlflow.source.git.commit"):
        versions["commit"] = shorten_digest(commit)
    _print_table([[name, text] for name, text in versions.items()], indent=_GAP)


def print_comparison(versions: Sequence[VersionView], differences: Mapping[str, str]) -> None:
    """Print the settings in which versions differ, and their metrics side by side with the better one.

    Args:
        versions: two or more.
        differences: what else differs and makes the values of a metric incomparable, by metric.
    """
    names = [f"{version.name}/{version.version}" for version in versions]
    rows = [[key, *map(_format_setting, values)] for key, values in _list_differences(versions).items()]
    _print_table([["settings that differ", *names], *(rows or [["none"]])], has_header=True)
    metrics = [version.metrics for version in versions]
    shown = sorted({name for values in metrics for name in values if not name.endswith(INTERVAL)})
    if not shown:
        return
    rows = []
    for name in shown:
        values = [(one.get(name), one.get(f"{name}{INTERVAL}")) for one in metrics]
        better = "" if name in differences else _find_better(name, values, names)
        rows.append([shorten_metric_name(name), *(format_measurement(*value) for value in values), better])
    print()
    _print_table([["metrics", *names, "better"], *rows], has_header=True)
    for difference in dict.fromkeys(differences[name] for name in shown if name in differences):
        of = ", ".join(shorten_metric_name(name) for name in shown if differences.get(name) == difference)
        _print_line(f"not comparable, as they differ in {difference}: {of}")


def _list_facts(version: VersionView, now: float) -> list[list[str]]:
    tags = version.tags
    kind = "full model" if DIGEST_TAG in tags else "model of another program"
    if ADAPTER_DIGEST_TAG in tags:
        kind = "LoRA adapter, and merged with its base"
    facts = {
        "model": kind,
        "loss": tags.get("loss.preset"),
        "search": tags.get("search") and _format_search(tags),
        "registered": f"{format_age(version.created, now)} ({format_time(version.created)})",
        "run": version.run and f"{version.run} ({shorten_digest(version.run_id)})",
        "digest": shorten_digest(tags[DIGEST_TAG]) if DIGEST_TAG in tags else None,
    }
    return [[name, fact] for name, fact in facts.items() if fact]


def _format_search(tags: Mapping[str, str]) -> str:
    text = f"{tags['search']}, trial {tags.get('search.trial', '?')} of {tags.get('search.trials', '?')}"
    return text + (f", by {tags['search.objective']}" if "search.objective" in tags else "")


def _list_results(version: VersionView) -> list[list[str]]:
    """List the held-out metrics before and after training, the judged one first."""
    before = version.lineage.before if version.lineage else {}
    after = version.metrics
    judged = version.judged.metric if version.judged else None
    names = [name for name in after if not name.endswith(INTERVAL) and "/perf/" not in name]
    if not names:
        return []
    rows = [["", "before", "after"]] if before else []
    for name in sorted(names, key=lambda name: (name != judged, name)):
        label = shorten_metric_name(name) + (" (judged by)" if name == judged else "")
        values = [format_measurement(one.get(name), one.get(f"{name}{INTERVAL}")) for one in (before, after)]
        rows.append([label, *(values if before else values[1:])])
    return rows


def _list_origin(version: VersionView) -> list[list[str]]:
    """List what the version was trained from, against and on."""
    tags, lineage = version.tags, version.lineage
    rows = [["from", shorten_source_name(tags["base_model"]), ""]] if "base_model" in tags else []
    primary = to_metric_key(tags.get(PRIMARY_TAG, NO_PRIMARY))
    names = [tag.removeprefix(REFERENCE_PREFIX) for tag in tags if tag.startswith(REFERENCE_PREFIX)]
    for name in sorted(names, key=lambda name: (name != primary, name)):
        role = " (primary)" if name == primary else ""
        pin = tags.get(f"{PIN_PREFIX}{name}")
        model = f" {shorten_source_name(pin)}" if pin else ""
        rows.append(["against", f"{name}{role}{model}", shorten_digest(tags[f"{REFERENCE_PREFIX}{name}"])])
    for label, used_for, split, digest in (
        ("on", "training", "train", tags.get("data.digest")),
        ("judged on", "evaluation", "eval", tags.get(EVAL_DIGEST_TAG)),
    ):
        if digest and digest != "none":
            rows.append([label, _describe_data(lineage, used_for, split), shorten_digest(digest)])
    return rows or [["not known", ""]]


def _describe_data(lineage: Lineage | None, used_for: str, split: str) -> str:
    if lineage is None:
        return ""
    names = [shorten_source_name(one.name) for one in lineage.data_sources if one.used_for == used_for]
    is_fraction = split == "eval" and not names
    parts = ["a part of the training data"] if is_fraction else [", ".join(names)]
    if split == "eval" and lineage.judged_set:
        parts.append(f"set {lineage.judged_set}")
    if (pairs := lineage.counts.get(f"{split} pairs")) is not None:
        parts.append(f"{pairs} pairs")
    return ", ".join(part for part in parts if part)


def _list_differences(versions: Sequence[VersionView]) -> dict[str, list[str | None]]:
    """List settings that differ, by name: one value per version, None where it is not set.

    A default does not differ from what is not set, as with the fields of a reference that only one has.
    """
    facts = [_list_shown_settings(version) for version in versions]
    defaults = list_default_params(set().union(*facts))
    names = sorted(set().union(*facts), key=lambda name: (name not in _FIRST, name))
    aligned = {name: [fact.get(name) for fact in facts] for name in names}
    return {
        name: values
        for name, values in aligned.items()
        if len(set(values)) > 1 and set(values) != {None, defaults.get(name)}
    }


_FIRST = ("loss.preset", "from", "training data", "held-out data")


def _list_shown_settings(version: VersionView) -> dict[str, str]:
    tags = version.tags
    settings = {
        "loss.preset": tags.get("loss.preset", "None"),
        "from": shorten_source_name(tags.get("base_model", "None")),
        "training data": tags.get("data.digest", "None")[:12],
        "held-out data": tags.get("data.eval_digest", "None")[:12],
    }
    params = {
        name: shorten_source_name(value) if name.endswith((".model", "data.train", "data.eval")) else value
        for name, value in version.params.items()
        if not name.startswith(_UNIMPORTANT)
    }
    return {name: value for name, value in (settings | params).items() if value != "None"}


def _find_better(
    metric: str, values: Sequence[tuple[float | None, float | None]], names: Sequence[str]
) -> str:
    """Return the name of the version with the best value, and whether its interval meets the next best's."""
    direction = METRICS.get(metric) or METRICS.get(f"eval/{metric.rpartition('/')[2]}")
    found = [
        (value, interval, name)
        for (value, interval), name in zip(values, names, strict=True)
        if value is not None and math.isfinite(value)
    ]
    if direction is None or len(found) < 2:
        return ""
    found.sort(key=lambda one: one[0], reverse=direction == "max")
    (best, best_interval, name), (next_best, next_interval, _) = found[:2]
    if best == next_best:
        return "equal"
    if best_interval is None or next_interval is None:
        return name
    overlap = abs(best - next_best) <= best_interval + next_interval
    return f"{name} (± overlap)" if overlap else name


def _format_setting(value: Any) -> str:
    if value is None:
        return _NO_VALUE
    if isinstance(value, list | tuple):
        return ", ".join(map(_format_setting, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _print_title(title: str, *, before: bool = False) -> None:
    if before:
        print()
    _print_line(title, style="bold")


def _print_line(text: str, *, style: str = "") -> None:
    from rich.console import Console
    from rich.text import Text

    shown = Text(_hide_control_characters(text), style=style)
    Console(highlight=False).print(shown, overflow="ellipsis", no_wrap=True)


def _print_table(
    rows: Sequence[Sequence[str]],
    *,
    has_header: bool = False,
    indent: str = "",
    may_shrink: Iterable[int] | None = None,
) -> None:
    """Print columns of text without wrapping; what does not fit is cut in its middle.

    Args:
        rows: the cells; missing ones at the end of a row are empty. A column that is empty is left out.
        has_header: whether the first row names the columns.
        indent: in front of each line.
        may_shrink: the columns that may be cut, the widest first; by default all.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    count = max(map(len, rows))
    cells = [[*map(_hide_control_characters, row), *[""] * (count - len(row))] for row in rows]
    columns = [i for i in range(len(cells[0])) if any(row[i] for row in cells[has_header:])]
    widths = _fit_widths(
        {i: max(len(row[i]) for row in cells) for i in columns},
        set(columns if may_shrink is None else may_shrink) & set(columns),
        console.width - len(indent) - len(_GAP) * (len(columns) - 1),
    )
    for number, row in enumerate(cells):
        line = indent + _GAP.join(f"{_cut_middle(row[i], widths[i]):<{widths[i]}}" for i in columns)
        style = "bold" if has_header and number == 0 else ""
        console.print(Text(line.rstrip(), style=style), overflow="crop", no_wrap=True)


def _hide_control_characters(text: str) -> str:
    """Replace what would move the cursor: other programs may have written anything to the registry."""
    return "".join(character if character.isprintable() else " " for character in text)


def _fit_widths(widths: Mapping[int, int], may_shrink: set[int], room: int) -> dict[int, int]:
    """Return the columns' widths, with the widest of those that may shrink narrowed until all fit."""
    fitted = dict(widths)
    while sum(fitted.values()) > room:
        widest = max(may_shrink, key=lambda column: fitted[column], default=None)
        if widest is None or fitted[widest] <= _MIN_WIDTH:
            break
        fitted[widest] -= 1
    return fitted


def _cut_middle(text: str, width: int) -> str:
    """Cut a text that is too wide in its middle: names often differ at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"
