"""Registered versions as folders on this machine: resolved, downloaded, checked against their digest, copied.

A copy is a folder that transformers, peft and vLLM load; it appears whole or not at all.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UsageError
from orchestrator.files import cache_folder, digest_folder, link_tree
from orchestrator.redaction import redact, summarize_error
from orchestrator.registry.versions import ADAPTER_DIGEST_TAG, DIGEST_TAG, find_version, shorten_digest
from orchestrator.tracking.mlflow import connect_to_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


class DamagedError(UsageError):
    """A version's files are not those that were registered."""


@dataclass(frozen=True)
class ResolvedModel:
    """One registered version, with its transformers folder on this machine."""

    folder: Path
    name: str
    version: int
    run_id: str | None
    digest: str | None
    """Digest of the folder's files when it was registered; None for models registered by other programs."""

    @property
    def uri_pinned(self) -> str:
        """`models:/name/version`: what a run's record keeps, since an alias may move."""
        return f"models:/{self.name}/{self.version}"


def resolve_model(uri: str, tracking_uri: str, *, cache: Path | None = None) -> ResolvedModel:
    """The version that `models:/name@alias` or `models:/name/3` stands for, downloaded if it is not local.

    Raises UsageError for a URI without alias or version, an unknown name, alias or version, a version that is
    still being registered, and a model that is not a whole causal language model.
    """
    client = connect_to_mlflow(tracking_uri)
    return resolve_version(client, find_version(client, uri), tracking_uri, cache=cache)


def resolve_version(
    client: "MlflowClient", version: "ModelVersion", tracking_uri: str, *, cache: Path | None = None
) -> ResolvedModel:
    """The version with its folder, downloaded if it is not local. Raises UsageError as `resolve` does."""
    cache = cache or cache_folder("registry")
    folder = _find_transformers_folder(_fetch_root(client, version, tracking_uri, cache), version, cache)
    digest = version.tags.get(DIGEST_TAG)
    return ResolvedModel(folder, version.name, int(version.version), version.run_id or None, digest)


def check_digest(
    folder: Path, expected: str | None, uri: str, *, remedy: str = "register the model again"
) -> None:
    """Raise DamagedError unless the folder's files are those registered; None checks nothing."""
    if expected is not None and (actual := digest_folder(folder)) != expected:
        raise DamagedError(
            f"the files of {uri} are not those that were registered (digest {shorten_digest(actual)}, "
            f"registered {shorten_digest(expected)}): they were changed or damaged since; {remedy}"
        )


def resolve_adapter(
    client: "MlflowClient", version: "ModelVersion", tracking_uri: str, *, cache: Path | None = None
) -> ResolvedModel | None:
    """The adapter in a version of polyref's, had without the merged model; None where there is none."""
    digest = version.tags.get(ADAPTER_DIGEST_TAG)
    if digest is None:
        return None
    cache = cache or cache_folder("registry")
    folder = _fetch_artifacts(client, version, tracking_uri, cache, f"model/{ADAPTER}", digest)
    return ResolvedModel(folder, version.name, int(version.version), version.run_id or None, digest)


def _fetch_root(client: "MlflowClient", version: "ModelVersion", tracking_uri: str, cache: Path) -> Path:
    return _fetch_artifacts(client, version, tracking_uri, cache, "", version.tags.get(DIGEST_TAG))


def _fetch_artifacts(
    client: "MlflowClient",
    version: "ModelVersion",
    tracking_uri: str,
    cache: Path,
    part: str,
    digest: str | None,
) -> Path:
    """The version's artifacts (`part` of them): where they lie when that is on this machine, else downloaded.

    A download is checked before it counts; one that was finished is not made again.
    """
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    source = client.get_model_version_download_uri(version.name, str(version.version))
    if is_local_uri(source) and (local := Path(local_file_uri_to_path(source)) / part).is_dir():
        return local
    source = f"{source.rstrip('/')}/{part}" if part else source
    target = cache / hashlib.sha256(f"{tracking_uri} {source} {digest}".encode()).hexdigest()[:24]
    if target.is_dir():
        return target
    where = f"models:/{version.name}/{version.version}"
    with _download_artifacts(source, tracking_uri, where, cache) as whole:
        check_digest(whole if part else whole / "model", digest, where)
        _move_into_place(whole, target)
    return target


