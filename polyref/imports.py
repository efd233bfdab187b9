"""polyref's packages come first wherever polyref runs, whatever else is on the path.

`losses`, `models` and their neighbours are names that other projects use too. A finder in front of all others
looks up these names, and no others, beside this package: a folder `models/` in the working folder cannot
break polyref, and everything else on the path is found as before.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

PACKAGES = ("polyref", "losses", "models", "preferences", "tune_spaces", "orchestrator")
ROOT = Path(__file__).resolve().parents[1]


class OwnPackagesFinder(MetaPathFinder):
    """Finds polyref's top-level packages in polyref's own folder."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of one of polyref's packages, None for every other name."""
        return PathFinder.find_spec(fullname, [str(ROOT)], target) if fullname in PACKAGES else None


def use_own_packages() -> None:
    """Let polyref's names mean polyref's packages in this process. Again is harmless.

    Ray calls it in every worker process of a run, before anything is imported there.

    Raises:
        ImportError: another package of such a name was imported before; names both and the remedy.
    """
    if any(isinstance(finder, OwnPackagesFinder) for finder in sys.meta_path):
        return
    for name in PACKAGES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and Path(file).resolve() != ROOT / name / "__init__.py":
            raise ImportError(
                f"polyref needs its own package {name!r} ({ROOT / name}), but {file} was imported under that "
                "name before: import polyref first, or rename yours"
            )
    sys.meta_path.insert(0, OwnPackagesFinder())
