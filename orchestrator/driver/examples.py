"""The command `init NAME`: run files and sweep files to start from, which are shipped with polyref."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from orchestrator.errors import UsageError, did_you_mean
from orchestrator.files import replace_text
from orchestrator.storage.probe import refuse_unwritable_file

_PACKAGE = Path(__file__).parents[1]
_SWEEPS = "sweeps"
_FIRST_SENTENCE = re.compile(r".+?[.?](?=\s|$)")
_NAMED_RUN = re.compile(r"^(run: +)(\S+\.yaml)( *)(#.*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A run file or a sweep file to start from.

    Attributes:
        name: as the command takes it, such as `dpo` or `sweeps/pbt`.
        path: the file.
        summary: the first sentence of the comment that it begins with.
    """

    name: str
    path: Path
    summary: str

    @property
    def is_sweep(self) -> bool:
        """Whether it is a sweep file."""
        return self.path.parent.name == _SWEEPS

    @property
    def run_file(self) -> Path | None:
        """The run file that a sweep file names; None if it has its own, or if this is a run file."""
        run = yaml.safe_load(self.path.read_text(encoding="utf-8")).get("run")
        return (self.path.parent / run).resolve() if isinstance(run, str) else None


def list_examples() -> list[Example]:
    """List the examples: run files by name, then sweep files."""
    folder = _find_folder()
    paths = [*sorted(folder.glob("*.yaml")), *sorted((folder / _SWEEPS).glob("*.yaml"))]
    return [
        Example(path.relative_to(folder).with_suffix("").as_posix(), path, _read_summary(path))
        for path in paths
    ]


def write_example(name: str, to: Path | None) -> Iterator[str]:
    """Write an example, and with a sweep file the run file that it names; yield lines on what to do next.

    Args:
        name: the example.
        to: the file to write, by default the example's own name in the working folder.

    Raises:
        UsageError: there is no such example, or a file exists.
    """
    examples = {example.name: example for example in list_examples()}
    if name not in examples:
        raise UsageError(f"example {name!r} does not exist{did_you_mean(name, examples)}")
    example = examples[name]
    path = to or Path(example.path.name)
    texts = {path: _take_from_folder(example.path.read_text(encoding="utf-8"))}
    if example.run_file is not None:
        run_path = path.parent / example.run_file.name
        if run_path == path:
            raise UsageError(f"{path} is the run file that {name} names; name another file with --to")
        texts[run_path] = example.run_file.read_text(encoding="utf-8")
    for target in texts:
        if os.path.lexists(target):
            raise UsageError(f"{target} exists, and is not replaced; name a file elsewhere with --to")
        refuse_unwritable_file(target, "--to")
    for target, text in reversed(texts.items()):  # the sweep file last, when what it names is there
        replace_text(target, text)
        yield f"{target}: written"
    yield "set the models and the data in it to yours; polyref explain says what a field means"
    if example.is_sweep:
        yield f"next: polyref tune {path} --dry-run; polyref tune {path}"
    else:
        yield f"next: polyref data show {path}; polyref check {path}; polyref train {path}"


def _find_folder() -> Path:
    """Return the folder of the examples: in a package installed from a wheel, else `configs`."""
    shipped = _PACKAGE / "examples"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "configs"


def _read_summary(path: Path) -> str:
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    sentence = _FIRST_SENTENCE.match(" ".join(comment))
    return sentence[0] if sentence else " ".join(comment)


def _take_from_folder(text: str) -> str:
    """Return a sweep file that names its run file beside it, with the comments after it where they were."""

    def name_run_beside(line: re.Match[str]) -> str:
        key, run, space, comment = line.groups(default="")
        name = Path(run).name
        return f"{key}{name}{space}{' ' * (len(run) - len(name)) if comment else ''}{comment}"

    return _NAMED_RUN.sub(name_run_beside, text).replace(f"configs/{_SWEEPS}/", "")
