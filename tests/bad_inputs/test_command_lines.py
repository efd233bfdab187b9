"""Command lines and environment variables that cannot be meant."""

import os
import shlex
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.bad_inputs import Commands, Workplace

# A command line in the folder of a good run, and words of the refusal.
LINES: list[tuple[str, str, list[str]]] = [
    ("no command", "", ["needs a command", "polyref --help"]),
    ("an unknown command", "trian run.yaml", ["trian", "polyref --help"]),
    ("an unknown option", "check run.yaml --quick", ["--quick", "check --help"]),
    ("an option of another command", "check run.yaml --fresh", ["--fresh", "check --help"]),
    ("an option without its value", "score run.yaml --audit", ["--audit"]),
    ("train without a run", "train", ["RUN.YAML", "train --help"]),
    ("tune without a sweep", "tune", ["SWEEP.YAML", "tune --help"]),
    ("an override before the run", "check loss.beta=0.2 run.yaml", ["loss.beta=0.2", "no such file"]),
    ("a second run", "check run.yaml run.yaml", ["run.yaml", "field.name=value"]),
    ("fewer audits than none", "score run.yaml --audit -1", ["--audit", "0"]),
    ("audits that are a word", "score run.yaml --audit all", ["--audit", "integer"]),
    ("fewer samples than none", "tune run.yaml --samples -1", ["--samples", "0"]),
    ("a time below 0", "tune run.yaml --time-budget -1", ["--time-budget", "0"]),
    ("a time of nan", "tune run.yaml --time-budget nan", ["--time-budget"]),
    ("fewer failures than none", "tune run.yaml --max-failures -1", ["--max-failures", "0"]),
    ("half a failure", "tune run.yaml --max-failures 0.5", ["--max-failures", "integer"]),
    ("a schema of nothing", "schema sweeep", ["sweeep", "run, sweep"]),
    ("two schemas", "schema run sweep", ["sweep", "schema --help"]),
    ("no command on models", "models", ["models", "models --help"]),
    ("an unknown command on models", "models lst", ["lst", "models --help"]),
    ("a limit that does not exist", "models list --limit -1", ["--limit", "list --help"]),
    ("show without a name", "models show", ["show --help"]),
    ("get without a place", "models get a/1", ["--to", "get --help"]),
    ("no command on data", "data", ["data", "data --help"]),
    ("fewer pairs than none", "data show run.yaml --pairs -1", ["--pairs", "0"]),
    ("overrides of a data file", "data show pairs.jsonl loss.beta=1", ["loss.beta=1", "run file"]),
    ("init without data", "init", ["--data", "init --help"]),
    ("init onto a file", "init --data pairs.jsonl", ["run.yaml", "exists", "--to"]),
    ("init onto a folder", "init --data pairs.jsonl --to .", ["exists", "--to"]),
    ("init where nothing can be", "init --data pairs.jsonl --to /proc/x/r.yaml", ["--to"]),
    ("init in a file", "init --data pairs.jsonl --to run.yaml/r.yaml", ["--to"]),
    ("init of no data", "init --data '' --to new.yaml", ["source"]),
    ("init of an absent file", "init --data p.jsonl --to new.yaml", ["p.jsonl"]),
    ("init of an unknown loss", "init --data pairs.jsonl --to n.yaml --preset dp", ["dpo"]),
    ("dispersion of no split", "dispersion run.yaml --split test", ["--split", "train and eval"]),
    ("dispersion onto a folder", "dispersion run.yaml --to .", ["--to"]),
    ("dispersion where nothing can be", "dispersion run.yaml --to /proc/x/d.parquet", ["--to"]),
    ("a demo in a file", "demo --folder run.yaml", ["run.yaml", "--folder"]),
    ("a demo where nothing can be", "demo --folder /proc/x", ["/proc/x", "--folder"]),
    ("nothing to submit", "submit", ["submit --help"]),
    ("submit of an unknown command", "submit -- trian run.yaml", ["trian", "'train'"]),
    ("submit of no run", "submit -- train", ["train needs a run file"]),
    ("submit of an absent run", "submit -- train nowhere.yaml", ["nowhere.yaml", "no such file"]),
    ("submit of a label", "submit -- label pairs.jsonl", ["label cannot be submitted"]),
    ("submit of a bad field", "submit -- train run.yaml loss.beta=-1", ["loss.beta"]),
    ("submit of an unset variable", "submit --env NOT_SET_AT_ALL -- models list", ["NOT_SET"]),
    ("submit of an assignment", "submit --env A=1 -- models list", ["--env", "name of a variable"]),
    ("submit of a variable of no name", "submit --env '' -- models list", ["--env"]),
    ("submit of a secret of no name", "submit --secret 'a b' -- models list", ["--secret"]),
    ("submit of a shown secret", "submit --env A_TOKEN -- models list", ["--secret A_TOKEN"]),
    ("submit of our own variable", "submit --env POLYREF_SECRETS -- models list", ["POLYREF"]),
    ("submit to nobody", "submit --address http://127.0.0.1:1 -- models list", ["answers"]),
    ("submit to no host", "submit --address http:// -- models list", ["--address"]),
    ("submit to a word", "submit --address nonsense -- models list", ["--address"]),
    ("submit to a port beyond ports", "submit --address http://a:99999 -- models list", ["a:9"]),
    ("submit to half an address", "submit --address 'http://[::1' -- models list", ["--address"]),
    ("submit by an unknown scheme", "submit --address gopher://a -- models list", ["gopher"]),
    ("label to a table of text", "label pairs.jsonl --to a.csv --judge m", [".parquet"]),
    ("label by nobody", "label pairs.jsonl --to a.parquet", ["--judge"]),
    ("label in no time", "label pairs.jsonl --to a.parquet --temperature 0", ["--temperature"]),
    ("label by nan", "label pairs.jsonl --to a.parquet --temperature nan", ["--temperature"]),
    ("label by a template that is none", "label p --to a.parquet --judge m --template .", ["--template"]),
    ("label by a device", "label p --to a.parquet --judge m --template /dev/zero", ["--template"]),
    ("label in the home of nobody", "label p --to '~nobody-at-all/a.parquet' --judge m", ["--to"]),
    ("label by one answer", "label p --to a.parquet --judge m --answers A", ["--answers"]),
    ("label at no URL", "label p --to a.parquet --judge-url here --judge-model m", ["--judge-url"]),
    ("label of fewer pairs than one", "label p --to a.parquet --limit 0", ["--limit"]),
    ("label by a weight of nothing", "label p --to a.parquet --judge m=0", ["weight"]),
    ("label by a weight of nan", "label p --to a.parquet --judge m=nan", ["weight"]),
]


