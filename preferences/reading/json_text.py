"""Parse JSON that somebody else wrote, and refuse what could not be tokenised, stored or shown later."""

import json
import re
from typing import Any

DEEPEST = 64
"""Lists and objects within each other; JSON schemas of tools have about ten."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BRACKETS = re.compile(r"[\[{]")


class JsonError(ValueError):
    """A text is no JSON that a row may hold: `reason` is the kind of error, `detail` says what and where."""

    def __init__(self, reason: str, detail: str, line: int | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.line = reason, detail, line


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        JsonError: it is malformed, is nested too deeply, has a key twice in one object, a number of thousands
            of digits, or half of a surrogate pair, which has no encoding.
    """
    try:
        value = json.loads(text, object_pairs_hook=_build_object)
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at column {error.colno}"
        raise JsonError("malformed JSON", f"not valid JSON ({detail})", error.lineno) from None
    except RecursionError:
        raise _build_depth_error() from None
    except JsonError:
        raise
    except ValueError as error:  # Python converts numbers up to a number of digits
        raise JsonError("malformed JSON", f"not valid JSON ({str(error).partition(';')[0]})") from None
    if len(_BRACKETS.findall(text)) > DEEPEST and _measure_depth(value) > DEEPEST:
        raise _build_depth_error()
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise JsonError("not text", f"not text: {half} is half of a character") from None
    return value


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonError("a key twice", f"ambiguous: the key {twice[:80]!r} is there twice")
    return built


def _build_depth_error() -> JsonError:
    return JsonError("nested too deeply", f"nested more than {DEEPEST} deep")


def _measure_depth(value: Any) -> int:
    """Return how many lists and objects lie within each other, without recursion."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, list | dict)]:
        depth += 1
        level = [child for part in level for child in (part.values() if isinstance(part, dict) else part)]
    return depth
