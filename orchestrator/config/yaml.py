"""Read YAML files, with overrides from the command line."""

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.errors import UsageError
from orchestrator.files import read_regular_file
from orchestrator.redaction import shorten_input

_MAX_BYTES, _MAX_DEPTH = 2**20, 50
_TOO_DEEP = f"is nested too deeply; no setting needs more than {_MAX_DEPTH} levels"
_ENVIRONMENT_CALL = re.compile(r"oc\.env\s*:\s*(\w+)")
_READ_VARIABLES = (
    "MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, "
    "HF_TOKEN, HF_HOME, AWS_*, GOOGLE_APPLICATION_CREDENTIALS, AZURE_*, OPENAI_API_KEY and POLYREF_CACHE"
)


def read_yaml(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    what: str = "run file (name, policy, data, ...)",
) -> dict[str, Any]:
    """Read the mapping in a YAML file and merge dotted overrides over it.

    Args:
        path: the file.
        overrides: `field.name=value`.
        what: the kind of file that is expected, for messages.

    Raises:
        UsageError: the file cannot be read or is no mapping, a value asks for more than another field
            (`${oc.env:NAME}`), or an override is malformed.
    """
    try:
        loaded = OmegaConf.load(io.StringIO(read_regular_file(path, max_bytes=_MAX_BYTES).decode()))
        if not OmegaConf.is_dict(loaded):
            raise UsageError(f"{path}: is not a mapping of sections, as a {what} is")
        _refuse_values(OmegaConf.to_container(loaded), f"{path}: ")
        content = OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        remedy = "polyref init --data SOURCE writes a run file, polyref init --list has examples"
        raise UsageError(f"{path}: no such file ({what}); {remedy}") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder; name the YAML file in it") from None
    except RecursionError:
        raise UsageError(f"{path}: {_TOO_DEEP}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}; name a {what}") from None
    except (ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: cannot be read: {error}; correct that in the file") from None
    return apply_overrides(content, overrides)


def apply_overrides(content: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Merge dotted `field.name=value` overrides over a mapping.

    Raises:
        UsageError: an override is malformed, or a value asks for more than another field.
    """
    parsed = [_parse_override(text) for text in overrides]
    try:
        tree = OmegaConf.merge(content, *parsed)
        _refuse_values(OmegaConf.to_container(tree))
        merged = OmegaConf.to_container(tree, resolve=True)
    except RecursionError:
        raise UsageError(f"the settings: {_TOO_DEEP}") from None
    except (TypeError, OmegaConfBaseException) as error:
        raise UsageError(f"the settings do not fit together: {_first_line(error)}; correct that") from None
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def _refuse_values(value: Any, source: str = "", field: str = "", depth: int = 0) -> None:
    """Refuse values that no setting can have, whatever the field."""
    if depth > _MAX_DEPTH:
        raise UsageError(f"{source}{field[:60]}...: {_TOO_DEEP}")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _refuse_text(str(name), source, "a field's name")
            _refuse_values(inner, source, f"{field}.{name}" if field else str(name), depth + 1)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _refuse_values(inner, source, f"{field}[{number}]", depth + 1)
    elif isinstance(value, str):
        _refuse_text(value, source, field)
        _refuse_resolver(value, source, field)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(
            f"{source}{field}: {value} is not a finite number; write one, or leave the field out"
        )
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{source}{field}: the number is too large; write one of less than 64 bits")


def _refuse_text(text: str, source: str, field: str) -> None:
    """Refuse text that no path and no file can have, and OmegaConf's mark of a value that is missing."""
    if text == "???":
        raise UsageError(f"{source}{field}: ??? stands for a value that is missing; write the value")
    if "\0" in text:
        raise UsageError(f"{source}{field}: has a NUL byte, which no path and no text has; take it out")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{source}{field}: has half a character (a lone surrogate); write it as UTF-8")


def _refuse_resolver(value: str, source: str, field: str) -> None:
    """Refuse text that OmegaConf would compute: of the environment, it would put secrets into records."""
    if not _calls_resolver(value):
        return
    variable = _ENVIRONMENT_CALL.search(value)
    if variable is None:
        raise UsageError(
            f"{source}{field}: ${{...:...}} is not computed here; write the value, or name another field "
            "as in ${policy.model}"
        )
    raise UsageError(
        f"{source}{field}: ${{oc.env:{variable[1]}}} would copy a variable into logs and records; give a "
        f'path or a name on the command line, {field}="${variable[1]}", and leave a secret in the '
        f"environment: polyref and its libraries read {_READ_VARIABLES} there themselves"
    )


def _calls_resolver(text: str) -> bool:
    """Whether a text has a colon inside `${...}`, which only the call of a resolver has."""
    depth = place = 0
    while place < len(text):
        if text.startswith("${", place):
            depth, place = depth + 1, place + 1
        elif text[place] == "}":
            depth = max(0, depth - 1)
        elif text[place] == ":" and depth:
            return True
        place += 1
    return False


def _parse_override(text: str) -> Any:
    """Parse one `field.name=value` into a nested OmegaConf mapping."""
    shown = shorten_input(text)
    if "=" not in text or text.startswith("="):
        raise UsageError(f"override {shown!r} is not of the form field.name=value, e.g. loss.beta=0.2")
    try:
        parsed = OmegaConf.from_dotlist([text])
        _refuse_values(OmegaConf.to_container(parsed), "override ")
    except UsageError:
        raise
    except RecursionError:
        raise UsageError(f"override {shown!r}: {_TOO_DEEP}") from None
    except Exception as error:  # OmegaConf raises errors of any class for odd names
        reason = getattr(error, "problem", None) or _first_line(error)
        raise UsageError(f"override {shown!r}: the value is not valid YAML: {reason}") from None
    return parsed


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
