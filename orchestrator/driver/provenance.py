"""What a run is made from, as its model card names it: data sources and licences, without paths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from models.locate import ModelFiles
from orchestrator.driver.prepare import PreparedRun
from orchestrator.driver.record import RunRecord
from orchestrator.registry.license import License, read_cached_license, read_license
from orchestrator.registry.lineage import DataSource, Lineage, PinnedReference, read_library_versions
from orchestrator.tracking.data_inputs import TrackedData
from preferences.config import DataConfig, SourceConfig
from preferences.reading.sources import is_hub_name


def describe_origin(prepared: PreparedRun, record: RunRecord) -> Lineage:
    """Collect what is known of a run before it is trained: the lineage of its model, without results."""
    config = prepared.config
    counts: dict[str, int] = {}
    for split, rows in record.counts.items():
        counts |= {
            f"{split} {key.replace('_', ' ')}": count for key, count in rows.items() if key != "skipped"
        }
        counts |= {f"{split} skipped, {reason}": count for reason, count in rows["skipped"].items()}
    return Lineage(
        base_model=record.pins["policy"],
        base_license=read_base_license(prepared.policy.located),
        preset=config.preset,
        loss=config.loss.model_dump(mode="json"),
        references={
            name: PinnedReference(record.pins[f"references.models.{name}"], model.fingerprint.digest)
            for name, model in prepared.references.items()
        },
        primary=config.references.primary,
        data_digest=prepared.digests["train"],
        eval_digest=prepared.digests.get("eval"),
        data_sources=list_data_sources(config.data),
        judged_set=config.judged_set,
        counts=counts,
        config=record.config,
        code=prepared.code_tags,
        libraries=read_library_versions(),
    )


def list_tracked_data(prepared: PreparedRun) -> list[TrackedData]:
    """List the splits of a run as MLflow's page names them; held-out pairs may be of training sources."""
    data = prepared.config.data
    sources = {"train": data.train_sources, "eval": data.eval_sources or data.train_sources}
    uses: dict[str, Literal["training", "evaluation"]] = {"train": "training", "eval": "evaluation"}
    return [
        TrackedData(
            name=", ".join(dict.fromkeys(_name_source(source) for source in sources[split])),
            used_for=used_for,
            digest=prepared.digests[split],
            rows=prepared.counts[split]["pairs"],
            **_locate_sources(sources[split]),
        )
        for split, used_for in uses.items()
        if split in prepared.digests
    ]


def _locate_sources(sources: Sequence[SourceConfig]) -> dict[str, Any]:
    """Return the kind of a source and the fields that MLflow reads of it."""
    if len(sources) > 1:
        return {"source_type": "mixture", "source": {"sources": [source.source for source in sources]}}
    [source] = sources
    if not is_hub_name(source.source):
        return {"source_type": "local", "source": {"uri": source.source}}
    fields = {"path": source.source, "config_name": source.subset, "split": source.split}
    return {"source_type": "hugging_face", "source": fields | {"revision": source.revision}}


def _name_source(source: SourceConfig) -> str:
    return source.source if is_hub_name(source.source) else Path(source.source).name


def read_base_license(files: ModelFiles) -> License | None:
    """Return the licence that a model states, else the one that its base states; None if neither does."""
    paths = [path for path in (files.path, files.base_path) if path is not None]
    stated = (read_license(path if path.is_dir() else path.parent) for path in paths)
    return next((license for license in stated if license is not None), None)


def list_data_sources(data: DataConfig) -> list[DataSource]:
    """List the sources of a run file whose paths are resolved, each once per use."""
    sources = [("training", source) for source in data.train_sources]
    sources += [("evaluation", source) for source in data.eval_sources]
    return list(dict.fromkeys(_describe_source(source, used_for) for used_for, source in sources))


def _describe_source(source: SourceConfig, used_for: str) -> DataSource:
    if is_hub_name(source.source):
        license = read_cached_license(source.source, source.revision)
        return DataSource(source.source, is_on_hub=True, used_for=used_for, license=license)
    folder = Path(source.source)
    # A card beside a single file may be of something else.
    license = read_license(folder) if folder.is_dir() else None
    return DataSource(folder.name, is_on_hub=False, used_for=used_for, license=license)
