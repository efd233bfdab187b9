"""The settings of a registered run that differ from the run file's defaults."""

from collections.abc import Iterable, Mapping
from typing import Any

from losses.config import LossConfig
from losses.presets import PRESETS
from models.config import LoraSettings, PolicyConfig
from orchestrator.config.run import RunConfig
from orchestrator.config.sections import ReferenceConfig, ReferencesConfig
from orchestrator.tracking.mlflow import flatten_settings
from preferences.config import DataConfig

_SAID_ELSEWHERE = (
    *("name", "storage_path", "tracking", "placement", "policy.model", "policy.revision"),
    *("references.primary", "references.use", "data.train", "data.eval"),
)
"""Settings that say where a run was kept and watched, or which models and data it had."""


def list_changed_settings(config: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """Return the settings that decide a result and are neither default nor null, by dotted name.

    Args:
        config: the complete run file, as a record or a lineage has it; unknown fields count as changed.
        preset: the named loss, whose settings are the loss's defaults; those of "custom" are `LossConfig`'s.
    """
    changed: dict[str, Any] = {}
    _collect_changes(config, _build_defaults(config, preset), "", changed)
    return changed


def list_default_params(names: Iterable[str]) -> dict[str, str]:
    """Return defaults as MLflow's parameters have them, with those of the references and adapter named."""
    parts = [name.split(".") for name in names]
    models = [part[2] for part in parts if part[:2] == ["references", "models"] and len(part) > 2]
    adapter = any(part[:2] == ["policy", "adapter"] for part in parts)
    config = {"references": {"models": dict.fromkeys(models)}, "policy": {"adapter": adapter}}
    return flatten_settings(_build_defaults(config, "dpo"))


def _build_defaults(config: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """Build the run file that leaves out whatever may be left out; nothing is validated."""
    references = (config.get("references") or {}).get("models") or {}
    adapter = LoraSettings() if (config.get("policy") or {}).get("adapter") else None
    run = RunConfig.model_construct(
        name="",
        policy=PolicyConfig.model_construct(model="", adapter=adapter),
        references=ReferencesConfig.model_construct(
            models={name: ReferenceConfig.model_construct(model="") for name in references}
        ),
        data=DataConfig.model_construct(train=""),
        loss=PRESETS.get(preset, LossConfig()),
    )
    return run.model_dump(mode="json")


def _collect_changes(value: Any, default: Any, name: str, changed: dict[str, Any]) -> None:
    if name in _SAID_ELSEWHERE or value is None or value == default:
        return
    if name.startswith("references.models.") and name.endswith((".model", ".revision")):
        return
    if isinstance(value, Mapping) and value:
        defaults = default if isinstance(default, Mapping) else {}
        for key, inner in value.items():
            _collect_changes(inner, defaults.get(key), f"{name}.{key}" if name else key, changed)
    elif value not in ({}, [], ""):
        changed[name] = value
