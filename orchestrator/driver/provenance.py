"""What a run was made from, as its model card names it: data sources and licences, without paths."""

from pathlib import Path

from models.locate import ModelFiles
from orchestrator.registry.license import License, read_cached_license, read_license
from orchestrator.registry.lineage import DataSource
from preferences.config import DataConfig, SourceConfig
from preferences.reading.sources import is_hub_name


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
