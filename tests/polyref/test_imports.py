"""polyref's packages come first: among modules of the same names, and in other programs."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import polyref
from orchestrator.config import functions
from orchestrator.errors import UsageError
from polyref import imports

ROOT = Path(__file__).parents[2]
ONE_LINE = "import sys; sys.excepthook = lambda kind, error, trace: print(error, file=sys.stderr)\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's project: a package `models`, modules `losses` and `rewards`, neither of which is polyref's."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("MINE = 'models'\n")
    (tmp_path / "models" / "judges.py").write_text(
        "def best(prompts, responses): return [1.0] * len(responses)\n"
    )
    (tmp_path / "losses.py").write_text(
        "MINE = 'losses'\n\n\ndef exponential(h, *, beta): return (-beta * h).exp()\n"
    )
    (tmp_path / "rewards.py").write_text("from models.judges import best\n")
    (tmp_path / "tasteful.py").write_text("from models import MINE\n")
    return tmp_path


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the project's folder, which comes first on its path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(project), str(ROOT)])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def test_importing_polyref_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "transformers", "mlflow", "pydantic", "numpy")
    code = f"import sys, polyref; dir(polyref); print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", polyref.__all__)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    value = getattr(polyref, name)
    assert value.__doc__
    assert value.__name__ == name
    assert (
        f"`{name}`" in (ROOT / "docs" / "python.md").read_text()
        or f"polyref.{name}" in (ROOT / "docs" / "python.md").read_text()
    ), "docs/python.md does not show it"


def test_a_name_that_is_not_public_is_refused_with_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"no public name 'trian'; it has .*train, tune"):
        polyref.trian  # noqa: B018


def test_everything_agrees_on_what_polyref_consists_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert set(imports.PACKAGES) == set(functions.PACKAGES)
    assert set(imports.PACKAGES) == set(project["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert (
        set(imports.PACKAGES)
        == set(project["importlinter"]["root_packages"])
        == set(project["mypy"]["packages"])
    )
    for name in imports.PACKAGES:
        assert (ROOT / name / "py.typed").is_file()


@pytest.mark.parametrize("module", ["polyref", "orchestrator"])
def test_commands_run_in_a_project_with_modules_of_the_same_names(project: Path, module: str) -> None:
    done = run(project, "-m", module, "schema", "run")
    assert done.returncode == 0, done.stderr
    assert '"policy"' in done.stdout


def test_only_polyrefs_own_names_are_found_elsewhere(project: Path) -> None:
    code = "import polyref, losses, models, rewards_of_mine; print(losses.__file__, models.__file__)"
    (project / "rewards_of_mine.py").write_text("")
    done = run(project, "-c", code)
    assert done.stdout.split() == [str(ROOT / "losses" / "__init__.py"), str(ROOT / "models" / "__init__.py")]


def test_a_foreign_package_that_was_imported_before_is_named_with_the_remedy(project: Path) -> None:
    done = run(project, "-c", f"{ONE_LINE}import models\nimport polyref")
    assert done.stderr == (
        f"polyref needs its own package 'models' ({ROOT / 'models'}), but {project}/models/__init__.py was "
        "imported under that name before: import polyref first, or rename yours\n"
    )


def test_a_foreign_module_at_the_root_of_the_disk_is_named_too(tmp_path: Path) -> None:
    code = f"{ONE_LINE}import sys, types; m = types.ModuleType('losses'); m.__file__ = '/losses.py'\n"
    done = run(tmp_path, "-c", f"{code}sys.modules['losses'] = m\nimport polyref")
    assert "but /losses.py was imported under that name before" in done.stderr


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "losses:exponential",
            "losses has no 'exponential'; losses is polyref's own package .*, not {folder}/losses.py",
        ),
        (
            "models.judges:best",
            "there is no module models.judges; models is polyref's own .*, not {folder}/models: ",
        ),
        (
            "rewards:best",
            "rewards needs models.judges; models is polyref's own package .*, not {folder}/models: ",
        ),
        (
            "tasteful:MINE",
            "tasteful cannot be imported: ImportError: .*; models is polyref's .*, not {folder}/models",
        ),
    ],
)
def test_a_function_that_meant_a_module_of_ones_own_is_refused_with_its_file(
    project: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UsageError, match=f"^field: {message.format(folder=project)}.*rename yours"):
        functions.import_function(path, str(project), field="field", example="a:b")


def test_the_digest_of_a_function_is_that_of_its_source(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {"field": "field", "example": "a:b"}
    (project / "one_link.py").write_text("def f(h, *, beta): return -beta * h\n")
    (project / "other_link.py").write_text("def f(h, *, beta): return -2 * beta * h\n")
    one, other = (
        functions.digest_function_source(f"{name}:f", str(project), **names)
        for name in ("one_link", "other_link")
    )
    assert one != other
    (project / "same_link.py").write_bytes((project / "one_link.py").read_bytes())
    assert functions.digest_function_source("same_link:f", str(project), **names) == one
