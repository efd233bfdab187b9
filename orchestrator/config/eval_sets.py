"""Names of the held-out sets, as metrics carry them: `eval/<set>/accuracy`."""

import re
from collections.abc import Iterable, Sequence

_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,100}")
TAKEN_NAMES = frozenset(
    {
        *("accuracy", "accuracy_interval", "calibration_error", "dispersion", "entropy", "kl", "label_nll"),
        *("logps", "logratio", "loss", "margin", "margin_at_kl", "reward", "reward_at_kl", "rewards"),
        *("samples", "weights"),
    }
)
"""What follows `eval/` in the metrics of all held-out pairs."""


def refuse_set_names(names: Iterable[str]) -> None:
    """Refuse names of held-out sets that no metric can carry.

    Raises:
        ValueError: a name has other characters, or is that of a metric; says what to do.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"data.eval: a set is named {name!r}, which no metric can carry: use letters, digits, dots, "
                "underscores and hyphens, 100 at most"
            )
        if name in TAKEN_NAMES:
            raise ValueError(
                f"data.eval: a set is named {name!r}, but eval/{name} is a metric: use another name, such as "
                f"{name}_set"
            )


def make_set_names(sources: Sequence[str]) -> list[str]:
    """Make a name that metrics can carry for each source of a mixture, unlike the others'."""
    names: list[str] = []
    for source in sources:
        base = re.sub(r"[^A-Za-z0-9._-]", "_", source)[:90]
        if base in TAKEN_NAMES or not _NAME.fullmatch(base):
            base += "_set"
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names
