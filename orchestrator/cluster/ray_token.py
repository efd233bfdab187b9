"""Who may use a Ray: the token and addresses of one that this process starts, and the token of others."""

import contextlib
import os
import secrets
from collections.abc import Iterator

from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RpcError

from orchestrator.environment import set_environment
from orchestrator.errors import UsageError

_TOKEN_SETTINGS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextlib.contextmanager
def protect_local_ray() -> Iterator[None]:
    """Let a Ray that is started in the block, and shut down in it, serve this process and its children only.

    Its servers listen on loopback, and it has a random token that lies in the environment of its processes
    and nowhere else. Where the environment says how Ray authenticates, that is kept.
    """
    given = any(name in os.environ for name in _TOKEN_SETTINGS)
    token = {} if given else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with _listen_on_loopback(), _set_authentication(token):
        yield


@contextlib.contextmanager
def use_machine_token() -> Iterator[None]:
    """Send this machine's token to Ray in the block, if there is one and RAY_AUTH_MODE is not set.

    `ray start` asks for that token wherever there is one.
    """
    loader = AuthenticationTokenLoader.instance()
    use = "RAY_AUTH_MODE" not in os.environ and loader.has_token(ignore_auth_mode=True)
    with _set_authentication({"RAY_AUTH_MODE": "token"} if use else {}):
        yield


def check_token(address: str) -> None:
    """Check that the Ray at `address` accepts this process: `ray.init` would try for minutes.

    Raises:
        UsageError: it asks for another token, or is no Ray.
    """
    try:
        GcsClient(address=address)
    except AuthenticationError:
        raise UsageError(
            f"the Ray at {address} asks for a token that this process does not have: set "
            "RAY_AUTH_MODE=token, and have the token in RAY_AUTH_TOKEN or in ~/.ray/auth_token"
        ) from None
    except RpcError:
        raise UsageError(
            f"what listens at {address} does not answer as Ray does: correct RAY_ADDRESS"
        ) from None


@contextlib.contextmanager
def _listen_on_loopback() -> Iterator[None]:
    """Have Ray in the block use no address but loopback, as it does by itself on macOS and Windows.

    `_node_ip_address="127.0.0.1"` does not do that: on Linux, Ray replaces it by the machine's address.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # which was read from the variable when Ray was imported
    try:
        with set_environment(**{ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _set_authentication(variables: dict[str, str]) -> Iterator[None]:
    try:
        with set_environment(**variables):
            _reload_authentication()
            yield
    finally:
        _reload_authentication()


def _reload_authentication() -> None:
    """Make Ray in this process read the mode and token again, which it keeps once read."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
