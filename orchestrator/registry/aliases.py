"""Whether a registered version may have an alias: what it was trained against, and how the holder did."""

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
JUDGED_BY_TAG, LOSS_DIGEST_TAG = "evaluation.metric", "loss.digest"
SAMPLING_DIGEST_TAG = "evaluation.sampling_digest"
ACCURACY, _LOSS = "eval/accuracy", "eval/loss"
NO_PRIMARY = "none"

# Every held-out metric depends on the pairs and on the primary reference; these depend on more.
_OF_THE_LOSS = (_LOSS, "eval/rewards/margins")
_OF_SAMPLES = ("eval/reward", "eval/reward_at_kl", "eval/margin_at_kl")


class PromotionRefused(UsageError):
    """A version may not have an alias; the message has the numbers."""


def assign_alias(
    client: "MlflowClient", version: "ModelVersion", alias: str, *, force: bool = False
) -> "ModelVersion | None":
    """Give the version an alias, unless the version that holds it is better; returns the holder until now.

    Raises PromotionRefused where `promotion_refusal` has a reason, which `force` passes over.
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
    """The version's evaluation as registered; for another program's version, its run's last metrics."""
    own = {
        k.removeprefix(METRIC_PREFIX): float(v)
        for k, v in version.tags.items()
        if k.startswith(METRIC_PREFIX)
    }
    if own or not version.run_id:
        return own
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_run(version.run_id).data.metrics)
    except MlflowException:  # the run was deleted, the version stays
        return {}


def explain_refusal(
    client: "MlflowClient", candidate: "ModelVersion", holder: "ModelVersion | None"
) -> str | None:
    """Why the candidate should not take the holder's alias, with the numbers; None when it may.

    Judged by the candidate's own `evaluation.metric`; where neither version has it, by eval/accuracy or else
    eval/loss; where neither was evaluated, it may. What was measured on other pairs, against another primary
    reference, or (where the metric depends on them) with another loss or other samples is not comparable.
    """
    if (unknown := _explain_unknown_references(candidate)) is not None:
        return unknown
    if holder is None or holder.version == candidate.version:
        return None
    both = f"version {candidate.version} and version {holder.version}, which holds it,"
    new, old = read_metrics_of_version(client, candidate), read_metrics_of_version(client, holder)
    asked = (candidate.tags.get(JUDGED_BY_TAG), ACCURACY, _LOSS)
    metric = next((m for m in asked if m in METRICS and (m in new or m in old)), None)
    if metric is None:  # the one is as unproven as the other
        return None
    for tag, what in _comparison_tags(metric).items():
        ours, theirs = _read_comparable_value(candidate, tag), _read_comparable_value(holder, tag)
        if ours != theirs:
            return (
                f"{both} were evaluated with different {what} ({shorten_digest(ours)} and {shorten_digest(theirs)}), "
                f"so their {metric} cannot be compared"
            )
    if metric in new and metric in old and not _is_worse(new[metric], old[metric], metric):
        return None
    values = [f"{found[metric]:.4f}" if metric in found else "none" for found in (new, old)]
    return (
        f"{metric} of version {candidate.version} is {values[0]}, that of version {holder.version}, "
        f"which holds it, is {values[1]}"
    )


def _is_worse(new: float, old: float, metric: str) -> bool:
    """An equal one is not worse; what is not a number is."""
    return not (new >= old if METRICS[metric] == "max" else new <= old)


def _explain_unknown_references(version: "ModelVersion") -> str | None:
    """Why it is not known which references the version was trained against; None where it is."""
    tags = version.tags
    if PRIMARY_TAG not in tags:
        return f"version {version.version} does not say which references it was trained against"
    primary = tags[PRIMARY_TAG]
    named = {key.removeprefix(PIN_PREFIX) for key in tags if key.startswith(PIN_PREFIX)}
    named |= {to_metric_key(primary)} - {NO_PRIMARY}
    missing = sorted(name for name in named if not tags.get(f"{REFERENCE_PREFIX}{name}"))
    if missing:
        return f"version {version.version} has no fingerprint of its reference {', '.join(missing)}"
    return None


def _comparison_tags(metric: str) -> dict[str, str]:
    """Tags whose values must agree for two versions' metric to be comparable, and what they stand for."""
    basis = {PRIMARY_TAG: "primary reference", EVAL_DIGEST_TAG: "held-out pairs"}
    if metric in _OF_THE_LOSS:
        basis[LOSS_DIGEST_TAG] = "loss or references"
    if metric in _OF_SAMPLES:
        basis[SAMPLING_DIGEST_TAG] = "samples or reward"
    return basis


def _read_comparable_value(version: "ModelVersion", tag: str) -> str | None:
    """The digest behind a tag; for the primary reference, its fingerprint rather than the name it went by."""
    value: str | None = version.tags.get(tag)
    if tag == PRIMARY_TAG and value is not None:
        return version.tags.get(f"{REFERENCE_PREFIX}{to_metric_key(value)}", value)
    return value
