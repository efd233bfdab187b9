"""Names that may be meant by other names."""

import difflib
from collections.abc import Sequence


def suggest_name(word: str, known: Sequence[str]) -> str:
    """Return ` (did you mean 'chosen'?)`, or an empty text if no known word is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
