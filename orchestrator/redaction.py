"""Removal of secrets from text and settings that are shown, logged or stored."""

import re
from collections.abc import Mapping
from typing import Any

_SECRET_KEY = re.compile(
    r"(^|[._-])(token|password|passwd|passphrase|secret|(api|access|account|private|secret)_?key|"
    r"authorization|credentials?)$",
    re.IGNORECASE,
)

# A value without the quotes and punctuation that surround it.
_VALUE = r"[^\s&]+?(?=[\"'`)\]},;.]*(?:[\s&]|$))"
_QUOTED_VALUE = rf"(?:(?<=\")[^\"]+|(?<=')[^']+|{_VALUE})"
# No secrets: special tokens of a tokenizer, small numbers, and what is no value.
_NAME = (
    r"(?<![A-Za-z0-9])(?:(?<!(?:bos|cls|eos|pad|sep|unk)_)(?<!mask_)(?:access|auth|session)?token(?!=[\d.]{1,6}\b)"
    r"|password|passwd|passphrase|(?:client)?secret|(?:api|access|account|private|secret|sharedaccess)[_-]?key)"
)

_SECRET_VALUES = (
    # An unescaped secret may contain slashes: everything up to the last @ is hidden.
    (re.compile(r"\b((?:s3[an]?|gs|gcs|abfss?)://)[^/@:?\s]*:[^\s\"']*@"), r"\1***@"),
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,40}://)[^/\s]+@"), r"\1***@"),
    (
        re.compile(r"([?&](?:[\w.-]*(?:token|secret|password|signature|key)|sig)=)[^&\s]+", re.IGNORECASE),
        r"\1***",
    ),
    (
        re.compile(
            rf"\b(authorization[\"']?\s*[:=]\s*[\"']?)(?:(?:basic|bearer|digest|token)\s+)?{_VALUE}",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    # Prose has words behind "Bearer", and few of them are as long or have digits.
    (re.compile(rf"\b(bearer\s+)(?=\S*\d|\S{{20}}){_VALUE}", re.IGNORECASE), r"\1***"),
    (
        re.compile(
            rf"\b(aws_(?:secret_access_key|session_token)[\"']?\s*[:=]\s*[\"']?){_VALUE}", re.IGNORECASE
        ),
        r"\1***",
    ),
    (
        re.compile(
            rf"({_NAME}(?:[\"']\s*[:=]\s*|=)[\"']?)(?!(?:none|null|true|false|auto)\b){_QUOTED_VALUE}",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    # Keys that are known by their beginnings: Hugging Face, AWS, GitHub, GitLab, Slack, OpenAI and others.
    (
        re.compile(
            r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|A[KS]IA[A-Z0-9]{16}\b|gh[oprsu]_[A-Za-z0-9]{16,}"
            r"|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[A-Za-z0-9-]{10,}"
            r"|sk-(?:\w+-){0,9}(?=[A-Za-z_]*\d)\w{16,}[\w-]*)"
        ),
        "***",
    ),
)


def redact(text: str) -> str:
    """Return the text with secrets hidden: in URIs, headers and assignments, and keys of known services.

    A secret in another form is not recognised.
    """
    for pattern, replacement in _SECRET_VALUES:
        text = pattern.sub(replacement, text)
    return text


def shorten_input(text: str) -> str:
    """Return the beginning of what a user wrote, as a message may repeat it, with secrets hidden."""
    shown = redact(text[:10_000])  # cut far behind what is shown: a secret's end may be what gives it away
    return shown if len(shown) <= 300 else shown[:300] + "..."


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
