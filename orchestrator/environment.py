"""Environment variables that some libraries read where they offer no argument."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def changed(**variables: str) -> Iterator[None]:
    """Inside, these are set; afterwards all are as they were."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
