"""`polyref submit`: run a command as a job on a cluster, through Ray's job API.

The job runs in a folder with the files that the command needs (see `bundle.py`), with polyref as it is
installed on the nodes. Its log is streamed here, and its exit code is this command's.
"""

import asyncio
import ipaddress
import logging
import os
import re
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from orchestrator.cluster.job_secrets import SECRET_NAMES, SECRETS_LOCATION, upload_secrets
from orchestrator.cluster.worker_environment import collect_secrets
from orchestrator.environment import set_environment
from orchestrator.errors import RunFailed, UsageError
from orchestrator.jobs.bundle import PACKAGES, JobBundle, build_bundle, format_megabytes, has_credentials
from orchestrator.redaction import redact, summarize_error

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ANSWER_TIMEOUT_S = 300.0
"""How long the log of a job is requested again from a cluster that does not answer."""
_RETRY_S = 1.0
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|PRIVATE|(API|ACCESS)_?KEY|_KEY$", re.I
)
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED_NAMES = (SECRETS_LOCATION, SECRET_NAMES)


def submit_job(
    command: Sequence[str],
    *,
    address: str | None = None,
    wait: bool = True,
    env: Sequence[str] = (),
    secret: Sequence[str] = (),
    code: bool = False,
    insecure: bool = False,
) -> int:
    """Submit a command, follow it, and return the exit code for this process.

    Args:
        command: the command without `polyref`: `train run.yaml loss.beta=0.2`.
        address: address of the job server; default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, then port 8265 here.
        wait: stream the log until the job ends, and return its exit code; else print its id and return 0.
        env: names of environment variables to send with their values here. The cluster shows them.
        secret: names of variables to send that must not be shown or logged.
        code: send polyref's own packages too.
        insecure: send the cluster's token and secrets over plain HTTP to another machine too.

    Raises:
        UsageError: the command, an option or the address is wrong; nothing was submitted.
        RunFailed: the cluster no longer answers, or the job was stopped or did not start.
    """
    bundle = build_bundle(command, code=code)
    variables, hidden = _read_variables(env, "env"), _read_variables(secret, "secret")
    _refuse_shown_secrets(variables)
    print_status = Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print
    client, headers = connect_to_job_server(address, insecure=insecure, secrets=bool(hidden))
    server = client.get_address()
    if hidden:
        variables[SECRETS_LOCATION] = upload_secrets(hidden, server=server, headers=headers)
    job = _submit_bundle(client, bundle, variables, code=code)
    print_status(
        f"{job}: {_format_file_list(bundle, code=code)} ({format_megabytes(bundle.size)}) to {server}"
    )
    if not wait:
        print_status(_format_follow_commands(job, server, headers))
        sys.stdout.write(f"{job}\n")
        return 0
    try:
        details = asyncio.run(_follow_job(client, job, print_status))
    except KeyboardInterrupt:
        print_status(f"\n{job} keeps running; {_format_follow_commands(job, server, headers)}")
        return 130
    return _convert_exit_code(job, details, print_status)


def connect_to_job_server(
    address: str | None, *, insecure: bool = False, secrets: bool = False
) -> tuple[Any, dict[str, str]]:
    """Return a client of the cluster's job server, and the HTTP headers with its token.

    Args:
        address: as for `submit_job`.
        insecure: also connect where others on the network could read what is sent.
        secrets: whether secrets will be sent, which others must not read, as they must not the token.

    Raises:
        UsageError: nothing answers there, the token is missing or wrong, or others on the network could read
            the token or secrets and `insecure` is not set.
    """
    from ray.dashboard.utils import get_address_for_submission_client
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(module).setLevel(logging.WARNING)  # polyref itself prints what is sent
    requested = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    server = requested if requested not in (None, "", "local") else DEFAULT_ADDRESS
    token = _read_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with set_environment(RAY_API_SERVER_ADDRESS=server):  # Ray prefers its variables to its arguments
            server = get_address_for_submission_client(server)  # of `auto` and `ray://` too
        if token and not insecure:
            _refuse_plain_http(server, "the cluster's token", "run code on the cluster")
        elif secrets and not insecure:
            _refuse_plain_http(server, "the values of --secret", "use them")
        os.environ.update(_exclude_from_proxies(server))
        with set_environment(RAY_API_SERVER_ADDRESS=server):
            return JobSubmissionClient(server, headers=dict(headers)), headers
    except UsageError:
        raise
    except AuthenticationError as error:
        problem = "the token here is another" if token else "there is no token here"
        raise UsageError(
            f"the cluster at {server} requires a token, and {problem}; copy the cluster's ~/.ray/auth_token "
            "to ~/.ray/auth_token here, or set RAY_AUTH_TOKEN_PATH"
        ) from error
    except Exception as error:  # Ray, requests and gRPC raise errors of any class
        raise UsageError(
            f"no job server answers at {server}: {summarize_error(error)} Give --address or RAY_ADDRESS; a "
            "cluster started by `ray up` is reached through `ray dashboard cluster.yaml`, left running, at "
            + DEFAULT_ADDRESS
        ) from error


