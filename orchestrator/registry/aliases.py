"""Promotion: give a registered version an alias unless the version that has it is better."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.config.sections import METRICS
from orchestrator.errors import UsageError
from orchestrator.registry.versions import list_versions, shorten_digest
from orchestrator.tracking.mlflow import to_metric_key

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

METRIC_PREFIX, REFERENCE_PREFIX, PIN_PREFIX = "metric.", "reference.", "pin."
PRIMARY_TAG, EVAL_DIGEST_TAG = "references.primary", "data.eval_digest"
EVALUATION_METRIC_TAG, EVAL_SET_TAG, LOSS_DIGEST_TAG = "evaluation.metric", "evaluation.set", "loss.digest"
SAMPLING_DIGEST_TAG = "evaluation.sampling_digest"
ACCURACY, _LOSS = "eval/accuracy", "eval/loss"
NO_PRIMARY = "none"

# Every eval metric depends on the held-out pairs and on the primary reference. The first group depends on the
# loss too, the second on how responses are sampled and rewarded.
_LOSS_METRICS = (_LOSS, "eval/rewards/margins")
_SAMPLED_METRICS = ("eval/reward", "eval/reward_at_kl", "eval/margin_at_kl")


class PromotionRefused(UsageError):
    """Error for a version that may not have an alias; the message gives the metrics compared."""


def assign_alias(
    client: "MlflowClient", version: "ModelVersion", alias: str, *, force: bool = False
) -> "ModelVersion | None":
    """Give the version an alias unless the version that has it is better; return the previous holder, if any.

    Raises PromotionRefused if `explain_refusal` gives a reason; `force` skips that check.
    """
    holder = {a: v for v in list_versions(client, version.name) for a in v.aliases}.get(alias)
    refusal = None if force else explain_refusal(client, version, holder)
    if refusal is not None:
        raise PromotionRefused(
            f"models:/{version.name}/{version.version} was not promoted to {alias!r}: {refusal}"
        )
    client.set_registered_model_alias(version.name, alias, str(version.version))
    return holder


def read_metrics_of_version(client: "MlflowClient", version: "ModelVersion") -> dict[str, float]:
    """Return the metrics registered with a version; for another program's version, its run's last metrics."""
    registered = {
        k.removeprefix(METRIC_PREFIX): _parse_number(v)
        for k, v in version.tags.items()
        if k.startswith(METRIC_PREFIX)
    }
    if registered or not version.run_id:
        return registered
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_run(version.run_id).data.metrics)
    except MlflowException:  # the run was deleted, the version was not
        return {}


def _parse_number(text: str) -> float:
    """Return the number in a tag; NaN, which nothing is worse than, where others wrote something else."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def explain_refusal(
    client: "MlflowClient", candidate: "ModelVersion", holder: "ModelVersion | None"
) -> str | None:
    """Explain, with the numbers, why the candidate may not take the holder's alias; None if it may.

    The metric compared is the candidate's own `evaluation.metric`; if neither version has it, eval/accuracy,
    or else eval/loss. If neither version was evaluated, the candidate may take the alias. Metrics measured on
    other pairs, against another primary reference, or (if the metric depends on them) with another loss or
    other samples are not comparable.
    """
    if (reason := _explain_unknown_references(candidate)) is not None:
        return reason
    if holder is None or holder.version == candidate.version:
        return None
    versions = f"version {candidate.version} and version {holder.version}, which holds it,"
    new, old = read_metrics_of_version(client, candidate), read_metrics_of_version(client, holder)
    metric = choose_judged_metric(candidate, {**new, **old})
    if metric is None:  # neither version was evaluated
        return None
    if (difference := find_difference(candidate, holder, metric)) is not None:
        return f"{versions} were evaluated with {difference}, so their {metric} cannot be compared"
    if metric in new and metric in old and not _is_worse(new[metric], old[metric], metric):
        return None
    values = [f"{metrics[metric]:.4f}" if metric in metrics else "none" for metrics in (new, old)]
    return (
        f"{metric} of version {candidate.version} is {values[0]}, that of version {holder.version}, "
        f"which holds it, is {values[1]}"
    )


def choose_judged_metric(version: "ModelVersion", metrics: Collection[str]) -> str | None:
    """Return the metric of those given that a version is judged by; None if none says what is better."""
    preferred = (version.tags.get(EVALUATION_METRIC_TAG), ACCURACY, _LOSS)
    return next((metric for metric in preferred if metric in METRICS and metric in metrics), None)


@dataclass(frozen=True)
class MetricMismatch:
    """What makes a metric of two versions incomparable, and the digests of both."""

    description: str
    digests: tuple[str | None, str | None]

    def __str__(self) -> str:
        return f"different {self.description} ({' and '.join(map(shorten_digest, self.digests))})"


def find_difference(one: "ModelVersion", other: "ModelVersion", metric: str) -> MetricMismatch | None:
    """Find what makes a metric of two versions incomparable; None if nothing does."""
    for tag, description in _list_comparison_tags(metric).items():
        digests = _read_comparable_value(one, tag), _read_comparable_value(other, tag)
        if digests[0] != digests[1]:
            return MetricMismatch(description, digests)
    return None


def _is_worse(new: float, old: float, metric: str) -> bool:
    """Whether `new` is worse than `old`: an equal value is not worse, NaN is."""
    return not (new >= old if METRICS[metric] == "max" else new <= old)


def _explain_unknown_references(version: "ModelVersion") -> str | None:
    """Explain what is unknown about the references that a version was trained against; None if nothing is."""
    tags = version.tags
    if PRIMARY_TAG not in tags:
        return f"version {version.version} does not say which references it was trained against"
    primary = tags[PRIMARY_TAG]
    references = {key.removeprefix(PIN_PREFIX) for key in tags if key.startswith(PIN_PREFIX)}
    references |= {to_metric_key(primary)} - {NO_PRIMARY}
    missing = sorted(name for name in references if not tags.get(f"{REFERENCE_PREFIX}{name}"))
    if missing:
        return f"version {version.version} has no fingerprint of its reference {', '.join(missing)}"
    return None


def _list_comparison_tags(metric: str) -> dict[str, str]:
    """Return the tags that must be equal for two versions' metric to be comparable, with descriptions."""
    tags = {
        PRIMARY_TAG: "primary reference",
        EVAL_DIGEST_TAG: "held-out pairs",
        EVAL_SET_TAG: "held-out sets",
    }
    if metric in _LOSS_METRICS:
        tags[LOSS_DIGEST_TAG] = "loss or references"
    if metric in _SAMPLED_METRICS:
        tags[SAMPLING_DIGEST_TAG] = "samples or reward"
    return tags


def _read_comparable_value(version: "ModelVersion", tag: str) -> str | None:
    """Return a tag's value; for the primary reference its fingerprint, since run files choose its name."""
    value: str | None = version.tags.get(tag)
    if tag == PRIMARY_TAG and value is not None:
        return version.tags.get(f"{REFERENCE_PREFIX}{to_metric_key(value)}", value)
    return value
