"""Registration of a trained policy: pack, upload, load back, compare; only then is the version verified."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from models.probe import LogitProbe, compute_probe_logits
from orchestrator.errors import RunFailed, UsageError
from orchestrator.files import digest_folder
from orchestrator.redaction import hide_secrets, redact, summarize_error
from orchestrator.registry.aliases import (
    EVAL_DIGEST_TAG,
    EVAL_SET_TAG,
    EVALUATION_METRIC_TAG,
    LOSS_DIGEST_TAG,
    METRIC_PREFIX,
    NO_PRIMARY,
    PIN_PREFIX,
    PRIMARY_TAG,
    REFERENCE_PREFIX,
    SAMPLING_DIGEST_TAG,
    PromotionRefused,
    assign_alias,
)
from orchestrator.registry.artifact import build_artifact, refuse_incomplete_export
from orchestrator.registry.download import ADAPTER, DamagedError, ResolvedModel, check_digest, resolve_version
from orchestrator.registry.lineage import Lineage
from orchestrator.registry.summary import render_summary
from orchestrator.registry.versions import ADAPTER_DIGEST_TAG, DIGEST_TAG, STATE_TAG, VERIFIED, VERIFYING
from orchestrator.tracking.mlflow import URI_VARIABLE, connect_to_mlflow, to_metric_key

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

EXPORT_TAG = "polyref.export"
_DESCRIPTION_LENGTH = 5000  # MLflow's limit
KL_TAG, INITIAL_KL_TAG = "polyref.kl_from_trained", "polyref.kl_of_initial_from_trained"


class RegistryError(RunFailed):
    """Error for a registration that failed, or whose files are not the model that was trained."""


def register_model(
    tracking_uri: str,
    *,
    name: str,
    folder: Path,
    run_id: str,
    lineage: Lineage,
    probe: LogitProbe,
    adapter: Path | None = None,
    alias: str | None = None,
) -> ResolvedModel:
    """Register the exported `folder` (with LoRA: the merged model, and `adapter`) as a version of `name`.

    A second call for the same run and the same weights finishes an interrupted registration and makes no
    second version. `alias` is assigned under the rules of `models promote`: if they refuse it, the version is
    registered without the alias, and a warning gives the reason and the command that assigns it anyway.

    Raises UsageError if the server does not answer or the folder is incomplete; RegistryError if the upload
    fails, or if the model loaded back is not the one that was trained: that version is deleted.
    """
    refuse_incomplete_export(folder, adapter)
    client = connect_to_mlflow(tracking_uri)
    export_digest = digest_folder(folder, ".safetensors")
    of_run = [v for v in client.search_model_versions(f"run_id='{run_id}'") if v.name == name]
    same_weights = [v for v in of_run if v.tags.get(EXPORT_TAG) == export_digest]
    verified = next((v for v in same_weights if v.tags.get(STATE_TAG) == VERIFIED), None)
    if verified is None:
        for stale in (v for v in of_run if v.tags.get(STATE_TAG) == VERIFYING and v not in same_weights):
            client.delete_model_version(name, str(stale.version))
        with tempfile.TemporaryDirectory(prefix=".register-", dir=folder.parent) as scratch:
            root = Path(scratch)
            tags = _build_tags(lineage) | {
                EXPORT_TAG: export_digest,
                DIGEST_TAG: build_artifact(root, name, folder, adapter, lineage),
            }
            if adapter is not None:
                tags[ADAPTER_DIGEST_TAG] = digest_folder(root / "model" / ADAPTER)
            pending = next(iter(same_weights), None)
            description = redact(render_summary(lineage))[:_DESCRIPTION_LENGTH]
            version = _upload_version(client, name, root, run_id, tags, pending, description=description)
        verified = _verify_version(client, version, tracking_uri, probe)
    if alias is not None:
        _try_to_assign_alias(client, verified, alias, tracking_uri)
    return resolve_version(client, verified, tracking_uri)


def _try_to_assign_alias(
    client: "MlflowClient", version: "ModelVersion", alias: str, tracking_uri: str
) -> None:
    try:
        assign_alias(client, version, alias)
    except PromotionRefused as error:
        command = f"polyref models promote {version.name}/{version.version} --alias {alias} --force"
        if os.environ.get(URI_VARIABLE) != tracking_uri:
            command += f" --tracking-uri {redact(tracking_uri)}"
        log.warning("%s. It is registered without the alias; `%s` assigns it anyway", error, command)


def verify_export(folder: Path, probe: LogitProbe) -> dict[str, str]:
    """Load a folder as users would and compare its logits with the trained policy's.

    They are computed in float32 whatever the dtype of the weights, so that rounding hides no small change.

    Returns:
        Version tags of the export's and of the initial policy's distance from the trained policy.

    Raises:
        RegistryError: weights are missing, the logits differ, or they are not nearer to the trained policy's
            than the initial policy's are.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    wrong = sorted(
        [*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])]
    )
    if wrong:
        raise RegistryError(f"{len(wrong)} weights are missing or do not belong: {', '.join(wrong[:3])}")
    dtype = model.dtype
    logits = compute_probe_logits(model.float(), probe.rows)
    if (fault := probe.find_fault(logits, dtype)) is not None:
        raise RegistryError(fault)
    distances = {KL_TAG: probe.measure_distance(logits), INITIAL_KL_TAG: probe.measure_initial_distance()}
    return {name: f"{nats:.3g}" for name, nats in distances.items() if nats is not None}


