"""Python functions that a run file names as `package.module:function`."""

import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from losses.config import FunctionLink
from losses.settings import LossError
from orchestrator.config.run import RunConfig
from orchestrator.errors import UsageError, did_you_mean

LINK_FIELD, REWARD_FIELD = "loss.link.function", "evaluation.sampling.reward.function"
LINK_EXAMPLE, REWARD_EXAMPLE = "my_losses:exponential", "orchestrator.demo.rewards:sentiment"
PACKAGES = ("polyref", "losses", "models", "preferences", "tune_spaces", "orchestrator")
"""Top-level names that always mean polyref's own packages."""


def list_functions(config: RunConfig) -> dict[str, str]:
    """List the Python functions that a run file names, by field."""
    found = {}
    if isinstance(config.loss.link, FunctionLink):
        found[LINK_FIELD] = config.loss.link.function
    reward = config.evaluation.sampling and config.evaluation.sampling.reward
    if reward and reward.function:
        found[REWARD_FIELD] = reward.function
    return found


def check_functions(config: RunConfig, folder: str) -> dict[str, str]:
    """Refuse functions that cannot be used as a run file says.

    Returns:
        Digests of the sources that the loss depends on, by field: a run with another link is another run.

    Raises:
        UsageError: a function cannot be imported, or is not a link.
    """
    functions = list_functions(config)
    if REWARD_FIELD in functions:
        import_function(functions[REWARD_FIELD], folder, field=REWARD_FIELD, example=REWARD_EXAMPLE)
    return check_link(config, folder)


def check_link(config: RunConfig, folder: str) -> dict[str, str]:
    """Do the part of `check_functions` that is about the loss."""
    functions = list_functions(config)
    if LINK_FIELD not in functions:
        return {}
    path = functions[LINK_FIELD]
    digest = digest_function_source(path, folder, field=LINK_FIELD, example=LINK_EXAMPLE)
    from losses.links.function import find_link_function

    try:
        find_link_function(path, two_sided=config.loss.link.two_sided)
    except LossError as error:
        raise UsageError(f"loss.{error}") from error
    return {LINK_FIELD: digest}


@functools.cache
def import_function(path: str, folder: str, *, field: str, example: str) -> Callable[..., Any]:
    """Import the function `package.module:function`, installed or in a working folder.

    Args:
        path: of the function.
        folder: where the command was started; a worker's own working folder is searched too.
        field: the run file's field that names the function, for messages.
        example: a path that is right, for messages.

    Raises:
        UsageError: the path is malformed, the module is missing or cannot be imported, or it has no such
            function.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UsageError(f"{field}: {path!r} is not of the form package.module:function, e.g. {example}")
    module = _import_module(module_name, folder, field)
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        hint = _shadowing_hint(module_name, folder) or did_you_mean(name, known)
        raise UsageError(f"{field}: {module_name} has no {name!r}{hint}")
    if not callable(function):
        raise UsageError(
            f"{field}: {path} is of type {type(function).__name__}, not a function such as {example}"
        )
    return function


def digest_function_source(path: str, folder: str, *, field: str, example: str) -> str:
    """SHA-256 of the file that defines a function, or of its path where it has no source file."""
    function = import_function(path, folder, field=field, example=example)
    module = sys.modules[path.partition(":")[0]]
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # a callable object, or compiled
        source = getattr(module, "__file__", None)
    return hashlib.sha256(Path(source).read_bytes() if source else path.encode()).hexdigest()


def add_to_path(*folders: str) -> None:
    """Let modules in these folders be imported, after polyref's own packages."""
    for folder in folders:
        if folder not in sys.path:
            sys.path.insert(0, folder)


def _import_module(name: str, folder: str, field: str) -> Any:
    add_to_path(folder, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if f"{name}.".startswith(f"{missing}."):
            hint = _shadowing_hint(name, folder) or (
                f", neither in {folder} nor installed; start the command where it lies (of a job: in its "
                "working directory), or install it on every node"
            )
            raise UsageError(f"{field}: there is no module {name}{hint}") from None
        hint = _shadowing_hint(missing, folder) or ", which is not installed"
        raise UsageError(f"{field}: {name} needs {missing}{hint}") from error
    except Exception as error:  # a module of the user's may raise anything
        hint = _shadowing_hint(error.name or "", folder) if isinstance(error, ImportError) else ""
        message = f"{field}: {name} cannot be imported: {type(error).__name__}: {error}{hint}"
        raise UsageError(message) from error


def _shadowing_hint(module: str, folder: str) -> str:
    """Explain, where a name is one of polyref's own packages, that a user's module of that name is not it."""
    top = module.partition(".")[0]
    if top not in PACKAGES:
        return ""
    own = importlib.import_module(top).__file__
    yours = [place for place in (Path(folder, top), Path(folder, f"{top}.py")) if place.exists()]
    shown = f", not {yours[0]}: rename yours" if yours else ": rename a module of yours that is called so"
    return f"; {top} is polyref's own package ({own}){shown}"
