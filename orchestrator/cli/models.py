"""The commands `polyref models ...`: list, show, compare, promote, copy and push registered models."""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.interruption import turn_ctrl_c_into_interruption
from orchestrator.cli.model_views import (
    Measurement,
    VersionView,
    format_time,
    print_comparison,
    print_version,
    print_version_list,
)
from orchestrator.errors import UsageError
from orchestrator.redaction import redact
from orchestrator.registry.aliases import (
    ACCURACY,
    METRIC_PREFIX,
    PromotionRefused,
    assign_alias,
    choose_judged_metric,
    find_difference,
    read_metrics_of_version,
)
from orchestrator.registry.display import INTERVAL
from orchestrator.registry.download import (
    ADAPTER,
    copy_merged_version,
    copy_version,
    is_adapter_folder,
    read_version_text,
    resolve_adapter,
    resolve_free_folder,
    resolve_version,
)
from orchestrator.registry.hub import HubRepository, PushedCommit, check_repo_name
from orchestrator.registry.lineage import LINEAGE_FILE, Lineage, parse_lineage
from orchestrator.registry.publication import prepare_publication, refuse_unpublishable
from orchestrator.registry.versions import (
    DIGEST_TAG,
    find_version,
    list_model_names,
    list_versions,
    parse_model_ref,
)
from orchestrator.tracking.mlflow import (
    URI_VARIABLE,
    check_name,
    connect_to_mlflow,
    find_absent_database,
    resolve_tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

app = typer.Typer(help="Registered models: list, show, get, promote, compare, push.", no_args_is_help=True)

_Uri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        envvar=URI_VARIABLE,
        help="The MLflow server; default: the sqlite file under --storage-path.",
    ),
]
_Storage = Annotated[str, typer.Option("--storage-path", help="The runs' storage_path.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Ref = Annotated[str, typer.Argument(metavar="REF", help="NAME@ALIAS or NAME/VERSION.")]


@dataclass(frozen=True)
class _Registry:
    """An MLflow server, and descriptions of the versions in it."""

    client: "MlflowClient"
    uri: str

    @classmethod
    def open(cls, uri: str | None, storage: str) -> "_Registry":
        """Connect to the registry at `uri`, or in the storage path; a missing database is not created."""
        address = resolve_tracking_uri(uri, storage)
        database = find_absent_database(address)
        if database is not None:
            raise UsageError(
                f"there is no MLflow database at {database}: give --storage-path as in the run file, "
                f"or --tracking-uri (or {URI_VARIABLE}) for a server"
            )
        return cls(connect_to_mlflow(address), address)

    def find_run(self, version: "ModelVersion") -> "Run | None":
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(version.run_id) if version.run_id else None
        except MlflowException:  # the run was deleted, the version was not
            return None

    def view_version(self, version: "ModelVersion", *, with_lineage: bool = False) -> VersionView:
        """Collect what is shown of a version; `with_lineage` reads its `lineage.json` too."""
        run = self.find_run(version)
        metrics = read_metrics_of_version(self.client, version)
        judged = choose_judged_metric(version, metrics)
        return VersionView(
            name=version.name,
            version=int(version.version),
            aliases=sorted(version.aliases),
            created=version.creation_timestamp / 1000,
            tags=version.tags,
            run=run.info.run_name if run else None,
            run_id=version.run_id or None,
            judged=Measurement(judged, metrics[judged], metrics.get(f"{judged}{INTERVAL}"))
            if judged
            else None,
            metrics=metrics,
            params=run.data.params if run else {},
            lineage=self._read_lineage(version) if with_lineage else None,
        )

    def _read_lineage(self, version: "ModelVersion") -> Lineage | None:
        """Read the lineage of a version; None for another program's, or if its files cannot be read."""
        if DIGEST_TAG not in version.tags:
            return None
        uri = f"models:/{version.name}/{version.version}"
        try:
            return parse_lineage(read_version_text(self.client, version, self.uri, LINEAGE_FILE), uri)
        except UsageError as error:
            print(f"only what the registry's tags say is shown: {error}", file=sys.stderr)
            return None


@app.command("list")
def list_models(uri: _Uri = None, storage: _Storage = "runs", as_json: _Json = False) -> None:
    """List the versions of all registered models, newest first."""
    registry = _Registry.open(uri, storage)
    versions = [
        registry.view_version(v)
        for name in list_model_names(registry.client)
        for v in list_versions(registry.client, name)
    ]
    _print_versions(versions, as_json=as_json)


@app.command()
def show(
    ref: Annotated[str, typer.Argument(metavar="NAME[@ALIAS|/VERSION]", help="A model or one version.")],
    uri: _Uri = None,
    storage: _Storage = "runs",
    as_json: _Json = False,
) -> None:
    """Show a version's lineage, metrics and source; for a name alone, list its versions."""
    registry = _Registry.open(uri, storage)
    if parse_model_ref(ref).is_bare_name:
        versions = list_versions(registry.client, parse_model_ref(ref).name)
        _print_versions([registry.view_version(v) for v in versions], as_json=as_json)
        return
    version = find_version(registry.client, ref)
    is_for_people = not as_json and sys.stdout.isatty()
    view = registry.view_version(version, with_lineage=is_for_people)
    if is_for_people:
        print_version(view, time.time())
        return
    details = _describe_version(view)
    details["source"] = redact(version.source)
    details["run_id"] = version.run_id
    details["lineage"] = {k: v for k, v in sorted(version.tags.items()) if not k.startswith(METRIC_PREFIX)}
    details["metrics"] = dict(view.metrics)
    if as_json:
        print(json.dumps(details, indent=2))
        return
    rows = [[key, _format_value(value)] for key, value in details.items() if not isinstance(value, dict)]
    rows += [[key, value] for key, value in details["lineage"].items()]
    rows += [
        [key, _format_value(value)] for key, value in sorted(details["metrics"].items()) if key != ACCURACY
    ]
    _print_lines(["", f"{version.name}/{version.version}"], rows)


@app.command()
def get(
    ref: _Ref,
    to: Annotated[Path, typer.Option("--to", help="A new or empty folder.")],
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="One full model without a separate adapter; merges an adapter into its base."
        ),
    ] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="Only the adapter, as peft loads it.")] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="With --merge: the adapter's base model, if it is not where the adapter's config says."
        ),
    ] = None,
    uri: _Uri = None,
    storage: _Storage = "runs",
) -> None:
    """Copy a version's transformers folder and check it; an adapter is in a subfolder of its own."""
    if merge and adapter:
        raise UsageError("--merge gives a model without adapter, --adapter only the adapter: choose one")
    resolve_free_folder(to)  # before anything is downloaded
    registry = _Registry.open(uri, storage)
    version = find_version(registry.client, ref)
    model = resolve_adapter(registry.client, version, registry.uri) if adapter else None
    is_full_version = model is None
    model = model or resolve_version(registry.client, version, registry.uri)
    is_adapter = is_adapter_folder(model.folder)
    if adapter and not is_adapter:
        raise UsageError(
            f"{model.uri_pinned} has no separate adapter: leave out --adapter to get the model"
            + (f", which contains it in {ADAPTER}/" if (model.folder / ADAPTER).is_dir() else "")
        )
    if merge:
        copy_merged_version(model, to, base=base)
    else:
        copy_version(model, to)
    checked = "checked against its digest" if model.digest else "registered without a digest, so not checked"
    print(f"{model.uri_pinned} is in {to} ({checked})")
    if is_adapter and not merge:
        option = "--merge" if is_full_version else "leaving out --adapter"
        print(f"it is an adapter for {_name_adapter_base(version, to)}; {option} gives one merged model")


