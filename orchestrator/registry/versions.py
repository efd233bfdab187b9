"""Models in MLflow's registry: parse `models:/` URIs, find and list versions.

A version's folder, as `register.py` writes it and `models.load` reads it, is a transformers folder
(safetensors, config, tokenizer, model card) with the separate adapter in its subfolder `adapter`. Models that
other programs registered can be read too: MLflow's transformers flavour, transformers and PEFT folders.
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
_MODEL_REF = re.compile(r"(?:models:/)?(?P<name>[^@/:]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))?")


@dataclass(frozen=True)
class ModelRef:
    """A parsed reference to a registered model; alias and version are both None if only the name is given."""

    name: str
    alias: str | None
    version: str | None

    @property
    def is_bare_name(self) -> bool:
        """Whether it has neither alias nor version."""
        return self.alias is None and self.version is None


def parse_model_ref(ref: str) -> ModelRef:
    """Parse `name`, `name@alias` or `name/3`, with or without `models:/` in front. Raises UsageError."""
    match = _MODEL_REF.fullmatch(ref)
    if match is None:
        raise UsageError(
            f"{ref!r} names no registered model: write models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    return ModelRef(match["name"], match["alias"], match["version"])


def find_version(client: "MlflowClient", ref: str) -> "ModelVersion":
    """Return the registered version of `name@alias` or `name/3`, with or without `models:/` in front.

    Raises UsageError for a reference without alias or version, an unknown name, alias or version, and a
    version that is still being registered.
    """
    from mlflow.exceptions import MlflowException

    parsed = parse_model_ref(ref)
    name = parsed.name
    if parsed.is_bare_name:
        raise UsageError(f"{ref!r} leaves the version open: {_format_choices(client, name)}")
    try:
        if parsed.alias is not None:
            version = client.get_model_version_by_alias(name, parsed.alias)
        else:
            version = client.get_model_version(name, str(parsed.version))
    except MlflowException as error:
        raise UsageError(f"{ref!r} is not in the registry: {_format_choices(client, name)}") from error
    if version.tags.get(STATE_TAG) == VERIFYING:
        raise UsageError(
            f"version {version.version} of {name!r} was never verified, its registration was interrupted: "
            "run the training again to finish it, or choose another version"
        )
    return version


def list_versions(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    """Return the verified versions of a registered model, and those of other programs, newest first.

    Raises UsageError for an unknown name.
    """
    aliases = _get_registered_model(client, name).aliases
    versions = [v for v in _search_versions(client, name) if v.tags.get(STATE_TAG) != VERIFYING]
    for version in versions:
        version.aliases = sorted(a for a, number in aliases.items() if int(number) == int(version.version))
    return sorted(versions, key=lambda v: -int(v.version))


def list_model_names(client: "MlflowClient") -> list[str]:
    """Return the names of all registered models, sorted."""
    names, token = [], None
    while True:
        page = client.search_registered_models(max_results=100, page_token=token)
        names += [model.name for model in page]
        token = page.token
        if not token:
            return sorted(names)


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
    versions = list_versions(client, name)
    if not versions:
        return f"{name!r} has no versions yet"
    refs = [f"{name}@{alias}" for version in versions for alias in version.aliases]
    refs += [f"{name}/{version.version}" for version in versions]
    return f"choose one of {', '.join(refs[:12])}{', …' if len(refs) > 12 else ''}"


def shorten_digest(digest: str | None) -> str:
    """Return the first 12 characters of a digest, for messages; "unknown" for None."""
    return "unknown" if digest is None else digest[:12]
