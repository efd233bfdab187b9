"""Environment variables that some libraries read where they offer no argument."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def set_environment(**variables: str) -> Iterator[None]:
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


def exclude_loopback_from_proxies() -> None:
    """Ray and MLflow talk to this machine over HTTP, which a proxy cannot reach."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost", "::1"]))
