"""Find a model that a command names: its files, its tokenizer, and the version that the name means now."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from models.config import ModelConfig, ModelError
from models.fingerprint import Fingerprint, compute_fingerprint
from models.load import ModelFiles, load_tokenizer, locate_model
from models.verify import verify_vocabulary, verify_weights
from orchestrator.errors import UsageError
from orchestrator.registry.download import resolve_model


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
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
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


def find_model(
    name: str,
    requested: ModelConfig,
    *,
    tracking_uri: str,
    pin: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    is_classifier: bool = False,
) -> PreparedModel:
    """Resolve a registry name, find the files and read the tokenizer.

    Args:
        name: the field or option that names the model, for messages.
        requested: its settings.
        tracking_uri: the registry that `models:/` names are looked up in.
        pin: the version that the name meant earlier, which is kept.
        template_kwargs: arguments of the chat template.
        is_classifier: whether it is a text classifier, such as a reward model.

    Raises:
        UsageError, ModelError: the model cannot be found; the message begins with `name`.
    """
    settings = requested
    if requested.model.startswith("models:/"):
        try:
            resolved = resolve_model(pin or requested.model, tracking_uri)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        pin, settings = resolved.uri_pinned, requested.model_copy(update={"model": str(resolved.folder)})
    elif pin is not None and pin.startswith(f"{requested.model}@"):
        settings = requested.model_copy(update={"revision": pin.removeprefix(f"{requested.model}@")})
    try:
        located = locate_model(settings)
        token_ids = verify_weights(located, settings, is_classifier=is_classifier)
        tokenizer = load_tokenizer(located, settings)
        verify_vocabulary(tokenizer, token_ids, settings)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    if located.revision:
        settings = settings.model_copy(update={"revision": located.revision})
    if not requested.model.startswith("models:/"):
        pin = f"{requested.model}@{located.revision}" if located.revision else str(located.path)
    assert pin is not None
    return PreparedModel(settings, located, tokenizer, pin, template_kwargs or {})
