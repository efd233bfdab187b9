"""What of a registered version is given to others: weights, tokenizer, configuration and card, nothing else.

The same files are uploaded to a hub or written to a folder. A file that is not known to belong to a model is
left out, and paths of this machine are taken out of configurations.
"""

import fnmatch
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UsageError
from orchestrator.registry.download import (
    ADAPTER,
    ResolvedModel,
    check_digest,
    fill_new_folder,
    read_version_text,
    refuse_links_outside,
    resolve_adapter,
    resolve_version,
)
from orchestrator.registry.lineage import LINEAGE_FILE, parse_lineage
from orchestrator.registry.model_card import HubTarget, render_model_card
from orchestrator.registry.versions import ADAPTER_DIGEST_TAG, DIGEST_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CARD = "README.md"
_WEIGHTS = (
    "model.safetensors",
    "model-[0-9]*-of-[0-9]*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
_SETTINGS = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)
_MAY_NAME_PATHS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")
_PATH_KEYS = ("path", "file", "dir", "folder")
_OTHER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf")


@dataclass(frozen=True)
class Publication:
    """The files of a version as others get them.

    Attributes:
        uri: the version, pinned: `models:/name/3`.
        name, version: the same in parts.
        adapter_only: whether it is the adapter without the model.
        files: content by path in the repository: a file, or bytes that differ from the registered file's.
        left_out: files of the version that are not given away, by path.
    """

    uri: str
    name: str
    version: int
    adapter_only: bool
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]

    def write_to(self, folder: Path) -> None:
        """Write the files to a new folder, which appears whole or not at all. Raises UsageError."""
        with fill_new_folder(folder) as target:
            for name, content in self.files.items():
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    path.write_bytes(content)
                else:
                    shutil.copyfile(content, path)


def refuse_unpublishable(version: "ModelVersion", *, adapter_only: bool) -> None:
    """Raise UsageError for a version of another program, or for one without the adapter requested."""
    uri = f"models:/{version.name}/{version.version}"
    if DIGEST_TAG not in version.tags:
        raise UsageError(
            f"{uri} was registered by another program, so polyref cannot write its card: "
            "`polyref models get` copies it, and `hf upload` uploads the copy with a card of your own"
        )
    if adapter_only and ADAPTER_DIGEST_TAG not in version.tags:
        raise UsageError(f"{uri} has no separate adapter: leave out --adapter to push the model")


def prepare_publication(
    client: "MlflowClient", version: "ModelVersion", tracking_uri: str, repo: str, *, adapter_only: bool
) -> Publication:
    """Fetch a version, check it against its digest, and choose what of it is published.

    Raises:
        UsageError: `refuse_unpublishable` refuses the version, its files are damaged, or the model needs
            Python code of its own, which is not published.
    """
    refuse_unpublishable(version, adapter_only=adapter_only)
    uri = f"models:/{version.name}/{version.version}"
    lineage = parse_lineage(read_version_text(client, version, tracking_uri, LINEAGE_FILE), uri)
    model = resolve_adapter(client, version, tracking_uri) if adapter_only else None
    model = model or resolve_version(client, version, tracking_uri)
    refuse_links_outside(model.folder, uri)
    check_digest(model.folder, model.digest, uri)
    has_adapter = adapter_only or (model.folder / ADAPTER).is_dir()
    card = render_model_card(version.name, lineage, adapter=has_adapter, hub=HubTarget(repo, adapter_only))
    _refuse_own_code(model.folder, uri)
    files, left_out = _choose_files(model)
    files[CARD] = card.encode()
    return Publication(uri, model.name, model.version, adapter_only, files, tuple(left_out))


def is_model_file(path: str) -> bool:
    """Whether a path in a repository is one that a publication may have, its card excepted."""
    inner = path.removeprefix(f"{ADAPTER}/")
    return any(fnmatch.fnmatchcase(inner, pattern) for pattern in (*_WEIGHTS, *_SETTINGS))


def has_weights(paths: Iterable[str]) -> bool:
    """Whether any of the paths is of a file of weights, of whatever program."""
    return any(fnmatch.fnmatchcase(PurePosixPath(p).name, w) for p in paths for w in _OTHER_WEIGHTS)


def _refuse_own_code(folder: Path, uri: str) -> None:
    config = folder / "config.json"
    if config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8")):
        raise UsageError(
            f"{uri} needs Python code of its own (auto_map in its config.json), which push does not upload: "
            "`polyref models get` copies it, and `hf upload` uploads the copy"
        )


def _choose_files(model: ResolvedModel) -> tuple[dict[str, Path | bytes], list[str]]:
    """Return the contents to publish by path, and the paths of what is left out."""
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(p for p in model.folder.rglob("*") if p.is_file()):
        name = path.relative_to(model.folder).as_posix()
        if is_model_file(name):
            files[name] = _remove_paths(path) if path.name in _MAY_NAME_PATHS else path
        elif name != CARD:
            left_out.append(name)
    return files, left_out


def _remove_paths(path: Path) -> Path | bytes:
    """Return a configuration in which a path of this machine is its last part; the file if it names none."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    public = _shorten_paths(settings)
    return path if public == settings else (json.dumps(public, indent=2, sort_keys=True) + "\n").encode()


def _shorten_paths(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _shorten_paths(inner, name) for name, inner in value.items()}
    # By its key: a special token may look like a path too.
    is_path = isinstance(value, str) and key.endswith(_PATH_KEYS) and _is_path(value)
    return PurePath(value).name if is_path else value


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../")) or bool(PureWindowsPath(text).drive)
