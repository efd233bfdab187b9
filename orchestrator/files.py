"""Files and records that are written whole or not at all."""

import hashlib
import os
import shutil
from pathlib import Path


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def cache_folder() -> Path:
    """Where downloaded models are kept: `$POLYREF_CACHE` or `~/.cache/polyref`."""
    return Path(os.environ.get("POLYREF_CACHE") or Path.home() / ".cache" / "polyref") / "registry"


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
