"""Environment variables for libraries that offer no argument for the same setting."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def set_environment(**variables: str) -> Iterator[None]:
    """Set environment variables inside the block and restore their earlier values afterwards."""
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
    """Add this machine's loopback addresses to NO_PROXY and no_proxy, for this process and its children.

    Ray and MLflow make HTTP requests to loopback addresses, which a proxy cannot reach.
    """
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost", "::1"]))