def _read_token() -> str | None:
    """Read the cluster's token from where Ray looks for it, also where RAY_AUTH_MODE is not set."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _refuse_plain_http(server: str, what: str, harm: str) -> None:
    """Refuse to send the token or secrets where they leave this machine without encryption."""
    parts = urlsplit(server)
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname)):
        raise UsageError(
            f"{redact(server)} would get {what} unencrypted, and whoever reads that on the way can {harm}; "
            "go through a tunnel (ray dashboard cluster.yaml, or ssh -L 8265:127.0.0.1:8265 HEAD) with "
            f"--address {DEFAULT_ADDRESS}, or through https://, or give --insecure if you trust everything "
            "in between"
        )


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:  # another name
        return False


def _exclude_from_proxies(address: str) -> dict[str, str]:
    """Return variables that exclude this machine from proxies, which cannot reach ports forwarded to it."""
    host = urlsplit(address).hostname
    if not _is_loopback(host):
        return {}
    return {
        name: ",".join(filter(None, [os.environ.get(name), f"127.0.0.1,localhost,::1,{host}"]))
        for name in ("NO_PROXY", "no_proxy")
    }


def _format_file_list(bundle: JobBundle, *, code: bool) -> str:
    files = [name for name in bundle.files if not code or name.partition("/")[0] not in PACKAGES]
    shown = files if len(files) <= 8 else [*files[:7], f"{len(files) - 7} more files"]
    return ", ".join([*shown, *(["polyref itself"] if code else [])]) or "no files"


def _read_variables(names: Sequence[str], option: str) -> dict[str, str]:
    values = {}
    for name in names:
        if not _VARIABLE_NAME.fullmatch(name) or name in _RESERVED_NAMES:
            raise UsageError(
                f"--{option} takes the name of a variable, not {name.partition('=')[0]!r} and a value; set "
                f"it here and give its name: --{option} HF_TOKEN"
            )
        if name not in os.environ:
            raise UsageError(f"--{option} {name}: there is no such variable here; export it first")
        values[name] = os.environ[name]
    return values


def _refuse_shown_secrets(variables: Mapping[str, str]) -> None:
    secret = collect_secrets(variables)
    for name, value in variables.items():
        if name in secret or _SECRET_NAME.search(name) or has_credentials(value):
            raise UsageError(
                f"--env {name} looks like a secret, and the cluster shows and logs what --env sends; "
                f"use --secret {name}"
            )


def _submit_bundle(client: Any, bundle: JobBundle, variables: Mapping[str, str], *, code: bool) -> str:
    program = ("python", "-m", "orchestrator") if code else ("polyref",)
    with tempfile.TemporaryDirectory(prefix="polyref-") as folder:
        bundle.write(Path(folder))
        try:
            with set_environment(
                RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES="", **_exclude_from_proxies(client.get_address())
            ):
                return str(
                    client.submit_job(
                        entrypoint=shlex.join([*program, *bundle.command]),
                        submission_id=f"{bundle.name}-{uuid.uuid4().hex[:8]}",
                        runtime_env={"env_vars": dict(variables)}
                        | ({"working_dir": folder} if bundle.files else {}),
                    )
                )
        except Exception as error:  # Ray, requests and gRPC raise errors of any class
            raise RunFailed(f"the cluster did not take the job: {summarize_error(error)}") from error


async def _follow_job(client: Any, job: str, print_status: Callable[[str], None]) -> Any:
    """Write the job's log to standard output until the job ends, and return its details.

    A connection that breaks, as tunnels do, is made again; the log continues where it was.
    """
    # `written` and `read` count characters.
    written, last_answer, silent = 0, time.monotonic(), False
    while True:
        try:
            read = 0
            async for text in client.tail_job_logs(job):
                new = text[max(0, written - read) :]
                read += len(text)
                written = max(written, read)
                sys.stdout.write(new)
                sys.stdout.flush()
                last_answer, silent = time.monotonic(), False
            details = await asyncio.to_thread(client.get_job_info, job)
            last_answer = time.monotonic()
            if details.status.is_terminal():
                return details
        except Exception as error:  # Ray, aiohttp and requests raise errors of any class
            if time.monotonic() - last_answer > ANSWER_TIMEOUT_S:
                raise RunFailed(
                    f"the cluster has not answered for {ANSWER_TIMEOUT_S / 60:g} minutes; {job} may still "
                    f"be running: see ray job logs --follow {job} once it answers"
                ) from error
            if not silent:
                print_status(f"no answer from the cluster; retrying for {ANSWER_TIMEOUT_S / 60:g} minutes")
            silent = True
        await asyncio.sleep(_RETRY_S)


def _format_follow_commands(job: str, server: str, headers: Mapping[str, str]) -> str:
    mode = "RAY_AUTH_MODE=token " if headers and "RAY_AUTH_MODE" not in os.environ else ""
    return (
        f"follow it: {mode}ray job logs --address {server} --follow {job}; "
        f"stop it: {mode}ray job stop --address {server} {job}"
    )


def _convert_exit_code(job: str, details: Any, print_status: Callable[[str], None]) -> int:
    """Return this process's exit code for a job that has ended.

    Raises:
        RunFailed: the job was stopped, or did not start.
    """
    code = details.driver_exit_code
    if details.status.value == "SUCCEEDED":
        return 0
    if details.status.value == "STOPPED":
        raise RunFailed(f"{job} was stopped; submitted again, it resumes from its last checkpoint")
    if code is None:
        raise RunFailed(f"{job} did not start: {details.message or details.error_type or 'no reason given'}")
    if code == 127:
        print_status(
            f"{job}: polyref is not on the PATH of the cluster's head; install it there, or use --code"
        )
    return int(code) if code > 0 else 128 - int(code)