@pytest.mark.parametrize(("line", "says"), [pytest.param(*case[1:], id=case[0]) for case in LINES])
def test_command_lines_are_refused(
    workplace: Workplace,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    says: list[str],
) -> None:
    monkeypatch.setenv("A_TOKEN", "secret")
    monkeypatch.setenv("POLYREF_SECRETS", "A")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    workplace.write_run(storage_path="/shared/runs" if line.startswith("submit") else str(workplace.storage))
    commands.refuse(*shlex.split(line), says=says)


VARIABLES: list[tuple[str, dict[str, str], list[str]]] = [
    ("nobody's Ray", {"RAY_ADDRESS": "127.0.0.1:1"}, ["127.0.0.1:1", "RAY_ADDRESS"]),
    ("nobody's Ray by its client", {"RAY_ADDRESS": "ray://127.0.0.1:1"}, ["127.0.0.1:1", "RAY_ADDRESS"]),
    ("a Ray that is a word", {"RAY_ADDRESS": "nonsense"}, ["nonsense", "RAY_ADDRESS"]),
    ("a Ray of no port", {"RAY_ADDRESS": "127.0.0.1:"}, ["127.0.0.1:", "RAY_ADDRESS"]),
    ("a Ray of a port beyond ports", {"RAY_ADDRESS": "127.0.0.1:99999"}, ["99999", "RAY_ADDRESS"]),
    ("a Ray of a port below 0", {"RAY_ADDRESS": "127.0.0.1:-1"}, ["-1", "RAY_ADDRESS"]),
    ("a Ray by a server's URL", {"RAY_ADDRESS": "http://127.0.0.1:1"}, ["http://127.0.0.1:1", "RAY_ADDRESS"]),
    ("a Ray of half a host", {"RAY_ADDRESS": "[::1:6379"}, ["RAY_ADDRESS"]),
    ("a Ray of a long host", {"RAY_ADDRESS": f"{'a' * 300}:6379"}, ["RAY_ADDRESS"]),
    ("a cache that is a file", {"POLYREF_CACHE": "run.yaml"}, ["POLYREF_CACHE", "run.yaml"]),
    ("a cache where nothing can be", {"POLYREF_CACHE": "/proc/cache"}, ["POLYREF_CACHE", "/proc/cache"]),
    ("a cache in the home of nobody", {"POLYREF_CACHE": "~nobody-at-all/c"}, ["POLYREF_CACHE", "~nobody"]),
    ("a cache in a device", {"POLYREF_CACHE": "/dev/null"}, ["POLYREF_CACHE", "/dev/null"]),
    ("a job's secrets without a job", {"POLYREF_MAILBOX": "gcs://x"}, ["POLYREF_MAILBOX", "RAY_ADDRESS"]),
    ("a registry of no scheme", {"MLFLOW_TRACKING_URI": "mlflow"}, ["MLFLOW_TRACKING_URI", "mlflow"]),
]


@pytest.mark.parametrize(("variables", "says"), [pytest.param(*case[1:], id=case[0]) for case in VARIABLES])
def test_variables_are_refused(
    workplace: Workplace,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    says: list[str],
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    commands.refuse("check", workplace.file, says=says)


class QuietHandler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *_arguments: object) -> None:
        pass


def test_a_server_that_is_no_ray_is_refused(
    workplace: Workplace, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), QuietHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.server_port}")
        commands.refuse("check", workplace.file, says=["no Ray answers", "RAY_ADDRESS"])
        server.shutdown()


@pytest.mark.parametrize("value", ["run.yaml", "/proc/hub"], ids=["a file", "where nothing can be"])
def test_a_hubs_cache_that_cannot_be_is_refused(
    workplace: Workplace, commands: Commands, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(
        constants, "HF_HUB_CACHE", str(Path(value) / "hub")
    )  # read from HF_HOME at its import
    commands.refuse("check", workplace.file, "policy.model=some/model", says=["policy", "some/model"])


def test_a_path_with_a_line_break_is_one_message(workplace: Workplace, commands: Commands) -> None:
    name = "run\npolyref.yaml"
    os.rename(workplace.file, workplace.folder / name)
    commands.refuse("check", name, "training.max_steps=0", says=["training.max_steps"])
