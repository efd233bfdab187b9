"""Models in MLflow's registry: what a `models:/` URI stands for, and the folder here that holds it.

A version's folder, as `orchestrator.registry.register` writes it and `models.load` reads it, is a transformers folder
(safetensors, config, tokenizer, model card) with the adapter alone in its subfolder `adapter`. Models that
other programs registered are read too: MLflow's transformers flavour, transformers and PEFT folders.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config.run import UsageError, did_you_mean
from orchestrator.tracking.mlflow import connect, first_line, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

STATE_TAG, DIGEST_TAG, ADAPTER_DIGEST_TAG = "polyref.state", "polyref.digest", "polyref.adapter_digest"
VERIFYING, VERIFIED = "verifying", "verified"
ADAPTER = "adapter"
"""The subfolder of a version's folder that holds the adapter alone."""
_REF = re.compile(r"(?:models:/)?(?P<name>[^@/:]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))?")


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


def resolve(uri: str, tracking_uri: str, *, cache: Path | None = None) -> ResolvedModel:
    """The version that `models:/name@alias` or `models:/name/3` stands for, downloaded if it is not local.

    Raises UsageError for a URI without alias or version, an unknown name, alias or version, a version that is
    still being registered, and a model that is not a whole causal language model.
    """
    client = connect(tracking_uri)
    return resolve_version(client, find_version(client, uri), tracking_uri, cache=cache)


def resolve_version(
    client: "MlflowClient", version: "ModelVersion", tracking_uri: str, *, cache: Path | None = None
) -> ResolvedModel:
    """The version with its folder, downloaded if it is not local. Raises UsageError as `resolve` does."""
    cache = cache or cache_folder()
    folder = _transformers_folder(_local_root(client, version, tracking_uri, cache), version, cache)
    digest = version.tags.get(DIGEST_TAG)
    return ResolvedModel(folder, version.name, int(version.version), version.run_id or None, digest)


def cache_folder() -> Path:
    """Where downloaded models are kept: `$POLYREF_CACHE` or `~/.cache/polyref`."""
    return Path(os.environ.get("POLYREF_CACHE") or Path.home() / ".cache" / "polyref") / "registry"


@dataclass(frozen=True)
class Ref:
    """A registered model as users write it."""

    name: str
    alias: str | None
    version: str | None

    @property
    def open(self) -> bool:
        """Whether it leaves the version open."""
        return self.alias is None and self.version is None


def split_ref(ref: str) -> Ref:
    """`name`, `name@alias` or `name/3`, with or without `models:/` in front. Raises UsageError."""
    match = _REF.fullmatch(ref)
    if match is None:
        raise UsageError(
            f"{ref!r} names no registered model: write models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    return Ref(match["name"], match["alias"], match["version"])


def find_version(client: "MlflowClient", ref: str) -> "ModelVersion":
    """The registered version of `name@alias` or `name/3`, with or without `models:/` in front.

    Raises UsageError as `resolve` does.
    """
    from mlflow.exceptions import MlflowException

    wanted = split_ref(ref)
    name = wanted.name
    if wanted.open:
        raise UsageError(f"{ref!r} leaves the version open: {_choices(client, name)}")
    try:
        if wanted.alias is not None:
            found = client.get_model_version_by_alias(name, wanted.alias)
        else:
            found = client.get_model_version(name, str(wanted.version))
    except MlflowException as error:
        raise UsageError(f"{ref!r} is not in the registry: {_choices(client, name)}") from error
    if found.tags.get(STATE_TAG) == VERIFYING:
        raise UsageError(
            f"version {found.version} of {name!r} was never verified, its registration was cut short: "
            "run the training again to finish it, or choose another version"
        )
    return found


def versions(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    """One registered model's versions that count, newest first. Raises UsageError for an unknown name."""
    aliases = _registered(client, name).aliases
    found = [v for v in _search(client, name) if v.tags.get(STATE_TAG) != VERIFYING]
    for version in found:
        version.aliases = sorted(a for a, number in aliases.items() if int(number) == int(version.version))
    return sorted(found, key=lambda v: -int(v.version))


def names(client: "MlflowClient") -> list[str]:
    """The registered models' names in order."""
    found, token = [], None
    while True:
        page = client.search_registered_models(max_results=100, page_token=token)
        found += [model.name for model in page]
        token = page.token
        if not token:
            return sorted(found)


def check_digest(
    folder: Path, expected: str | None, uri: str, *, remedy: str = "register the model again"
) -> None:
    """Raise DamagedError unless the folder's files are those registered; None checks nothing."""
    if expected is not None and (actual := folder_digest(folder)) != expected:
        raise DamagedError(
            f"the files of {uri} are not those that were registered (digest {short(actual)}, "
            f"registered {short(expected)}): they were changed or damaged since; {remedy}"
        )


def folder_digest(folder: Path, suffix: str = "") -> str:
    """SHA-256 over the names and contents of all files below, or of those whose name ends with `suffix`."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(f"*{suffix}") if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{content}  {path.relative_to(folder).as_posix()}\n".encode())
    return whole.hexdigest()


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder, by hard links where the file system has them: weights are large."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


def _search(client: "MlflowClient", name: str) -> "Iterable[ModelVersion]":
    token = None
    while True:
        page = client.search_model_versions(f"name='{name}'", max_results=200, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _registered(client: "MlflowClient", name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        known = names(client)
        remedy = did_you_mean(name, known) if known else "; the registry is empty"
        raise UsageError(f"no registered model is called {name!r}{remedy}") from error


def _choices(client: "MlflowClient", name: str) -> str:
    found = versions(client, name)
    if not found:
        return f"{name!r} has no versions yet"
    written = [f"{name}@{alias}" for version in found for alias in version.aliases]
    written += [f"{name}/{version.version}" for version in found]
    return f"choose one of {', '.join(written[:12])}{', …' if len(written) > 12 else ''}"


def short(digest: str | None) -> str:
    """A digest as people read it."""
    return "unknown" if digest is None else digest[:12]


def adapter_alone(
    client: "MlflowClient", version: "ModelVersion", tracking_uri: str, *, cache: Path | None = None
) -> ResolvedModel | None:
    """The adapter in a version of polyref's, had without the merged model; None where there is none."""
    digest = version.tags.get(ADAPTER_DIGEST_TAG)
    if digest is None:
        return None
    cache = cache or cache_folder()
    folder = _local(client, version, tracking_uri, cache, f"model/{ADAPTER}", digest)
    return ResolvedModel(folder, version.name, int(version.version), version.run_id or None, digest)


def _local_root(client: "MlflowClient", version: "ModelVersion", tracking_uri: str, cache: Path) -> Path:
    return _local(client, version, tracking_uri, cache, "", version.tags.get(DIGEST_TAG))


def _local(
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
    with _downloaded(source, tracking_uri, where, cache) as whole:
        check_digest(whole if part else whole / "model", digest, where)
        _move(whole, target)
    return target


@contextmanager
def _downloaded(source: str, tracking_uri: str, where: str, cache: Path) -> Iterator[Path]:
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
                f"{first_line(error)}; check that the artifact store is reachable from here"
            ) from error
        yield Path(whole)


def _move(folder: Path, target: Path) -> None:
    """Put a finished folder in its place; another process that was faster made the same one."""
    try:
        os.replace(folder, target)
    except OSError:
        if not target.is_dir():
            raise


def _transformers_folder(root: Path, version: "ModelVersion", cache: Path) -> Path:
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
            _move(joined, target)
    return target
