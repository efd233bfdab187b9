"""Check a run before it takes a device: find and pin its models, read and tokenise its data."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from models.config import ModelConfig, ModelError
from models.fingerprint import Fingerprint, compute_fingerprint
from models.load import ModelFiles, load_tokenizer, locate_model, read_model_limits
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

_POLICY_RENDERING = "the policy"


@dataclass(frozen=True)
class PreparedModel:
    """A model whose files and tokenizer have been found.

    Attributes:
        config: its settings, with registry names resolved to a folder and hub revisions to a commit.
        located: its files.
        tokenizer: its own tokenizer, with the configured chat template.
        pin: the exact version that its name meant when the run began.
        template_kwargs: arguments of the chat template.
        device_type: "cuda" or "cpu", which decides `dtype: auto`.
    """

    config: ModelConfig
    located: ModelFiles
    tokenizer: Any
    pin: str
    template_kwargs: Mapping[str, Any]
    device_type: str = "cpu"

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint that identifies its scores."""
        return compute_fingerprint(
            self.located,
            self.config,
            self.tokenizer,
            template_kwargs=self.template_kwargs,
            device_type=self.device_type,
        )


@dataclass(frozen=True)
class PreparedRun:
    """A run that has passed all checks that need no device.

    Attributes:
        config: the run file.
        policy: the model that the policy starts from.
        references: reference models by name, in the file's order.
        train, eval: tokenised rows.
        digests: digests of the rows' content, per split.
        counts: rows kept, swapped, truncated, skipped by reason, and those examined for a token that would
            reach from prompt to response, and found to have one, per split.
        tracking_uri: the MLflow server or file.
        function_digests: digests of the sources of functions that the loss depends on, by field.
        token_digests: digests of the token ids that each model reads, by split and model.
        notices: lines about the data that someone should read before training.
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
    token_digests: Mapping[str, str] = field(default_factory=dict)
    notices: Sequence[str] = ()

    def for_device(self, device_type: str) -> "PreparedRun":
        """Return the same run with every `dtype: auto` decided for "cuda" or "cpu"."""
        references = {
            name: replace(model, device_type=device_type) for name, model in self.references.items()
        }
        return replace(self, policy=replace(self.policy, device_type=device_type), references=references)

    @property
    def initial_policy_reference(self) -> str | None:
        """The reference that scores exactly like the policy before training, if there is one."""
        initial = self.policy.fingerprint.digest
        return next(
            (name for name, model in self.references.items() if model.fingerprint.digest == initial), None
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Digests of everything besides the settings that a checkpoint depends on."""
        functions = {"functions": dict(self.function_digests)} if self.function_digests else {}
        return {
            "policy": self.policy.fingerprint.digest,
            "references": {name: model.fingerprint.digest for name, model in self.references.items()},
            "data": dict(self.digests),
            "tokens": dict(self.token_digests),
        } | functions

    @property
    def code_tags(self) -> dict[str, str]:
        """MLflow tags of the code behind a result: polyref, and the user's functions in the loss."""
        return read_code_tags() | {f"digest.{name}": digest for name, digest in self.function_digests.items()}

    @property
    def vocabulary_sizes(self) -> dict[str, int]:
        """How many tokens each reference's tokenizer has, by name."""
        return {name: len(model.tokenizer) for name, model in self.references.items()}

    @property
    def pins(self) -> dict[str, str]:
        """The exact model versions that names meant when the run began, by field."""
        return {"policy": self.policy.pin} | {
            f"references.models.{name}": model.pin for name, model in self.references.items()
        }


