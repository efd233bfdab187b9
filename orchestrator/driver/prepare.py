"""Check a run before it takes a device: find and pin its models, read and tokenise its data."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.load import read_model_limits
from orchestrator.config.functions import check_functions
from orchestrator.config.paths import resolve_if_present, resolve_path
from orchestrator.config.run import RunConfig
from orchestrator.driver.record import RunRecord, find_pin
from orchestrator.errors import UsageError
from orchestrator.files import cache_folder
from orchestrator.registry.find import PreparedModel, find_model
from orchestrator.storage.probe import refuse_unwritable
from orchestrator.tracking.code_version import read_code_tags
from orchestrator.tracking.mlflow import check_tracking, resolve_tracking_uri
from orchestrator.worker.rewards import check_reward_model
from preferences.load import LoadedSource, load_splits
from preferences.split import TokenizedSplit
from preferences.tokens.fitting import Readers
from preferences.tokens.rendering import Rendering


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
        sources: what was read of each source, per split.
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
    sources: Mapping[str, Sequence[LoadedSource]] = field(default_factory=dict)

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


def prepare_run(
    config: RunConfig,
    previous: RunRecord | None = None,
    *,
    progress: Callable[[str, int], None] | None = None,
) -> PreparedRun:
    """Find and pin the models of a run file whose paths are resolved, read and tokenise the data.

    A run that resumes from a `previous` record keeps the model versions pinned there, even if a name means
    another version by now. `progress` is called with the name of a source and the rows read of it.

    Raises:
        UsageError, ModelError, DataError: one message naming the field or the row, and the remedy.
    """
    function_digests = check_functions(config, str(Path.cwd()))
    uri = check_storage(config)
    _check_reward_model(config)
    policy = _find_model("policy", config.policy_model, config, uri, previous)
    references = {
        name: policy
        if reference.scored_by_workers
        else _find_model(f"references.models.{name}", reference, config, uri, previous)
        for name, reference in config.references.models.items()
    }
    config = _pin_template_date(config, previous, [policy, *references.values()])
    readers = Readers(
        config.data,
        _make_rendering(policy, config),
        {name: _make_rendering(model, config) for name, model in references.items()},
    )
    train, evaluation = load_splits(
        readers,
        completions_only=config.loss.completions_only,
        seed=config.training.seed,
        folder=cache_folder("data"),
        progress=progress,
    )
    splits = {"train": train} | ({"eval": evaluation} if evaluation else {})
    return PreparedRun(
        config,
        policy,
        references,
        train.split,
        evaluation.split if evaluation else None,
        {name: loaded.digest for name, loaded in splits.items()},
        {name: loaded.counts for name, loaded in splits.items()},
        uri,
        function_digests,
        {
            f"{name}, {model}": digest
            for name, loaded in splits.items()
            for model, digest in loaded.token_digests.items()
        },
        [f"{name}: {line}" for name, loaded in splits.items() for line in loaded.notices],
        {name: loaded.sources for name, loaded in splits.items()},
    )


def _check_reward_model(config: RunConfig) -> None:
    sampling = config.evaluation.sampling
    if sampling is not None and sampling.reward is not None and sampling.reward.model is not None:
        check_reward_model(sampling.reward)


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
    check_tracking(config.tracking, uri)
    return uri


def _find_model(
    field: str, requested: ModelConfig, config: RunConfig, uri: str, previous: RunRecord | None
) -> PreparedModel:
    """Find a model of the run, without the settings of its training or serving."""
    settings = ModelConfig(**{name: getattr(requested, name) for name in ModelConfig.model_fields})
    return find_model(
        field,
        settings,
        tracking_uri=uri,
        pin=find_pin(previous, field, settings.model),
        template_kwargs=config.data.chat_template_kwargs,
    )


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


def _make_rendering(model: PreparedModel, config: RunConfig) -> Rendering:
    """Make the rendering with which a model reads the run's pairs."""
    limits = read_model_limits(model.located, model.config)
    return Rendering(
        tokenizer=model.tokenizer,
        template_kwargs=config.data.chat_template_kwargs,
        max_positions=limits.positions,
        vocabulary=limits.vocabulary,
        date=config.data.template_date,
    )


def resolve_paths(config: RunConfig, *, base: Path) -> RunConfig:
    """Resolve the run file's relative paths against `base`; names on a hub or in a registry are kept."""

    def resolve_name(field: str, name: str | None) -> str | None:
        if name is None or "://" in name or "{" in name or name.startswith("models:/"):
            return name
        return resolve_if_present(name, field=field, base=base)

    def resolve_source(source: str) -> str:
        return resolve_name("data.train, data.eval", source) or source

    def resolve_model_paths(field: str, settings: Any) -> Any:
        names = ("model", "base", "chat_template")
        paths = {name: resolve_name(f"{field}.{name}", getattr(settings, name)) for name in names}
        return settings.model_copy(update=paths)

    references = {
        name: reference
        if reference.scored_by_workers
        else resolve_model_paths(f"references.models.{name}", reference)
        for name, reference in config.references.models.items()
    }
    storage = config.storage_path
    return config.model_copy(
        update={
            "policy": resolve_model_paths("policy", config.policy),
            "references": config.references.model_copy(update={"models": references}),
            "data": config.data.map_sources(resolve_source),
            "storage_path": storage
            if "://" in storage
            else str(resolve_path(storage, field="storage_path", base=base)),
        }
    )