def _upload_version(
    client: "MlflowClient",
    name: str,
    root: Path,
    run_id: str,
    tags: Mapping[str, str],
    pending: "ModelVersion | None",
    *,
    description: str,
) -> "ModelVersion":
    """Upload the packed version as artifacts of the run and register it as not yet verified.

    `pending` is a version of the same weights whose registration was interrupted; it is then updated.
    """
    from mlflow.exceptions import MlflowException

    artifact_path = f"model-{tags[EXPORT_TAG][:12]}"
    try:
        client.log_artifacts(run_id, str(root), artifact_path)
        _ensure_registered(client, name)
        if pending is None:
            source = f"{client.get_run(run_id).info.artifact_uri}/{artifact_path}"
            tags = {**tags, STATE_TAG: VERIFYING}
            return client.create_model_version(name, source, run_id, tags=tags, description=description)
        for key, value in tags.items():
            client.set_model_version_tag(name, str(pending.version), key, value)
        return client.get_model_version(name, str(pending.version))
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"{name!r} could not be registered: {summarize_error(error)}; "
            "the exported model is kept: start the same run again to register it"
        ) from error


def _ensure_registered(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise UsageError(f"tracking.registered_model {name!r}: {summarize_error(error)}") from error
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _verify_version(
    client: "MlflowClient", version: "ModelVersion", tracking_uri: str, probe: LogitProbe
) -> "ModelVersion":
    """Load the version back and mark it as verified; if it differs, delete it and raise RegistryError."""
    uri = f"models:/{version.name}/{version.version}"
    try:
        loaded = resolve_version(client, version, tracking_uri)
        check_digest(loaded.folder, loaded.digest, uri)
        tags = verify_export(loaded.folder, probe)
    except (RegistryError, DamagedError) as error:
        client.delete_model_version(version.name, str(version.version))
        raise RegistryError(f"{uri} is not the model that was trained, and was deleted: {error}") from error
    log.info("%s is the model that was trained: %s", uri, tags)
    for name, value in (tags | {STATE_TAG: VERIFIED}).items():
        client.set_model_version_tag(version.name, str(version.version), name, value)
    return client.get_model_version(version.name, str(version.version))


def _build_tags(lineage: Lineage) -> dict[str, str]:
    tags = {f"{REFERENCE_PREFIX}{name}": r.fingerprint for name, r in lineage.references.items()}
    tags |= {f"{PIN_PREFIX}{name}": r.model for name, r in lineage.references.items()}
    tags |= {
        f"{METRIC_PREFIX}{name}": repr(float(value))
        for name, value in lineage.after.items()
        if value is not None
    }
    tags |= {
        PRIMARY_TAG: lineage.primary or NO_PRIMARY,
        "data.digest": lineage.data_digest,
        EVAL_DIGEST_TAG: lineage.eval_digest or "none",
        "base_model": lineage.base_model,
        "loss.preset": lineage.preset,
        LOSS_DIGEST_TAG: _digest_settings(
            [lineage.loss, [r.fingerprint for r in lineage.references.values()]]
        ),
        **_build_evaluation_tags(lineage),
        **lineage.code,
        **lineage.search,
    }
    return {to_metric_key(key): redact(value) for key, value in tags.items()}


def _build_evaluation_tags(lineage: Lineage) -> dict[str, str]:
    """Return the run's evaluation metric and set, and a digest of how responses were sampled and rewarded."""
    evaluation = lineage.config.get("evaluation") or {}
    tags = {EVALUATION_METRIC_TAG: evaluation["metric"]} if evaluation.get("metric") else {}
    if lineage.judged_set is not None:
        tags[EVAL_SET_TAG] = lineage.judged_set
    if evaluation.get("sampling"):
        tags[SAMPLING_DIGEST_TAG] = _digest_settings(
            [evaluation["sampling"], lineage.config.get("training", {}).get("seed")]
        )
    return tags


def _digest_settings(settings: object) -> str:
    text = json.dumps(hide_secrets(settings), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
