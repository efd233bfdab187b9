"""Registered versions as folders on this machine: resolve, download, check against the digest, copy.

A copy is a folder that transformers, peft and vLLM load; it appears complete or not at all.
"""

import hashlib
import json
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config.paths import resolve_path
from orchestrator.errors import UsageError
from orchestrator.files import cache_folder, digest_folder, link_tree
from orchestrator.redaction import redact, summarize_error
from orchestrator.registry.versions import ADAPTER_DIGEST_TAG, DIGEST_TAG, find_version, shorten_digest
from orchestrator.storage.probe import find_write_problem
from orchestrator.tracking.mlflow import connect_to_mlflow, find_absent_database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


ADAPTER = "adapter"
"""Name of the subfolder of a version's folder that holds the LoRA adapter without its base model."""


class DamagedError(UsageError):
    """Error for a version whose files are not those that were registered."""


@dataclass(frozen=True)
class ResolvedModel:
    """A registered version and its transformers folder on this machine."""

    folder: Path
    name: str
    version: int
    run_id: str | None
    digest: str | None
    """Digest of the folder's files at registration; None for models registered by other programs."""

    @property
    def uri_pinned(self) -> str:
        """`models:/name/version`, which a run's record stores because an alias may move."""
        return f"models:/{self.name}/{self.version}"


def resolve_model(uri: str, tracking_uri: str, *, cache: Path | None = None) -> ResolvedModel:
    """Return the version that `models:/name@alias` or `models:/name/3` names, downloaded if it is not local.

    Raises UsageError for a URI without alias or version, an unknown name, alias or version, a version that is
    still being registered, and a model that is not a complete causal language model.
    """
    absent = find_absent_database(tracking_uri)
    if absent is not None:
        raise UsageError(
            f"{uri!r} is not in the registry: the registry is empty, as there is no MLflow database at "
            f"{absent}; set tracking.uri to the registry that has it"
        )
    client = connect_to_mlflow(tracking_uri)
    return resolve_version(client, find_version(client, uri), tracking_uri, cache=cache)


def resolve_version(
    client: "MlflowClient", version: "ModelVersion", tracking_uri: str, *, cache: Path | None = None
) -> ResolvedModel:
    """Return the version with its folder, downloaded if it is not local. Raises UsageError."""
    cache = cache or cache_folder("registry")
    folder = _find_transformers_folder(_fetch_root(client, version, tracking_uri, cache), version, cache)
    digest = version.tags.get(DIGEST_TAG)
    return ResolvedModel(folder, version.name, int(version.version), version.run_id or None, digest)


def check_digest(
    folder: Path, expected: str | None, uri: str, *, remedy: str = "register the model again"
) -> None:
    """Raise DamagedError unless the folder's files have the digest `expected`; None skips the check."""
    if expected is not None and (actual := digest_folder(folder)) != expected:
        raise DamagedError(
            f"the files of {uri} are not those that were registered (digest {shorten_digest(actual)}, "
            f"registered {shorten_digest(expected)}): they were changed or damaged since; {remedy}"
        )


def resolve_adapter(
    client: "MlflowClient", version: "ModelVersion", tracking_uri: str, *, cache: Path | None = None
) -> ResolvedModel | None:
    """Return the adapter of a version, without the merged model; None if polyref registered none with it."""
    digest = version.tags.get(ADAPTER_DIGEST_TAG)
    if digest is None:
        return None
    cache = cache or cache_folder("registry")
    folder = _fetch_artifacts(client, version, tracking_uri, cache, f"model/{ADAPTER}", digest)
    return ResolvedModel(folder, version.name, int(version.version), version.run_id or None, digest)


