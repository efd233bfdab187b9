"""Read YAML files, with overrides from the command line."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.errors import UsageError
from orchestrator.redaction import redact


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
        UsageError: the file cannot be read or is no mapping, or an override is malformed.
    """
    try:
        loaded = OmegaConf.load(Path(path))
        if not OmegaConf.is_dict(loaded):
            raise UsageError(f"{path}: is not a mapping of sections, as a {what} is")
        content = apply_overrides(OmegaConf.to_container(loaded, resolve=True), overrides)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; start from one in configs/, a {what}") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder; name the YAML file in it") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    return content


def apply_overrides(content: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Merge dotted `field.name=value` overrides over a mapping."""
    merged = OmegaConf.to_container(OmegaConf.merge(content, *map(_parse_override, overrides)), resolve=True)
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def _parse_override(text: str) -> Any:
    """Parse one `field.name=value` into a nested OmegaConf mapping."""
    if "=" not in text or text.startswith("="):
        raise UsageError(f"override {redact(text)!r} is not of the form field.name=value, e.g. loss.beta=0.2")
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"override {redact(text)!r}: the value is not valid YAML: {reason}") from None
