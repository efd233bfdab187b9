"""How registered models are shown to people: names without paths and hosts, values with their intervals."""

import math
from pathlib import PurePath
from urllib.parse import urlsplit

from orchestrator.registry.lineage import HUB
from orchestrator.registry.versions import shorten_digest

INTERVAL = "_interval"
"""The end of the name of the metric that is half of another's 95 % interval."""


def shorten_source_name(source: str) -> str:
    """Return the name of a model or of data: a hub id with a short commit, else the last part of its path."""
    if hub := HUB.fullmatch(source):
        return f"{hub['id']}@{shorten_digest(hub['commit'])}"
    if source.startswith("models:/"):
        return source.removeprefix("models:/")
    if "://" in source:
        source = urlsplit(source).path
    return PurePath(source).name or source


def shorten_metric_name(name: str) -> str:
    """Return a metric's name without the `eval/` that all held-out metrics have."""
    return name.removeprefix("eval/")


def format_measurement(value: float | None, interval: float | None = None) -> str:
    """Format a value, to the digits that half of its interval leaves: `0.751 ± 0.043`; `-` for None."""
    if value is None:
        return "-"
    if interval is None or not interval > 0 or not math.isfinite(interval):
        return f"{value:.4g}"
    decimals = max(1 - math.floor(math.log10(interval)), 0)
    return f"{value:.{decimals}f} ± {interval:.{decimals}f}"