def read_version_text(client: "MlflowClient", version: "ModelVersion", tracking_uri: str, name: str) -> str:
    """Return the text of one file of a version; no other file is downloaded. Raises UsageError."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    uri = f"models:/{version.name}/{version.version}"
    source = client.get_model_version_download_uri(version.name, str(version.version))
    if is_local_uri(source):
        try:
            return (Path(local_file_uri_to_path(source)) / name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{name} of {uri} cannot be read: {summarize_error(error)}") from error
    with _download_artifacts(
        f"{source.rstrip('/')}/{name}", tracking_uri, uri, cache_folder("registry")
    ) as file:
        return file.read_text(encoding="utf-8")


def _fetch_root(client: "MlflowClient", version: "ModelVersion", tracking_uri: str, cache: Path) -> Path:
    return _fetch_artifacts(client, version, tracking_uri, cache, "", version.tags.get(DIGEST_TAG))


def _fetch_artifacts(
    client: "MlflowClient",
    version: "ModelVersion",
    tracking_uri: str,
    cache: Path,
    subfolder: str,
    digest: str | None,
) -> Path:
    """Return the folder of the version's artifacts, or of their `subfolder` unless that is "".

    Artifacts stored on this machine are used where they are, others are downloaded into `cache` and checked;
    a finished download is reused.
    """
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    source = client.get_model_version_download_uri(version.name, str(version.version))
    if is_local_uri(source) and (local := Path(local_file_uri_to_path(source)) / subfolder).is_dir():
        return local
    source = f"{source.rstrip('/')}/{subfolder}" if subfolder else source
    target = cache / hashlib.sha256(f"{tracking_uri} {source} {digest}".encode()).hexdigest()[:24]
    if target.is_dir():
        return target
    uri = f"models:/{version.name}/{version.version}"
    with _download_artifacts(source, tracking_uri, uri, cache) as downloaded:
        check_digest(downloaded if subfolder else downloaded / "model", digest, uri)
        _move_into_place(downloaded, target)
    return target


@contextmanager
def _download_artifacts(source: str, tracking_uri: str, uri: str, cache: Path) -> Iterator[Path]:
    """Yield a downloaded artifact folder, which is deleted afterwards unless the block moves it."""
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        try:
            folder = mlflow.artifacts.download_artifacts(source, dst_path=scratch, tracking_uri=tracking_uri)
        except (MlflowException, OSError) as error:
            raise UsageError(
                f"the files of {uri} cannot be downloaded from {redact(source)}: "
                f"{summarize_error(error)}; check that the artifact store is reachable from here"
            ) from error
        yield Path(folder)


def _move_into_place(folder: Path, target: Path) -> None:
    """Move a finished folder to `target`, unless another process has already put the same folder there."""
    try:
        folder.replace(target)
    except OSError:
        if not target.is_dir():
            raise


def _find_transformers_folder(root: Path, version: "ModelVersion", cache: Path) -> Path:
    """Return the folder under `root` that transformers loads, or peft if there is only an adapter."""
    if (root / "config.json").is_file() or (root / "adapter_config.json").is_file():
        return root
    model, adapter, tokenizer = root / "model", root / "peft", root / "components" / "tokenizer"
    if (adapter / "adapter_config.json").is_file():  # the base that MLflow writes beside it has no weights
        model = adapter
    elif not (model / "config.json").is_file():
        raise UsageError(
            f"models:/{version.name}/{version.version} holds no transformers model and no adapter: "
            "register a causal language model's folder"
        )
    if (model / "tokenizer_config.json").is_file() or not tokenizer.is_dir():
        return model
    # MLflow's own layout has the tokenizer in another folder; transformers needs both in one.
    target = cache / hashlib.sha256(f"joined {root.resolve()}".encode()).hexdigest()[:24]
    if not target.is_dir():
        for part in (model, tokenizer):
            refuse_links_outside(part, f"models:/{version.name}/{version.version}")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            merged = Path(scratch) / "model"
            link_tree(model, merged)
            link_tree(tokenizer, merged)
            _move_into_place(merged, target)
    return target


def copy_version(model: ResolvedModel, to: Path) -> None:
    """Copy the version's folder to `to`, checked against the digest it was registered with.

    Raises UsageError if `to` is not empty or the files are not those registered.
    """
    with fill_new_folder(to) as folder:
        _copy_and_check(model, folder)


def copy_merged_version(model: ResolvedModel, to: Path, *, base: str | None = None) -> None:
    """Write the version to `to` as a full model, without a separate adapter.

    A version that polyref registered contains the merged model already. An adapter without its base, which
    another program registered, is merged into its base, in the base's dtype; `base` names the base if it is
    not where the adapter's config says.

    Raises UsageError as `copy_version` does, ModelError if the base is not found or does not fit.
    """
    with fill_new_folder(to) as folder:
        if is_adapter_folder(model.folder):
            _merge_adapter_folder(model.folder, folder, base)
        else:
            _copy_and_check(model, folder)
            shutil.rmtree(folder / ADAPTER, ignore_errors=True)


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter without a full model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _copy_and_check(model: ResolvedModel, target: Path) -> None:
    refuse_links_outside(model.folder, model.uri_pinned)
    shutil.copytree(model.folder, target, dirs_exist_ok=True)
    downloaded = model.folder.is_relative_to(cache_folder("registry"))
    remedy = f"remove {model.folder} and get it again" if downloaded else "register the model again"
    check_digest(target, model.digest, model.uri_pinned, remedy=remedy)


def _merge_adapter_folder(folder: Path, target: Path, base: str | None) -> None:
    from models.adapters import merge_adapter
    from models.config import ModelConfig
    from models.load import export_model, load_model, load_tokenizer, locate_model

    config = ModelConfig(model=str(folder), base=base)
    located = locate_model(config)
    assert located.base_path is not None
    config = config.model_copy(update={"dtype": _read_dtype(located.base_path)})
    model = load_model(located, config, device="cpu", trainable=False)
    export_model(merge_adapter(model), load_tokenizer(located, config), target)


def _read_dtype(base: Path) -> str:
    """Return the dtype of a model folder's weights; float32 if its config names none."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) if base.is_dir() else {}
    dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return dtype if dtype in ("bfloat16", "float16") else "float32"