@contextmanager
def _download_artifacts(source: str, tracking_uri: str, where: str, cache: Path) -> Iterator[Path]:
    """A copy of an artifact folder, gone afterwards unless it was moved."""
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        try:
            whole = mlflow.artifacts.download_artifacts(source, dst_path=scratch, tracking_uri=tracking_uri)
        except (MlflowException, OSError) as error:
            raise UsageError(
                f"the files of {where} cannot be had from {redact(source)}: "
                f"{summarize_error(error)}; check that the artifact store is reachable from here"
            ) from error
        yield Path(whole)


def _move_into_place(folder: Path, target: Path) -> None:
    """Put a finished folder in its place; another process that was faster made the same one."""
    try:
        os.replace(folder, target)
    except OSError:
        if not target.is_dir():
            raise


def _find_transformers_folder(root: Path, version: "ModelVersion", cache: Path) -> Path:
    """The folder under `root` that transformers loads, or of an adapter alone the one that peft loads."""
    if (root / "config.json").is_file() or (root / "adapter_config.json").is_file():
        return root
    model, adapter, tokenizer = root / "model", root / "peft", root / "components" / "tokenizer"
    if (adapter / "adapter_config.json").is_file():  # the base that MLflow put beside it lacks weights
        model = adapter
    elif not (model / "config.json").is_file():
        where = f"models:/{version.name}/{version.version}"
        raise UsageError(
            f"{where} holds no transformers model and no adapter: register a causal language model's folder"
        )
    if (model / "tokenizer_config.json").is_file() or not tokenizer.is_dir():
        return model
    # MLflow's own layout keeps the tokenizer apart; transformers wants both in one folder.
    target = cache / hashlib.sha256(f"joined {root.resolve()}".encode()).hexdigest()[:24]
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as part:
            joined = Path(part) / "model"
            link_tree(model, joined)
            link_tree(tokenizer, joined)
            _move_into_place(joined, target)
    return target


def copy_version(model: ResolvedModel, to: Path) -> None:
    """Copy the version's folder to `to`, checked against the digest it was registered with.

    Raises UsageError when `to` holds something or the files are not those registered.
    """
    with _fill_new_folder(to) as part:
        _copy_checked(model, part)


def copy_merged_version(model: ResolvedModel, to: Path, *, base: str | None = None) -> None:
    """Make `to` one whole model without an adapter beside it.

    A version of polyref's holds it already. An adapter alone, which another program registered, is merged
    into its base, in the base's dtype; `base` says where that is if not where the adapter's config says.

    Raises UsageError as `fetch` does, ModelError when the base is not to be had or does not fit.
    """
    with _fill_new_folder(to) as part:
        if is_adapter_folder(model.folder):
            _merge_adapter_folder(model.folder, part, base)
        else:
            _copy_checked(model, part)
            shutil.rmtree(part / ADAPTER, ignore_errors=True)


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter alone."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _copy_checked(model: ResolvedModel, part: Path) -> None:
    shutil.copytree(model.folder, part, dirs_exist_ok=True)
    downloaded = model.folder.is_relative_to(cache_folder("registry"))
    remedy = f"remove {model.folder} and get it again" if downloaded else "register the model again"
    check_digest(part, model.digest, model.uri_pinned, remedy=remedy)


def _merge_adapter_folder(folder: Path, part: Path, base: str | None) -> None:
    from models.adapters import merge
    from models.config import ModelConfig
    from models.load import export, load_model, load_tokenizer, locate

    config = ModelConfig(model=str(folder), base=base)
    located = locate(config)
    assert located.base_path is not None
    config = config.model_copy(update={"dtype": _read_dtype(located.base_path)})
    model = load_model(located, config, device="cpu", trainable=False)
    export(merge(model), load_tokenizer(located, config), part)


def _read_dtype(base: Path) -> str:
    """What a model folder's weights are in; float32 where its config does not say."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) if base.is_dir() else {}
    dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return dtype if dtype in ("bfloat16", "float16") else "float32"


def resolve_free_folder(to: Path) -> Path:
    """Where a new folder may come, with links followed; UsageError where it cannot."""
    place = to.resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(f"{to} is not an empty folder: give --to a new one")
    if place == Path.cwd().resolve() or place.is_mount():
        raise UsageError(f"{to} is a folder in use: give --to a new one in it, e.g. --to {to / 'model'}")
    return place


@contextmanager
def _fill_new_folder(to: Path) -> Iterator[Path]:
    """A folder beside `to` to fill, which becomes `to` when all went well."""
    to = resolve_free_folder(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        yield part
        part.chmod(0o755)
        os.replace(part, to)
    finally:
        shutil.rmtree(part, ignore_errors=True)


ADAPTER = "adapter"
"""The subfolder of a version's folder that holds the adapter alone."""
