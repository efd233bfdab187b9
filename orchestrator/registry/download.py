"""`polyref models get`: a registered version as a folder that transformers, peft and vLLM load.

What is copied is checked against the digest it was registered with; the folder appears whole or not at all.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.config.run import UsageError
from orchestrator.registry.versions import ADAPTER, ResolvedModel, cache_folder, check_digest


def fetch(model: ResolvedModel, to: Path) -> None:
    """Copy the version's folder to `to`, checked against the digest it was registered with.

    Raises UsageError when `to` holds something or the files are not those registered.
    """
    with _in_place(to) as part:
        _copy(model, part)


def fetch_merged(model: ResolvedModel, to: Path, *, base: str | None = None) -> None:
    """Make `to` one whole model without an adapter beside it.

    A version of polyref's holds it already. An adapter alone, which another program registered, is merged
    into its base, in the base's dtype; `base` says where that is if not where the adapter's config says.

    Raises UsageError as `fetch` does, ModelError when the base is not to be had or does not fit.
    """
    with _in_place(to) as part:
        if is_adapter(model.folder):
            _merge(model.folder, part, base)
        else:
            _copy(model, part)
            shutil.rmtree(part / ADAPTER, ignore_errors=True)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _copy(model: ResolvedModel, part: Path) -> None:
    shutil.copytree(model.folder, part, dirs_exist_ok=True)
    downloaded = model.folder.is_relative_to(cache_folder())
    remedy = f"remove {model.folder} and get it again" if downloaded else "register the model again"
    check_digest(part, model.digest, model.uri_pinned, remedy=remedy)


def _merge(folder: Path, part: Path, base: str | None) -> None:
    from models.adapters import merge
    from models.config import ModelConfig
    from models.load import export, load_model, load_tokenizer, locate

    config = ModelConfig(model=str(folder), base=base)
    located = locate(config)
    assert located.base_path is not None
    config = config.model_copy(update={"dtype": _dtype(located.base_path)})
    model = load_model(located, config, device="cpu", trainable=False)
    export(merge(model), load_tokenizer(located, config), part)


def _dtype(base: Path) -> str:
    """What a model folder's weights are in; float32 where its config does not say."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) if base.is_dir() else {}
    dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return dtype if dtype in ("bfloat16", "float16") else "float32"


def free_place(to: Path) -> Path:
    """Where a new folder may come, with links followed; UsageError where it cannot."""
    place = to.resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(f"{to} is not an empty folder: give --to a new one")
    if place == Path.cwd().resolve() or place.is_mount():
        raise UsageError(f"{to} is a folder in use: give --to a new one in it, e.g. --to {to / 'model'}")
    return place


@contextmanager
def _in_place(to: Path) -> Iterator[Path]:
    """A folder beside `to` to fill, which becomes `to` when all went well."""
    to = free_place(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        yield part
        part.chmod(0o755)
        os.replace(part, to)
    finally:
        shutil.rmtree(part, ignore_errors=True)