def prepare_run(config: RunConfig, previous: RunRecord | None = None) -> PreparedRun:
    """Find and pin the models of a run file whose paths are resolved, read and tokenise the data.

    A run that resumes from a `previous` record keeps the model versions pinned there, even if a name means
    another version by now.

    Raises:
        UsageError, ModelError, DataError: one message naming the field or the row, and the remedy.
    """
    function_digests = check_functions(config, str(Path.cwd()))
    uri = check_storage(config)
    policy = _find_model("policy", _strip_to_model_config(config.policy_model), config, uri, previous)
    references = {
        name: policy
        if reference.scored_by_workers
        else _find_model(
            f"references.models.{name}", _strip_to_model_config(reference), config, uri, previous
        )
        for name, reference in config.references.models.items()
    }
    train, evaluation = load_splits(
        config.data, completions_only=config.loss.completions_only, seed=config.training.seed
    )
    config = _pin_template_date(config, previous, [policy, *references.values()])
    splits, counts = {}, {}
    tokens: dict[str, str] = {}
    notices: list[str] = []
    for name, loaded in (("train", train), ("eval", evaluation)):
        if loaded is not None:
            splits[name], counts[name], lines = _tokenize_split(loaded, policy, references, config)
            tokens |= {f"{name}, {model}": d for model, d in splits[name].digest_tokens().items()}
            notices += [f"{name}: {line}" for line in lines]
    digests = {"train": train.digest} | ({"eval": evaluation.digest} if evaluation else {})
    return PreparedRun(
        config,
        policy,
        references,
        splits["train"],
        splits.get("eval"),
        digests,
        counts,
        uri,
        function_digests,
        tokens,
        notices,
    )


def refuse_hard_labels(config: RunConfig, train: TokenizedSplit) -> None:
    """Refuse a loss that reads soft labels where no training pair has one, unless the run file allows it.

    Raises:
        UsageError: the loss would be trained as the same loss without soft labels.
    """
    if train.has_soft_labels or config.data.allow_hard_labels or not config.loss.reads_soft_labels:
        return
    raise UsageError(
        f"{config.name}: loss.soft_label.type {config.loss.soft_label.type} (preset {config.preset}) reads "
        "soft labels, and no training pair has one, so it would do nothing: give rows a soft_label or vote "
        "counts (data.columns names their columns), set loss.soft_label: {type: none}, or "
        "data.allow_hard_labels: true"
    )


def check_storage(config: RunConfig) -> str:
    """Check that a run's storage can be written to, by writing to it.

    Returns:
        The URI of the run's MLflow server or file.

    Raises:
        UsageError: the storage cannot be written to, or it needs an MLflow server and none is named.
    """
    uri = resolve_tracking_uri(config.tracking.uri, config.storage_path)
    refuse_unwritable(config.storage_path)
    return uri


def _strip_to_model_config(config: ModelConfig) -> ModelConfig:
    """Keep the settings that identify the model, and drop those of its training or serving."""
    return ModelConfig(**{name: getattr(config, name) for name in ModelConfig.model_fields})


def _find_model(
    field: str, requested: ModelConfig, config: RunConfig, uri: str, previous: RunRecord | None
) -> PreparedModel:
    """Resolve a registry name, find the files and read the tokenizer."""
    pin, settings = find_pin(previous, field, requested.model), requested
    if requested.model.startswith("models:/"):
        try:
            resolved = resolve_model(pin or requested.model, uri)
        except UsageError as error:
            raise UsageError(f"{field}: {error}") from error
        pin, settings = resolved.uri_pinned, requested.model_copy(update={"model": str(resolved.folder)})
    elif pin is not None and pin.startswith(f"{requested.model}@"):
        settings = requested.model_copy(update={"revision": pin.removeprefix(f"{requested.model}@")})
    try:
        located = locate_model(settings)
        tokenizer = load_tokenizer(located, settings)
    except ModelError as error:
        raise ModelError(f"{field}: {error}") from error
    if located.revision:
        settings = settings.model_copy(update={"revision": located.revision})
    if not requested.model.startswith("models:/"):
        pin = f"{requested.model}@{located.revision}" if located.revision else str(located.path)
    assert pin is not None
    return PreparedModel(settings, located, tokenizer, pin, config.data.chat_template_kwargs)


