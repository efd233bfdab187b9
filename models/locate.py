"""Find a model's files: a local folder, a file, or the hub's cache; models that cannot work are refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
from models.weight_files import (
    get_first_error_line,
    list_weight_files,
    read_settings_file,
    read_shapes,
    refuse_special_entries,
)

_ALLOW_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer*", "*.model", "README.md")
_IGNORE_PATTERNS = ("onnx/*", "original/*", "*/*.safetensors")
_PROMPT_ADAPTERS = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"})


@dataclass(frozen=True)
class ModelFiles:
    """The location of a model's files.

    path:      model folder, .gguf file or adapter folder.
    base_path: for an adapter, the path of its base (a folder or .gguf file).
    kind:      which of the three `path` is.
    revision:  the commit of a hub model; pins it in the run's record.
    trusted:   which of the two paths may run code of their own: with `trust_remote_code`, those that the user
               has named. A base that an adapter names is its author's choice.
    """

    path: Path
    base_path: Path | None
    kind: Literal["folder", "gguf", "adapter"]
    revision: str | None
    trusted: tuple[Path, ...]


def locate_model(config: ModelConfig) -> ModelFiles:
    """Find the model's files, downloading a hub model; no weight is loaded.

    Raises ModelError, naming the model and the remedy, for a missing folder, a hub model that is neither
    reachable nor cached, a folder that holds no model, weights in a pickle only, or an architecture that is
    not a causal LM.
    """
    return _locate(config, is_base=False)


def _locate(config: ModelConfig, *, is_base: bool) -> ModelFiles:
    path, revision = _fetch_files(config)
    trusted = (path,) if config.trust_remote_code else ()
    if not path.is_dir():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{config.model}: a single file must be a .gguf file; give the model's folder instead"
            )
        if not path.is_file():
            raise ModelError(f"{config.model} is a pipe, a socket or a device; give a file")
        return ModelFiles(path, None, "gguf", revision, trusted)
    refuse_special_entries(path)
    if (path / "adapter_config.json").exists():
        if is_base:
            raise ModelError(f"{config.model} is an adapter itself; merge that one into its base first")
        return _locate_adapter(config, path, revision)
    gguf = _find_gguf(config, path)
    if gguf is not None:
        return ModelFiles(gguf, None, "gguf", revision, (gguf,) if trusted else ())
    _check_folder(config, path)
    return ModelFiles(path, None, "folder", revision, trusted)


def _fetch_files(config: ModelConfig) -> tuple[Path, str | None]:
    """Return the local path of the model, downloaded if it is on the hub, and its hub commit."""
    local = find_path(config.model)
    if local is not None:
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


def find_path(name: str) -> Path | None:
    """Return the path of that name; None if there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, of an unknown user, with a NUL
        return None


def _is_local_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(".gguf")


def _locate_adapter(config: ModelConfig, path: Path, revision: str | None) -> ModelFiles:
    settings = read_settings_file(path / "adapter_config.json")
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
    base, base_revision = config.base, None
    if base is None:
        base, base_revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base.strip() or not isinstance(base_revision, str | None):
        raise ModelError(f"{config.model}: adapter_config.json names no base model; give it as base: <model>")
    if config.base is None and (beside := find_path(str(path / base))) is not None:
        base = str(beside)
    try:
        named = ModelConfig(
            model=base,
            revision=base_revision,
            trust_remote_code=config.trust_remote_code and config.base is not None,
        )
        found = _locate(named, is_base=True)
    except ModelError as error:
        raise ModelError(
            f"the base of adapter {config.model} cannot be loaded: {error}. Where the base has moved, give "
            "base: <model>"
        ) from error
    trusted = (path,) if config.trust_remote_code else ()
    return ModelFiles(path, found.path, "adapter", revision, trusted + found.trusted)


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
    if not any(path.glob("*.safetensors*")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
        remedy = (
            "its weights are pickled (.bin), which can run code when read; convert them once with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            if pickled
            else "copy them there"
        )
        raise ModelError(f"{config.model} ({path}) has no *.safetensors weights; {remedy}")
    settings = read_settings_file(path / "config.json")
    if settings.get("is_encoder_decoder"):
        raise ModelError(
            f"{config.model} ({settings.get('model_type')}) is an encoder-decoder; use a decoder-only "
            "language model"
        )
    read_shapes(list_weight_files(path))
