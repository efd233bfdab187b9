"""What can be refused before a device is held: models found and pinned, data read and tokenised."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from models.config import ModelConfig, ModelError
from models.fingerprint import Fingerprint, fingerprint
from models.load import Located, load_tokenizer, locate, max_positions
from orchestrator.config.functions import check_functions
from orchestrator.config.run import RunConfig
from orchestrator.driver.record import RunRecord, find_pin
from orchestrator.errors import UsageError
from orchestrator.registry.download import resolve_model
from orchestrator.storage.probe import refuse_unwritable
from orchestrator.tracking.code_version import read_code_tags
from orchestrator.tracking.mlflow import resolve_tracking_uri
from preferences.load import LoadedPairs, load_splits
from preferences.split import TokenizedSplit
from preferences.tokenize import Rendering, tokenize_pairs

_POLICY_ROWS = "the policy"


@dataclass(frozen=True)
class PreparedModel:
    """A model that was found.

    Attributes:
        config: its settings, with registry names resolved to a folder and hub revisions to a commit.
        located: its files.
        tokenizer: its own, with the chat template that was asked for.
        pin: what its name stood for when the run began.
        template_kwargs: arguments of the chat template.
        device_type: what `dtype: auto` is decided for.
    """

    config: ModelConfig
    located: Located
    tokenizer: Any
    pin: str
    template_kwargs: Mapping[str, Any]
    device_type: str = "cpu"

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What identifies its scores."""
        return fingerprint(
            self.located,
            self.config,
            self.tokenizer,
            template_kwargs=self.template_kwargs,
            device_type=self.device_type,
        )


@dataclass(frozen=True)
class PreparedRun:
    """A run that was checked as far as it can be without a device.

    Attributes:
        config: the run file.
        policy: the policy's start.
        references: by name, in the file's order.
        train, held_out: tokenised rows.
        digests: of the rows' content, per split.
        counts: rows kept, swapped, and skipped by reason, per split.
        tracking_uri: the MLflow server or file.
        function_digests: of the sources of functions that the loss depends on, by field.
    """

    config: RunConfig
    policy: PreparedModel
    references: Mapping[str, PreparedModel]
    train: TokenizedSplit
    eval: TokenizedSplit | None
    digests: Mapping[str, str]
    counts: Mapping[str, Any]
    tracking_uri: str
    function_digests: Mapping[str, str] = field(default_factory=dict)

    def for_device(self, device_type: str) -> "PreparedRun":
        """The same run with every `dtype: auto` decided for "cuda" or "cpu"."""
        references = {n: replace(m, device_type=device_type) for n, m in self.references.items()}
        return replace(self, policy=replace(self.policy, device_type=device_type), references=references)

    @property
    def initial_policy_reference(self) -> str | None:
        """The reference whose scores are the policy's own at its start, if there is one."""
        start = self.policy.fingerprint.digest
        return next((n for n, m in self.references.items() if m.fingerprint.digest == start), None)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint's meaning depends on besides the settings."""
        functions = {"functions": dict(self.function_digests)} if self.function_digests else {}
        return {
            "policy": self.policy.fingerprint.digest,
            "references": {name: model.fingerprint.digest for name, model in self.references.items()},
            "data": dict(self.digests),
        } | functions

    @property
    def code_tags(self) -> dict[str, str]:
        """Which code a result came from: polyref's, and functions of the user's that the loss calls."""
        return read_code_tags() | {f"digest.{name}": digest for name, digest in self.function_digests.items()}

    @property
    def pins(self) -> dict[str, str]:
        """What names stood for when the run began."""
        return {"policy": self.policy.pin} | {
            f"references.models.{name}": model.pin for name, model in self.references.items()
        }


def prepare_run(config: RunConfig, before: RunRecord | None = None) -> PreparedRun:
    """Find and pin the models of a run file whose paths are resolved, read and tokenise the data.

    A run that was begun `before` keeps to what its names stood for then, wherever they point now.

    Raises:
        UsageError, ModelError, DataError: one message naming the field or the row, and the remedy.
    """
    function_digests = check_functions(config, os.getcwd())
    uri = check_storage(config)
    policy = _find_model("policy", _initial_policy_config(config), config, uri, before)
    references = {
        name: policy
        if reference.scored_by_workers
        else _find_model(f"references.models.{name}", _strip_to_model_config(reference), config, uri, before)
        for name, reference in config.references.models.items()
    }
    train, held_out = load_splits(
        config.data, completions_only=config.loss.completions_only, seed=config.training.seed
    )
    parts, counts = {}, {}
    for split, loaded in (("train", train), ("eval", held_out)):
        if loaded is not None:
            parts[split], counts[split] = _tokenize_split(loaded, policy, references, config)
    digests = {"train": train.digest} | ({"eval": held_out.digest} if held_out else {})
    return PreparedRun(
        config, policy, references, parts["train"], parts.get("eval"), digests, counts, uri, function_digests
    )


