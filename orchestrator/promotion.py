"""Which of two registered versions is better, and whether one may take the other's alias."""

from typing import TYPE_CHECKING

from orchestrator.registry import short

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

METRIC_PREFIX, REFERENCE_PREFIX = "metric.", "reference."
PRIMARY_TAG, EVAL_DIGEST_TAG = "references.primary", "data.eval_digest"
ACCURACY = "eval/accuracy"


def metrics(client: "MlflowClient", version: "ModelVersion") -> dict[str, float]:
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


def promotion_refusal(
    client: "MlflowClient", candidate: "ModelVersion", champion: "ModelVersion | None"
) -> str | None:
    """Why the candidate should not take the champion's alias, with the numbers; None when it may.

    Accuracies are comparable only against the same primary reference and on the same held-out pairs.
    """
    named = f"version {candidate.version}"
    if (
        not any(tag.startswith(REFERENCE_PREFIX) for tag in candidate.tags)
        and PRIMARY_TAG not in candidate.tags
    ):
        return f"{named} does not say which references it was trained against"
    new = metrics(client, candidate).get(ACCURACY)
    if champion is None or champion.version == candidate.version:
        return None
    for tag, what in ((PRIMARY_TAG, "primary reference"), (EVAL_DIGEST_TAG, "held-out pairs")):
        ours, theirs = _comparable(candidate, tag), _comparable(champion, tag)
        if ours != theirs:
            return (
                f"{named} and the champion, version {champion.version}, were evaluated with different {what} "
                f"({short(ours)} and {short(theirs)}), so their {ACCURACY} cannot be compared"
            )
    old = metrics(client, champion).get(ACCURACY)
    if old is not None and (new is None or new < old):
        shown = "none" if new is None else f"{new:.4f}"
        return f"{ACCURACY} of {named} is {shown}, the champion's, version {champion.version}, is {old:.4f}"
    return None


def _comparable(version: "ModelVersion", tag: str) -> str | None:
    """The digest behind a tag; for the primary reference, its fingerprint rather than the name it went by."""
    value: str | None = version.tags.get(tag)
    return version.tags.get(f"{REFERENCE_PREFIX}{value}", value) if tag == PRIMARY_TAG else value