@app.command()
def promote(
    ref: _Ref,
    alias: Annotated[str, typer.Option(help="The alias to give.")] = "champion",
    force: Annotated[bool, typer.Option(help="Promote despite a worse or unknown evaluation.")] = False,
    uri: _Uri = None,
    storage: _Storage = "runs",
) -> None:
    """Give a version an alias, unless the version that has it is better."""
    check_name("alias", alias, field="--alias")
    registry = _Registry.open(uri, storage)
    candidate = find_version(registry.client, ref)
    try:
        holder = assign_alias(registry.client, candidate, alias, force=force)
    except PromotionRefused as error:
        raise UsageError(f"{error}; --force promotes it anyway") from None
    previous = (
        f", until now version {holder.version}" if holder and holder.version != candidate.version else ""
    )
    print(f"models:/{candidate.name}@{alias} is version {candidate.version}{previous}")


@app.command()
def compare(
    refs: Annotated[list[str], typer.Argument(metavar="REF REF...", help="NAME@ALIAS or NAME/VERSION each.")],
    uri: _Uri = None,
    storage: _Storage = "runs",
    as_json: _Json = False,
) -> None:
    """Compare versions: the settings in which their runs differ, and their metrics."""
    if len(refs) < 2:
        raise UsageError("compare needs two versions or more: NAME@ALIAS or NAME/VERSION each")
    registry = _Registry.open(uri, storage)
    versions = [find_version(registry.client, ref) for ref in refs]
    views = [registry.view_version(version) for version in versions]
    metrics = _align_columns([view.metrics for view in views])
    if not as_json and sys.stdout.isatty():
        print_comparison(views, _find_incomparable(versions, metrics))
        return
    params = _align_columns([view.params for view in views])
    differing = {key: values for key, values in params.items() if len(set(values)) > 1}
    if as_json:
        print(json.dumps({"versions": refs, "params": differing, "metrics": metrics}, indent=2))
        return
    rows = [[key, *map(_format_value, values)] for key, values in (differing | metrics).items()]
    _print_lines(["", *refs], rows)