def resolve_free_folder(to: Path) -> Path:
    """Return `to` as an absolute path; raise UsageError unless a new folder can be created there.

    Nothing that is kept may be in its place.
    """
    resolved = resolve_path(to, field="--to")
    try:
        is_link, exists = to.is_symlink(), resolved.exists()
    except OSError:  # such as a name that is too long
        is_link = exists = False
    if is_link:
        raise UsageError(f"--to {to} is a link: give --to a new folder, by its own name")
    if exists and (not resolved.is_dir() or any(resolved.iterdir())):
        raise UsageError(f"--to {to} is not an empty folder: give --to a new one")
    if (problem := find_write_problem(resolved)) is not None:
        raise UsageError(f"--to {to} cannot be written ({problem}); give it a folder that can")
    if resolved == Path.cwd().resolve() or resolved.is_mount():
        raise UsageError(f"--to {to} is a folder in use: give --to a new one in it, e.g. --to {to / 'model'}")
    return resolved


@contextmanager
def fill_new_folder(to: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `to`, which becomes `to` if the block ends without an error.

    An empty folder that was there keeps its permissions. What a killed command leaves is named for polyref.
    """
    to = resolve_free_folder(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{to.name}.polyref-", dir=to.parent))
    try:
        yield temporary
        temporary.chmod(stat.S_IMODE(to.stat().st_mode) if to.exists() else 0o755)
        try:
            temporary.replace(to)  # fails where something has appeared meanwhile
        except OSError as error:
            raise UsageError(
                f"{to} was filled meanwhile and is left as it is: give --to a new one"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_links_outside(folder: Path, uri: str) -> None:
    """Raise UsageError if a link below `folder` leads out of it, or to a folder, perhaps the link's own.

    A copy would hold what it leads to: files of the user's, or copies without end.
    """
    root = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(root)):
            raise UsageError(
                f"the files of {uri} are not copied: {path} is a link that leads out of the version's folder "
                "or to a folder; register the model from a folder without such links"
            )