def check_storage(config: RunConfig) -> str:
    """The MLflow server of a run that can be kept where it is to be; the storage is written to, to find out.

    Raises:
        UsageError: it cannot, or its storage needs a server that is not named.
    """
    uri = resolve_tracking_uri(config.tracking.uri, config.storage_path)
    refuse_unwritable(config.storage_path)
    return uri


def _initial_policy_config(config: RunConfig) -> ModelConfig:
    """The policy's start as a frozen model: float32 master weights where every weight is trained."""
    start = _strip_to_model_config(config.policy)
    return start if config.policy.adapter is not None else start.model_copy(update={"dtype": "float32"})


def _strip_to_model_config(config: ModelConfig) -> ModelConfig:
    """The settings that say which model it is, without those of its training or serving."""
    return ModelConfig(**{name: getattr(config, name) for name in ModelConfig.model_fields})


def _find_model(
    field: str, asked: ModelConfig, config: RunConfig, uri: str, before: RunRecord | None
) -> PreparedModel:
    """Resolve a registry name, find the files and read the tokenizer."""
    pin, settings = find_pin(before, field, asked.model), asked
    if asked.model.startswith("models:/"):
        try:
            resolved = resolve_model(pin or asked.model, uri)
        except UsageError as error:
            raise UsageError(f"{field}: {error}") from error
        pin, settings = resolved.uri_pinned, asked.model_copy(update={"model": str(resolved.folder)})
    elif pin is not None and pin.startswith(f"{asked.model}@"):
        settings = asked.model_copy(update={"revision": pin.removeprefix(f"{asked.model}@")})
    try:
        located = locate(settings)
        tokenizer = load_tokenizer(located, settings)
    except ModelError as error:
        raise ModelError(f"{field}: {error}") from error
    if located.revision:
        settings = settings.model_copy(update={"revision": located.revision})
    if not asked.model.startswith("models:/"):
        pin = f"{asked.model}@{located.revision}" if located.revision else str(located.path)
    assert pin is not None
    return PreparedModel(settings, located, tokenizer, pin, config.data.chat_template_kwargs)


def _tokenize_split(
    loaded: LoadedPairs, policy: PreparedModel, references: Mapping[str, PreparedModel], config: RunConfig
) -> tuple[TokenizedSplit, dict[str, Any]]:
    models = {_POLICY_ROWS: policy} | {f"reference {name}": model for name, model in references.items()}
    renderings = {
        name: Rendering(
            tokenizer=model.tokenizer,
            template_kwargs=config.data.chat_template_kwargs,
            max_positions=max_positions(model.located, model.config),
        )
        for name, model in models.items()
    }
    tokenized = tokenize_pairs(loaded.pairs, renderings, config.data)
    kept = [loaded.pairs[int(index)] for index in tokenized.kept_indices]
    part = TokenizedSplit(
        policy=tokenized.tables[_POLICY_ROWS],
        references={name: tokenized.tables[f"reference {name}"] for name in references},
        soft_labels=np.array([pair.soft_label for pair in kept]),
        sources=tuple(pair.source for pair in kept),
        has_pairs=not config.loss.completions_only,
        has_soft_labels=loaded.has_soft_labels,
    )
    skipped = dict(loaded.skipped + tokenized.skipped)
    counts = {
        "pairs": len(kept),
        "swapped": loaded.swapped,
        "truncated": tokenized.truncated,
        "skipped": skipped,
    }
    return part, counts


def resolve_paths(config: RunConfig, *, base: Path) -> RunConfig:
    """Relative paths of the run file against `base`; names on a hub or in a registry stay as they are."""

    def local(name: str | None) -> str | None:
        if name is None or "://" in name or "{" in name or name.startswith("models:/"):
            return name
        path = (base / Path(name).expanduser()).resolve()
        return str(path) if path.exists() else name

    def model(settings: Any) -> Any:
        names = ("model", "base", "chat_template")
        return settings.model_copy(update={name: local(getattr(settings, name)) for name in names})

    references = {
        name: reference if reference.scored_by_workers else model(reference)
        for name, reference in config.references.models.items()
    }
    storage = config.storage_path
    return config.model_copy(
        update={
            "policy": model(config.policy),
            "references": config.references.model_copy(update={"models": references}),
            "data": config.data.model_copy(
                update={"train": local(config.data.train), "eval": local(config.data.eval)}
            ),
            "storage_path": storage
            if "://" in storage
            else str((base / Path(storage).expanduser()).resolve()),
        }
    )
