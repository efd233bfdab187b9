"""polyref for notebooks and other programs: its public names, each loaded when it is first used.

>>> import polyref
>>> config = polyref.preset("gdpo", beta=0.2)

Importing this package costs next to nothing: torch comes with the losses, Ray with the first run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from polyref.imports import use_own_packages

use_own_packages()

if TYPE_CHECKING:
    from losses.config import LossConfig as LossConfig
    from losses.links.function import register_link as register_link
    from losses.preference import preference_loss as preference_loss
    from losses.presets import preset as preset
    from losses.scores import LossOutput as LossOutput
    from losses.scores import PairScores as PairScores
    from losses.scores import ReferenceScores as ReferenceScores
    from losses.settings import LossError as LossError
    from models.config import ModelError as ModelError
    from orchestrator.config.run import RunConfig as RunConfig
    from orchestrator.config.run import load_run as load_run
    from orchestrator.config.sweep import SweepConfig as SweepConfig
    from orchestrator.config.sweep import load_sweep as load_sweep
    from orchestrator.errors import RunFailed as RunFailed
    from orchestrator.errors import UsageError as UsageError
    from polyref.api import check as check
    from polyref.api import find_model as find_model
    from polyref.api import train as train
    from polyref.api import tune as tune
    from preferences.pairs import DataError as DataError
    from tune_spaces.domains import SpaceError as SpaceError

_MODULES = {
    "losses.config": ("LossConfig",),
    "losses.links.function": ("register_link",),
    "losses.preference": ("preference_loss",),
    "losses.presets": ("preset",),
    "losses.scores": ("LossOutput", "PairScores", "ReferenceScores"),
    "losses.settings": ("LossError",),
    "models.config": ("ModelError",),
    "orchestrator.config.run": ("RunConfig", "load_run"),
    "orchestrator.config.sweep": ("SweepConfig", "load_sweep"),
    "orchestrator.errors": ("RunFailed", "UsageError"),
    "preferences.pairs": ("DataError",),
    "tune_spaces.domains": ("SpaceError",),
    "polyref.api": ("check", "find_model", "train", "tune"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"polyref has no public name {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
