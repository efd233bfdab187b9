"""A summary of a run in a few lines of Markdown, for MLflow's pages of runs and versions."""

from orchestrator.registry.display import (
    INTERVAL,
    format_measurement,
    shorten_metric_name,
    shorten_source_name,
)
from orchestrator.registry.lineage import Lineage

_METRICS = ("eval/accuracy", "eval/label_nll", "eval/loss")


def render_summary(lineage: Lineage) -> str:
    """Return what was trained, against and on what, and its held-out results, if there are any yet."""
    lines = [f"`{shorten_source_name(lineage.base_model)}`, trained with the loss `{lineage.preset}`."]
    if results := _list_results(lineage):
        lines.append("**Result** " + "; ".join(results) + ".")
    references = [
        f"{name}{' (primary)' if name == lineage.primary else ''}: `{shorten_source_name(one.model)}`"
        for name, one in lineage.references.items()
    ]
    lines.append(f"**References** {', '.join(references) or 'none'}.")
    for title, used_for, split in (("Data", "training", "train"), ("Held out", "evaluation", "eval")):
        names = [f"`{one.name}`" for one in lineage.data_sources if one.used_for == used_for]
        pairs = lineage.counts.get(f"{split} pairs")
        if pairs is not None:
            named = ", ".join(names) or "a part of the training data"
            lines.append(f"**{title}** {named}: {pairs} pairs.")
    if lineage.search:
        trial, trials = lineage.search.get("search.trial"), lineage.search.get("search.trials")
        lines.append(f"**Search** `{lineage.search.get('search')}`: trial {trial} of {trials}.")
    return "  \n".join(lines)  # one paragraph, whose lines end where these do


def _list_results(lineage: Lineage) -> list[str]:
    judged = str((lineage.config.get("evaluation") or {}).get("metric"))
    names = [name for name in dict.fromkeys((judged, *_METRICS)) if lineage.after.get(name) is not None]
    if lineage.is_supervised:
        names = [name for name in names if name == "eval/loss"]
    results = []
    for name in names:
        before, after = (
            format_measurement(one.get(name), one.get(f"{name}{INTERVAL}"))
            for one in (lineage.before, lineage.after)
        )
        results.append(f"{shorten_metric_name(name)} {before} before, {after} after")
    return results
