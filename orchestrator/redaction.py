"""Removal of secrets from text and settings that are shown, logged or stored."""

import re
from collections.abc import Mapping
from typing import Any

_SECRET_KEY = re.compile(r"(^|[._-])(token|password|passwd|secret|api_?key|credentials?)$", re.IGNORECASE)


_SECRET_VALUES = (
    # An unescaped secret may contain slashes: everything up to the last @ is hidden.
    (re.compile(r"\b((?:s3[an]?|gs|gcs|abfss?)://)[^/@:?\s]*:[^\s\"']*@"), r"\1***@"),
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s]+@"), r"\1***@"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "***"),
    (
        re.compile(r"([?&](?:[\w.-]*(?:token|secret|password|signature|key)|sig)=)[^&\s]+", re.IGNORECASE),
        r"\1***",
    ),
)


def redact(text: str) -> str:
    """Return the text without `user:password@` in URIs, signed query parameters and hub tokens."""
    for pattern, replacement in _SECRET_VALUES:
        text = pattern.sub(replacement, text)
    return text


def hide_secrets(value: Any, name: str = "") -> Any:
    """Return nested settings with the values of secret fields hidden and all other text redacted.

    `name` is the field that `value` belongs to; its name decides whether the value is secret.
    """
    if isinstance(value, Mapping):
        return {key: hide_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(inner) for inner in value]
    if value and _SECRET_KEY.search(name):
        return "***"
    return redact(value) if isinstance(value, str) else value


def summarize_error(error: Exception) -> str:
    """Return the first line of the error's message, redacted; its type's name if it has no message."""
    lines = redact(str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
