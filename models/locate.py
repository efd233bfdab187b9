"""Find a model's files: a local folder, a file, or the hub's cache; models that cannot work are refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from models.config import ModelConfig, ModelError

_ALLOW_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer*", "*.model")
_IGNORE_PATTERNS = ("onnx/*", "original/*", "*/*.safetensors")
_PROMPT_ADAPTERS = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"})


@dataclass(frozen=True)
class ModelFiles:
    """The location of a model's files.

    path:      model folder, .gguf file or adapter folder.
    base_path: for an adapter, the path of its base (a folder or .gguf file).
    kind:      which of the three `path` is.
    revision:  the commit of a hub model; pins it in the run's record.
    """

    path: Path
    base_path: Path | None
    kind: Literal["folder", "gguf", "adapter"]
    revision: str | None


def locate_model(config: ModelConfig) -> ModelFiles:
    """Find the model's files, downloading a hub model; no weight is loaded.

    Raises ModelError, naming the model and the remedy, for a missing folder, a hub model that is neither
    reachable nor cached, a folder that holds no model, weights in a pickle only, or an architecture that is
    not a causal LM.
    """
    path, revision = _fetch_files(config)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{config.model}: a single file must be a .gguf file; give the model's folder instead"
            )
        return ModelFiles(path, None, "gguf", revision)
    if (path / "adapter_config.json").exists():
        return _locate_adapter(config, path, revision)
    gguf = _find_gguf(config, path)
    if gguf is not None:
        return ModelFiles(gguf, None, "gguf", revision)
    _check_folder(config, path)
    return ModelFiles(path, None, "folder", revision)


def _fetch_files(config: ModelConfig) -> tuple[Path, str | None]:
    """Return the local path of the model, downloaded if it is on the hub, and its hub commit."""
    local = Path(config.model).expanduser()
    if local.exists():
        return local.resolve(), None
    if _is_local_path(config.model):
        raise ModelError(
            f"model {config.model}: there is no such file or folder; correct the path, or give a hub id"
        )
    patterns = [config.gguf_file, *_ALLOW_PATTERNS] if config.gguf_file else list(_ALLOW_PATTERNS)
    patterns += ["*.py"] if config.trust_remote_code else []
    try:
        snapshot = Path(
            snapshot_download(
                config.model,
                revision=config.revision,
                allow_patterns=patterns,
                ignore_patterns=list(_IGNORE_PATTERNS),
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"model {config.model} is gated on the hub; accept its terms there and log in (`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"model {config.model} has no revision {config.revision!r} on the hub; check it"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model {config.model} is neither a local path nor a repository on the hub that you may read; "
            "check the name, or log in (`hf auth login`) if it is private"
        ) from error
    except HFValidationError as error:
        raise ModelError(
            f"model {config.model}: neither an existing path nor a hub id (owner/name); correct it"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise ModelError(
            f"model {config.model} is not in the hub's cache here and the hub cannot be reached "
            f"({get_first_error_line(error)}); connect once to download it, or give a local "
            "folder's path"
        ) from error
    return snapshot, snapshot.name


def _is_local_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(".gguf")


def _locate_adapter(config: ModelConfig, path: Path, revision: str | None) -> ModelFiles:
    settings = _read_json(path / "adapter_config.json")
    if settings.get("peft_type") in _PROMPT_ADAPTERS:
        raise ModelError(
            f"{config.model}: {settings['peft_type']} adapters add virtual tokens and cannot be scored "
            "exactly; use a LoRA adapter"
        )
    if not (path / "adapter_model.safetensors").exists():
        raise ModelError(
            f"{config.model}: the adapter has no adapter_model.safetensors; pickled weights (.bin) are not "
            "read: save it again with peft's save_pretrained"
        )
    base = config.base or settings.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{config.model}: adapter_config.json names no base model; give it as base: <model>")
    if config.base is None and (path / base).exists():
        base = str(path / base)
    try:
        found = locate_model(
            ModelConfig(
                model=base, revision=settings.get("revision"), trust_remote_code=config.trust_remote_code
            )
        )
    except ModelError as error:
        raise ModelError(
            f"the base of adapter {config.model} cannot be loaded: {error}. Where the base has moved, give "
            "base: <model>"
        ) from error
    if found.kind == "adapter":
        raise ModelError(
            f"{config.model}: its base {base} is an adapter itself; merge that one into its base first"
        )
    return ModelFiles(path, found.path, "adapter", revision)


def _find_gguf(config: ModelConfig, path: Path) -> Path | None:
    if config.gguf_file is not None:
        file = path / config.gguf_file
        if not file.is_file():
            names = ", ".join(sorted(p.name for p in path.glob("*.gguf"))) or "none"
            raise ModelError(f"{config.model} holds no file {config.gguf_file}; its GGUF files: {names}")
        return file
    files = sorted(path.glob("*.gguf"))
    if not files or (path / "config.json").exists():
        return None
    if len(files) > 1:
        names = " | ".join(p.name for p in files)
        raise ModelError(f"{config.model} holds several GGUF files; choose one as gguf_file: {names}")
    return files[0]


def _check_folder(config: ModelConfig, path: Path) -> None:
    if not (path / "config.json").exists():
        raise ModelError(
            f"{config.model} ({path}) is not a model folder: it has no config.json (nor adapter_config.json, "
            "nor a .gguf file); give the folder that save_pretrained wrote"
        )
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
        remedy = (
            "its weights are pickled (.bin), which can run code when read; convert them once with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            if pickled
            else "copy them there"
        )
        raise ModelError(f"{config.model} ({path}) has no *.safetensors weights; {remedy}")
    settings = _read_json(path / "config.json")
    if settings.get("is_encoder_decoder"):
        raise ModelError(
            f"{config.model} ({settings.get('model_type')}) is an encoder-decoder; use a decoder-only "
            "language model"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read as JSON ({get_first_error_line(error)}); copy the model again"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object; copy the model again")
    return content


def get_first_error_line(error: BaseException) -> str:
    """Return the first line of an error's message, without the pages that some libraries add."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
