"""Collecting this machine's files that a submitted job needs, and no others: no runs, caches or other data.

Relative paths are on this machine and are sent; absolute paths and URIs are on the cluster and stay as they
are. Models are never sent.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.functions import PACKAGES, list_functions
from orchestrator.config.run import RunConfig, load_run
from orchestrator.config.sweep import load_sweep
from orchestrator.config.yaml import apply_overrides, read_yaml
from orchestrator.errors import UsageError, did_you_mean
from orchestrator.redaction import redact

MAX_SIZE_MB = 50
_RUN_COMMANDS, _SWEEP_COMMANDS, _REGISTRY_COMMANDS = ("train", "score", "check"), ("tune",), ("models",)
_DATA_NAME = re.compile(r"\.(jsonl|ndjson|json|parquet|csv|tsv)(\.(gz|bz2|xz|zst))?$")
_BUCKET_CREDENTIALS = re.compile(
    r"\b(s3|gs|gcs|abfss?)://[^@\s]*:[^@\s]*@", re.I
)  # a secret may contain slashes
_AZURE_CONTAINER = re.compile(
    r"\b(abfss?://)[^/@:\s]+@", re.I
)  # a container's name is where other URIs have a user name


@dataclass(frozen=True)
class JobBundle:
    """A command for the cluster and the files that it needs.

    Attributes:
        name: name of the run, the search or the command, for the job's id.
        command: the command after `polyref`, with paths as they are in the bundle.
        files: local paths by path in the bundle.
    """

    name: str
    command: tuple[str, ...]
    files: dict[str, Path]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    def write(self, folder: Path) -> None:
        """Copy the files into an empty folder."""
        for name, source in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def build_bundle(command: Sequence[str], *, code: bool = False) -> JobBundle:
    """Check a command as far as possible without a cluster, and collect the files it needs.

    Args:
        command: `train run.yaml loss.beta=0.2`, or any other command that can run as a job.
        code: send polyref's own packages too, instead of using those installed on the nodes.

    Raises:
        UsageError: the run or sweep file is wrong, or something cannot be sent.
    """
    verb, arguments = (command[0], list(command[1:])) if command else ("", [])
    known = (*_RUN_COMMANDS, *_SWEEP_COMMANDS, *_REGISTRY_COMMANDS)
    if verb == "label":
        raise UsageError(
            "label cannot be submitted: its output would be deleted with the job's folder; run it on a "
            "node of the cluster with RAY_ADDRESS=auto, and its judges run on all nodes"
        )
    if verb not in known:
        raise UsageError(
            f"{verb or 'nothing'} cannot be submitted{did_you_mean(verb, known)}; "
            "e.g. polyref submit -- train run.yaml"
        )
    for argument in arguments:
        field_name = re.match(r"[\w.-]+(?==)", argument)
        _refuse_credentials(argument, redact(field_name[0]) if field_name else "an argument")
    files = _list_package_files() if code else {}
    if verb in _REGISTRY_COMMANDS:
        _refuse_lost_copy(arguments)
        return _refuse_too_large(JobBundle(verb, tuple(command), files))
    position, file = _find_file_argument(verb, arguments)
    overrides = [a for i, a in enumerate(arguments) if i != position and "=" in a and not a.startswith("-")]
    needed = [("the file", file)]
    if verb in _SWEEP_COMMANDS:
        needed += _list_base_run(file, overrides)
    for _, path in needed:
        _refuse_credentials(read_yaml(path), path)
    if verb in _SWEEP_COMMANDS:
        sweep = load_sweep(file, overrides)
        name, run, field = sweep.name, sweep.base, "run.storage_path"
        _refuse_lost_journal(run, field)
    else:
        run = load_run(file, overrides)
        name, field = run.name, "storage_path"
    _refuse_lost_results(run, field)
    for what, path in [*needed, *_list_local_sources(run)]:
        files |= _list_files(what, path)
    arguments[position] = _make_relative(Path(file), "the file").as_posix()
    return _refuse_too_large(JobBundle(name, (verb, *arguments), files))


def _find_file_argument(verb: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Find the run or sweep file: the first argument that is no option, override or option's number.

    Returns:
        Its position among the arguments, and its path.
    """
    for position, argument in enumerate(arguments):
        is_number = argument.replace(".", "", 1).isdigit()
        if not argument.startswith("-") and "=" not in argument and not is_number:
            return position, argument
    kind = "sweep" if verb in _SWEEP_COMMANDS else "run"
    raise UsageError(f"{verb} needs a {kind} file, e.g. polyref submit -- {verb} {kind}.yaml")