def _pin_template_date(
    config: RunConfig, previous: RunRecord | None, models: Sequence[PreparedModel]
) -> RunConfig:
    """Return the settings with the date that chat templates write: the run's first day, if one writes any.

    A run that is started again tomorrow reads the same tokens then.
    """
    if not any(Rendering(model.tokenizer).writes_date for model in models):
        return config
    earlier = None if previous is None else previous.config.get("data", {}).get("template_date")
    date = config.data.template_date or (earlier and datetime.date.fromisoformat(earlier)) or _read_date()
    return config.model_copy(update={"data": config.data.model_copy(update={"template_date": date})})


def _read_date() -> datetime.date:
    return datetime.datetime.now().astimezone().date()


def _tokenize_split(
    loaded: LoadedPairs, policy: PreparedModel, references: Mapping[str, PreparedModel], config: RunConfig
) -> tuple[TokenizedSplit, dict[str, Any], list[str]]:
    """Tokenise a split for every model.

    Returns:
        The split; its counts of kept, swapped and skipped rows; and lines about tokens at the boundary of
        prompt and response.
    """
    models = {_POLICY_RENDERING: policy} | {f"reference {name}": model for name, model in references.items()}
    renderings = {}
    for name, model in models.items():
        limits = read_model_limits(model.located, model.config)
        renderings[name] = Rendering(
            tokenizer=model.tokenizer,
            template_kwargs=config.data.chat_template_kwargs,
            max_positions=limits.positions,
            vocabulary=limits.vocabulary,
            date=config.data.template_date,
        )
    tokenized = tokenize_pairs(loaded.pairs, renderings, config.data)
    kept_pairs = [loaded.pairs[int(index)] for index in tokenized.kept_indices]
    split = TokenizedSplit(
        policy=tokenized.tables[_POLICY_RENDERING],
        references={name: tokenized.tables[f"reference {name}"] for name in references},
        soft_labels=np.array([pair.soft_label for pair in kept_pairs]),
        sources=tuple(pair.source for pair in kept_pairs),
        has_pairs=not config.loss.completions_only,
        has_soft_labels=loaded.has_soft_labels,
    )
    merged = {index for indices in tokenized.boundary_merges.values() for index in indices}
    counts = {
        "pairs": len(kept_pairs),
        "swapped": loaded.swapped,
        "truncated": tokenized.truncated,
        "boundary_examined": tokenized.examined,
        "boundary_merged": len(merged),
        "skipped": dict(loaded.skipped + tokenized.skipped),
    }
    lines = [
        f"{len(indices)} of {tokenized.examined} examined pairs, such as {loaded.pairs[indices[0]].source}, "
        f"have a token of {name} that reaches from the prompt into the response when both are one text; they "
        "are tokenised apart: end prompts without a blank, and begin responses with it"
        for name, indices in tokenized.boundary_merges.items()
        if indices
    ]
    return split, counts, lines


def resolve_paths(config: RunConfig, *, base: Path) -> RunConfig:
    """Resolve the run file's relative paths against `base`; names on a hub or in a registry are kept."""

    def resolve_path(name: str | None) -> str | None:
        if name is None or "://" in name or "{" in name or name.startswith("models:/"):
            return name
        path = (base / Path(name).expanduser()).resolve()
        return str(path) if path.exists() else name

    def resolve_model_paths(settings: Any) -> Any:
        names = ("model", "base", "chat_template")
        return settings.model_copy(update={name: resolve_path(getattr(settings, name)) for name in names})

    references = {
        name: reference if reference.scored_by_workers else resolve_model_paths(reference)
        for name, reference in config.references.models.items()
    }
    storage = config.storage_path
    return config.model_copy(
        update={
            "policy": resolve_model_paths(config.policy),
            "references": config.references.model_copy(update={"models": references}),
            "data": config.data.model_copy(
                update={"train": resolve_path(config.data.train), "eval": resolve_path(config.data.eval)}
            ),
            "storage_path": storage
            if "://" in storage
            else str((base / Path(storage).expanduser()).resolve()),
        }
    )
