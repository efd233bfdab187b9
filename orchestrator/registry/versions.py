"""Models in MLflow's registry: what a `models:/` URI stands for, and the folder here that holds it.

A version's folder, as `register.py` writes it and `models.load` reads it, is a transformers folder
(safetensors, config, tokenizer, model card) with the adapter alone in its subfolder `adapter`. Models that
other programs registered are read too: MLflow's transformers flavour, transformers and PEFT folders.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

STATE_TAG, DIGEST_TAG, ADAPTER_DIGEST_TAG = "polyref.state", "polyref.digest", "polyref.adapter_digest"
VERIFYING, VERIFIED = "verifying", "verified"
_REF = re.compile(r"(?:models:/)?(?P<name>[^@/:]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))?")


@dataclass(frozen=True)
class ModelRef:
    """A registered model as users write it."""

    name: str
    alias: str | None
    version: str | None

    @property
    def leaves_version_open(self) -> bool:
        """Whether it leaves the version open."""
        return self.alias is None and self.version is None


def parse_model_ref(ref: str) -> ModelRef:
    """`name`, `name@alias` or `name/3`, with or without `models:/` in front. Raises UsageError."""
    match = _REF.fullmatch(ref)
    if match is None:
        raise UsageError(
            f"{ref!r} names no registered model: write models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    return ModelRef(match["name"], match["alias"], match["version"])


def find_version(client: "MlflowClient", ref: str) -> "ModelVersion":
    """The registered version of `name@alias` or `name/3`, with or without `models:/` in front.

    Raises UsageError as `resolve` does.
    """
    from mlflow.exceptions import MlflowException

    wanted = parse_model_ref(ref)
    name = wanted.name
    if wanted.leaves_version_open:
        raise UsageError(f"{ref!r} leaves the version open: {_format_choices(client, name)}")
    try:
        if wanted.alias is not None:
            found = client.get_model_version_by_alias(name, wanted.alias)
        else:
            found = client.get_model_version(name, str(wanted.version))
    except MlflowException as error:
        raise UsageError(f"{ref!r} is not in the registry: {_format_choices(client, name)}") from error
    if found.tags.get(STATE_TAG) == VERIFYING:
        raise UsageError(
            f"version {found.version} of {name!r} was never verified, its registration was cut short: "
            "run the training again to finish it, or choose another version"
        )
    return found


def list_versions(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    """One registered model's versions that count, newest first. Raises UsageError for an unknown name."""
    aliases = _get_registered_model(client, name).aliases
    found = [v for v in _search_versions(client, name) if v.tags.get(STATE_TAG) != VERIFYING]
    for version in found:
        version.aliases = sorted(a for a, number in aliases.items() if int(number) == int(version.version))
    return sorted(found, key=lambda v: -int(v.version))


def list_model_names(client: "MlflowClient") -> list[str]:
    """The registered models' names in order."""
    found, token = [], None
    while True:
        page = client.search_registered_models(max_results=100, page_token=token)
        found += [model.name for model in page]
        token = page.token
        if not token:
            return sorted(found)


def _search_versions(client: "MlflowClient", name: str) -> "Iterable[ModelVersion]":
    token = None
    while True:
        page = client.search_model_versions(f"name='{name}'", max_results=200, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _get_registered_model(client: "MlflowClient", name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        known = list_model_names(client)
        remedy = did_you_mean(name, known) if known else "; the registry is empty"
        raise UsageError(f"no registered model is called {name!r}{remedy}") from error


def _format_choices(client: "MlflowClient", name: str) -> str:
    found = list_versions(client, name)
    if not found:
        return f"{name!r} has no versions yet"
    written = [f"{name}@{alias}" for version in found for alias in version.aliases]
    written += [f"{name}/{version.version}" for version in found]
    return f"choose one of {', '.join(written[:12])}{', …' if len(written) > 12 else ''}"


def shorten_digest(digest: str | None) -> str:
    """A digest as people read it."""
    return "unknown" if digest is None else digest[:12]