def _list_base_run(file: str, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Return the run file's path, if the sweep file names one, with the field for messages."""
    run_overrides = [text for text in overrides if text.startswith("run=")]
    run = apply_overrides(read_yaml(file, what="sweep file"), run_overrides).get("run")
    if not isinstance(run, str):
        return []
    if Path(run).expanduser().is_absolute():
        raise UsageError(f"{file}: run: {run} is not sent with a job; name it relative to {file}")
    return [(f"{file}: run", os.path.relpath(Path(file).parent / run))]


def has_credentials(text: str) -> bool:
    """Whether a text contains a password, key, token or signature, inside a URI or alone."""
    text = _AZURE_CONTAINER.sub(r"\1", text)
    return redact(text) != text or _BUCKET_CREDENTIALS.search(text) is not None


def _refuse_credentials(value: Any, where: str) -> None:
    """Refuse a value that has credentials, or contains one that does; the message does not show it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _refuse_credentials(inner, f"{where}{'.' if ': ' in where else ': '}{name}")
    elif isinstance(value, list):
        for inner in value:
            _refuse_credentials(inner, where)
    elif isinstance(value, str) and has_credentials(value):
        raise UsageError(
            f"{where} holds credentials, which a job's description or files would show; leave them out and "
            "give them with --secret, e.g. --secret AWS_ACCESS_KEY_ID --secret AWS_SECRET_ACCESS_KEY or "
            "--secret MLFLOW_TRACKING_USERNAME --secret MLFLOW_TRACKING_PASSWORD"
        )


def _refuse_lost_copy(arguments: Sequence[str]) -> None:
    if next((argument for argument in arguments if not argument.startswith("-")), None) == "get":
        raise UsageError(
            "models get copies to a folder, and a job's folder is deleted with the job; run it on the "
            "machine that wants the copy, with MLFLOW_TRACKING_URI naming the cluster's registry. Jobs name "
            "a registered model as models:/name@alias"
        )


def _refuse_lost_journal(run: RunConfig, field: str) -> None:
    if "://" in run.storage_path:
        raise UsageError(
            f"{field} is a URI, and a search keeps its journal in a folder: name one that all nodes share, "
            f"e.g. {field}=/shared/polyref/runs"
        )


def _refuse_lost_results(run: RunConfig, field: str) -> None:
    storage, uri = run.storage_path, run.tracking.uri
    if "://" not in storage and not Path(storage).is_absolute():
        where = "in a home folder" if storage.startswith("~") else "relative"
        raise UsageError(
            f"storage_path {storage} is {where}, and a job's working folder is deleted with the job; "
            f"give a path that all nodes share, e.g. {field}=/shared/polyref/runs"
        )
    is_relative = uri is not None and re.match(r"sqlite:///(?!/)|(?!\w+:)(?!/)", uri)
    if is_relative:
        raise UsageError(
            f"tracking.uri {uri} is relative, and a job's working folder is deleted with the job; leave "
            "it out for the cluster's registry, or name a server"
        )


def _list_local_sources(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the run file's relative paths on this machine, each with the field that names it."""
    for field, source in run.data.list_sources().items():
        if _is_local(source):
            if Path(source).exists():
                yield field, source
            elif _DATA_NAME.search(source):
                raise UsageError(f"{field}: {source}: there is no such file here, so it cannot be sent")
    settings: dict[str, Any] = {"policy": run.policy}
    settings |= {f"references.models.{name}": model for name, model in run.references.models.items()}
    for field, model in settings.items():
        for key in ("model", "base"):
            _refuse_local_model(f"{field}.{key}", getattr(model, key))
        template = model.chat_template
        if template is not None and "{" not in template and _is_local(template) and Path(template).exists():
            yield f"{field}.chat_template", template
    reward = run.evaluation.sampling and run.evaluation.sampling.reward
    if reward and reward.model:
        _refuse_local_model("evaluation.sampling.reward.model", reward.model)
    for field, function in list_functions(run).items():
        package = Path(function.partition(":")[0].partition(".")[0])
        if package.name not in PACKAGES:
            sources = [path for path in (package, package.with_suffix(".py")) if path.exists()]
            yield from ((field, str(path)) for path in sources)


def _refuse_local_model(field: str, name: str | None) -> None:
    if name is not None and "://" not in name and not name.startswith("models:/"):
        path = Path(name).expanduser()
        if path.exists() and (_is_local(name) or name.startswith("~")):
            raise UsageError(
                f"{field}: {name} is on this machine, and models are not sent with a job; copy it to storage "
                f"that all nodes share and name it there, e.g. {field}=/shared/polyref/models/{path.name}, "
                "or give a hub id or models:/name@alias"
            )


def _is_local(path: str) -> bool:
    """Whether a path is on this machine, not on the cluster."""
    return "://" not in path and not path.startswith(("/", "~"))


def _make_relative(path: Path, what: str) -> Path:
    """Return the path relative to the working folder, whose layout the job's working folder copies."""
    try:
        absolute = os.path.abspath(path.expanduser())  # noqa: PTH100  # `resolve` would follow links
        return Path(absolute).relative_to(Path.cwd())
    except ValueError:
        raise UsageError(
            f"{what}: {path} is not in the folder you submit from ({Path.cwd()}); submit from a folder that "
            "holds all of a job's files, or put them on storage that all nodes share"
        ) from None


def _list_files(what: str, path: str) -> dict[str, Path]:
    """List a file, or a folder's files that are not hidden, by path in the bundle.

    A link that is named is followed anywhere; one inside a folder, perhaps made by another, only to where the
    folder or the working folder is.
    """
    root = _make_relative(Path(path), what)
    if not root.is_dir():
        return {root.as_posix(): Path(path).expanduser()}
    files = {
        file.as_posix(): file for file in _walk_files(root, hidden="._" if what.startswith("data.") else ".")
    }
    for name, file in files.items():
        if not file.is_file():
            raise UsageError(
                f"{what}: {name} is not a file, or is a broken link, so it cannot be sent; remove it"
            )
        real = file.resolve()
        if not any(real.is_relative_to(place.resolve()) for place in (root, Path())):
            raise UsageError(
                f"{what}: {name} leads by a link to {real}, out of the folder you submit from; copy the file "
                "there, or remove the link"
            )
    return files


def _walk_files(root: Path, *, hidden: str) -> Iterator[Path]:
    """Yield a folder's files, without names and subfolders that begin with a character in `hidden`."""
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # a link to a parent folder
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] not in hidden and name != "__pycache__")
        yield from (Path(folder) / name for name in sorted(names) if name[0] not in hidden)


def _list_package_files() -> dict[str, Path]:
    """List the files of the packages that this process runs."""
    root = Path(__file__).parents[2]
    return {
        file.relative_to(root).as_posix(): file
        for package in PACKAGES
        for file in _walk_files(root / package, hidden=".")
    }


def _refuse_too_large(bundle: JobBundle) -> JobBundle:
    if bundle.size > MAX_SIZE_MB * 10**6:
        largest = sorted(bundle.files.items(), key=lambda item: -item[1].stat().st_size)[:5]
        shown = ", ".join(f"{format_megabytes(path.stat().st_size)} {name}" for name, path in largest)
        raise UsageError(
            f"the job's files are {format_megabytes(bundle.size)}, and at most {MAX_SIZE_MB} MB are sent "
            f"with a job; the largest: {shown}. Put them on storage that all nodes share and name that path, "
            "e.g. data.train=/shared/polyref/data/train.jsonl"
        )
    return bundle


def format_megabytes(size: int) -> str:
    """Format bytes as in `1.2 MB`."""
    return f"{size / 1e6:.1f} MB"