@app.command()
def push(
    ref: _Ref,
    repo: Annotated[str, typer.Argument(metavar="OWNER/REPO", help="The repository on the hub.")],
    adapter: Annotated[bool, typer.Option("--adapter", help="Only the adapter, as peft loads it.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody read a new repository; else it is private.")
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Upload nothing: write what would be uploaded to a new or empty folder."),
    ] = None,
    uri: _Uri = None,
    storage: _Storage = "runs",
) -> None:
    """Upload a version with its card to a hub, as one commit with a tag; the same command resumes."""
    check_repo_name(repo)
    if to is not None:
        if public:
            raise UsageError(
                "--to uploads nothing, so --public has no meaning with it: leave one of them out"
            )
        resolve_free_folder(to)
    registry = _Registry.open(uri, storage)
    version = find_version(registry.client, ref)
    refuse_unpublishable(version, adapter_only=adapter)
    with turn_ctrl_c_into_interruption():
        repository = HubRepository.open(repo, public=public) if to is None else None
        publication = prepare_publication(registry.client, version, registry.uri, repo, adapter_only=adapter)
        if publication.left_out:
            print(f"left out, as no part of a model: {', '.join(publication.left_out)}")
        if repository is None:
            assert to is not None
            publication.write_to(to)
            print(f"{publication.uri} is in {to}, as it would be pushed to {repo}; nothing was uploaded")
            return
        _print_push(publication.uri, repository, repository.upload(publication), public=public)


def _print_push(uri: str, repository: HubRepository, commit: PushedCommit, *, public: bool) -> None:
    visibility = "private" if repository.is_private else "public"
    print(f"{uri} is in {repository.repo} ({visibility}): {commit.url}")
    print(f"commit {commit.oid}: {commit.message}")
    if commit.tag is not None:
        print(f'tag {commit.tag}: from_pretrained("{repository.repo}", revision="{commit.tag}")')
    else:
        print(f"tag {commit.tag_taken} is on another commit and stays there; use the commit as revision")
    if commit.removed:
        print(f"removed from the earlier push, and kept in its commits: {', '.join(commit.removed)}")
    if public and repository.is_private:
        print(f"{repository.repo} was private and stays so: its settings on the hub change that")


def _name_adapter_base(version: "ModelVersion", adapter: Path) -> str:
    """Return the adapter's base model: the one its lineage pins, else the one its own config names."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return redact(str(version.tags.get("base_model") or config.get("base_model_name_or_path")))


def _align_columns(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {key: [column.get(key) for column in columns] for key in sorted(set().union(*columns))}


def _find_incomparable(versions: "Sequence[ModelVersion]", metrics: Iterable[str]) -> dict[str, str]:
    """Return what differs between versions that makes a metric incomparable, by metric."""
    found = {}
    for metric in metrics:
        differences = (find_difference(versions[0], other, metric) for other in versions[1:])
        if (difference := next(filter(None, differences), None)) is not None:
            found[metric] = difference.description
    return found


def _describe_version(view: VersionView) -> dict[str, Any]:
    """Describe a version to programs: fields are added at the end, and none is taken away."""
    return {
        "name": view.name,
        "version": view.version,
        "aliases": list(view.aliases),
        "created": format_time(view.created),
        ACCURACY: view.metrics.get(ACCURACY),
        "run": view.run,
        "loss": view.tags.get("loss.preset"),
        "judged_by": view.judged.metric if view.judged else None,
        "judged_value": view.judged.value if view.judged else None,
        "judged_interval": view.judged.interval if view.judged else None,
    }


def _print_versions(versions: Sequence[VersionView], *, as_json: bool) -> None:
    descriptions = [_describe_version(version) for version in versions]
    if as_json:
        print(json.dumps(descriptions, indent=2))
    elif not versions:
        print("no models are registered yet", file=sys.stderr)
    elif sys.stdout.isatty():
        print_version_list(versions, time.time())
    else:
        rows = [[_format_value(value) for value in row.values()] for row in descriptions]
        _print_lines(list(descriptions[0]), rows)


def _print_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print tab-separated lines for other programs."""
    for row in (header, *rows):
        print("\t".join(row))


def _format_value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(value) if isinstance(value, list) else str(value)
