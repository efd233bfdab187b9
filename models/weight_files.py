"""Find a model's weight files, and check that their headers can be read; no weight is."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from models.config import ModelError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS_MARK = b"version https://git-lfs"
_READ_AGAIN = "copy or download the model again"


def list_weight_files(folder: Path) -> list[Path]:
    """List the weight files that transformers loads of a model folder.

    Raises:
        ModelError: there are none under the names that it looks for, or the index names other places.
    """
    if (folder / WHOLE).exists():  # which transformers loads even where an index names other files
        return [folder / WHOLE]
    if not (folder / INDEX).exists():
        found = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:3])
        raise ModelError(
            f"{folder} has neither {WHOLE} nor {INDEX}, but {found}; rename or save the weights as "
            "save_pretrained does"
        )
    names = read_settings_file(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ModelError(f"{folder / INDEX} has no weight_map from weights to files; {_READ_AGAIN}")
    for name in set(names.values()):
        if Path(name).name != name:
            raise ModelError(
                f"{folder / INDEX} names {name!r}, which is not in the model's folder; {_READ_AGAIN}"
            )
        if not (folder / name).exists():
            raise ModelError(f"{folder / name} is named by {INDEX} but missing; download the model again")
    return [folder / name for name in sorted(set(names.values()))]


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of all weights in safetensors files from their headers.

    Raises:
        ModelError: a file is damaged, or shorter than its header says.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, "np") as file:
                names = file.keys()
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            remedy = f"run git lfs pull in {path.parent}" if _is_lfs_pointer(path) else _READ_AGAIN
            raise ModelError(
                f"{path} cannot be read as safetensors ({get_first_error_line(error)}); {remedy}"
            ) from error
    return shapes


def _is_lfs_pointer(path: Path) -> bool:
    """Return whether git has cloned a file's address instead of the file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS_MARK)) == _LFS_MARK


def refuse_special_entries(folder: Path) -> None:
    """Refuse a folder in which a pipe, a socket or a device, which may have no end, is in a file's place.

    Raises:
        ModelError: there is one, or a link that leads nowhere.
    """
    for path in folder.iterdir():
        if not (path.is_file() or path.is_dir()):
            raise ModelError(
                f"{path} is neither a file nor a folder (but a pipe, a socket, a device or a broken link); "
                f"{_READ_AGAIN}"
            )


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read as JSON ({get_first_error_line(error)}); {_READ_AGAIN}"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object; {_READ_AGAIN}")
    return content


def get_first_error_line(error: BaseException) -> str:
    """Return the first line of an error's message, without the pages that some libraries add."""
    first = str(error).strip().split("\n", 1)[0]
    return first[:300] or type(error).__name__
