"""Registries that cannot be used, and names that they do not take: refused before anything is trained."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.tracking.mlflow import connect_to_mlflow
from tests.support.bad_inputs import Commands, Workplace


@pytest.fixture(scope="session")
def registry_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the versions `good/1`, of a folder that is no model, and `good/2`, of no folder."""
    folder = tmp_path_factory.mktemp("registry")
    file = folder / "mlflow.db"
    client = connect_to_mlflow(f"sqlite:///{file}")
    client.create_registered_model("good")
    client.create_registered_model("empty")
    (folder / "no-model").mkdir()
    (folder / "no-model" / "notes.txt").write_text("nothing to load")
    client.create_model_version("good", (folder / "no-model").as_uri())
    client.create_model_version("good", (folder / "gone").as_uri())
    client.create_model_version("good", (folder / "gone").as_uri(), tags={"polyref.state": "verifying"})
    return file


@pytest.fixture
def registry(workplace: Workplace, registry_file: Path) -> Path:
    workplace.storage.mkdir()
    return Path(shutil.copy(registry_file, workplace.storage / "mlflow.db"))


def write_other_database(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("create table recipes (name text)")
    connection.close()


def change_database(*statements: str) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        with sqlite3.connect(file) as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()

    return spoil


def replace_by(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        file.unlink()
        make(file)

    return spoil


DATABASES: list[tuple[str, Callable[[Path], Any], list[str]]] = [
    ("random bytes", lambda file: file.write_bytes(os.urandom(4096)), ["mlflow.db", "not a database"]),
    ("text", lambda file: file.write_text("name,version\n" * 99), ["mlflow.db", "not a database"]),
    (
        "half of it",
        lambda file: os.truncate(file, file.stat().st_size // 2 // 4096 * 4096),
        ["mlflow.db", "restore it"],
    ),
    (
        "torn pages",
        lambda file: file.write_bytes(file.read_bytes()[:100] + os.urandom(file.stat().st_size - 100)),
        ["mlflow.db", "restore it"],
    ),
    ("a folder", replace_by(Path.mkdir), ["mlflow.db", "file"]),
    ("a pipe", replace_by(os.mkfifo), ["mlflow.db", "pipe"]),
    ("a link to itself", replace_by(lambda file: file.symlink_to(file)), ["mlflow.db"]),
    ("a link to a device", replace_by(lambda file: file.symlink_to("/dev/zero")), ["mlflow.db"]),
    ("another program's", replace_by(write_other_database), ["mlflow.db", "another program", "recipes"]),
    (
        "of a later MLflow",
        change_database("update alembic_version set version_num = 'f00f00f00f00'"),
        ["mlflow.db", "f00f00f00f00"],
    ),
    (
        "of an earlier MLflow",
        change_database("update alembic_version set version_num = '451aebb31d03'"),
        ["mlflow.db", "out-of-date"],
    ),
    ("without experiments", change_database("drop table experiments"), ["mlflow.db", "experiments"]),
]


@pytest.mark.parametrize(("spoil", "says"), [pytest.param(*case[1:], id=case[0]) for case in DATABASES])
@pytest.mark.parametrize("command", ["check", "list"])
def test_databases_are_refused(
    workplace: Workplace,
    commands: Commands,
    registry: Path,
    command: str,
    spoil: Callable[[Path], Any],
    says: list[str],
) -> None:
    spoil(registry)
    arguments = {
        "check": ("check", workplace.file),
        "list": ("models", "list", "--storage-path", workplace.storage),
    }
    commands.refuse(*arguments[command], says=says)


SERVERS: list[tuple[str, str, list[str]]] = [
    ("postgresql without its driver", "postgresql://me:pw@127.0.0.1:1/db", ["psycopg", "install"]),
    ("mysql without its driver", "mysql://me:pw@127.0.0.1:1/db", ["MySQLdb", "install"]),
    ("mysql with another driver", "mysql+pymysql://me:pw@127.0.0.1:1/db", ["pymysql", "install"]),
    ("mssql without its driver", "mssql+pyodbc://me:pw@127.0.0.1:1/db", ["pyodbc", "install"]),
    ("a driver that does not exist", "postgresql+nothing://me:pw@127.0.0.1:1/db", ["postgresql"]),
    ("an unknown scheme", "gopher://127.0.0.1:1", ["gopher"]),
    ("a server that is not there", "http://127.0.0.1:1", ["http://127.0.0.1:1", "does not answer"]),
    ("a name that is not there", "http://no-such-host.invalid", ["no-such-host", "does not answer"]),
    ("no host", "http://", ["http://HOST:PORT"]),
    ("a port that is none", "http://127.0.0.1:port", ["http://HOST:PORT"]),
    ("a port beyond ports", "http://127.0.0.1:99999", ["http://HOST:PORT"]),
    ("half an address", "http://[::1", ["http://HOST:PORT"]),
    ("a folder", "./mlruns", ["sqlite:///"]),
    ("a file URI", "file:///tmp/mlruns", ["sqlite:///"]),
    ("two slashes", "sqlite://mlflow.db", ["sqlite:///"]),
    ("no file", "sqlite:///", ["sqlite:///"]),
    ("a database where none can be", "sqlite:////proc/nothing/mlflow.db", ["/proc"]),
    ("a database in a file", "sqlite:///run.yaml/mlflow.db", ["run.yaml"]),
]


@pytest.mark.parametrize(("uri", "says"), [pytest.param(*case[1:], id=case[0]) for case in SERVERS])
@pytest.mark.parametrize("source", ["tracking.uri", "MLFLOW_TRACKING_URI"])
def test_servers_are_refused(
    workplace: Workplace,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    uri: str,
    says: list[str],
) -> None:
    if source == "tracking.uri":
        workplace.write_run(tracking={"uri": uri})
    else:
        monkeypatch.setenv(source, uri)
    commands.refuse("check", workplace.file, says=[source, *says])


def test_a_refusal_hides_the_password(workplace: Workplace, commands: Commands) -> None:
    workplace.write_run(tracking={"uri": "postgresql://me:hunter2@127.0.0.1:1/db"})
    outcome = commands.run("check", workplace.file)
    assert "***@" in outcome.err
    assert "hunter2" not in outcome.err


REFS: list[tuple[str, str, list[str]]] = [
    ("no name", "models:/", ["models:/NAME@ALIAS"]),
    ("a name alone", "models:/good", ["good/1"]),
    ("a name that is not there", "models:/goood/1", ["'goood'", "did you mean 'good'"]),
    ("a version that is not there", "models:/good/7", ["good/7", "good/1"]),
    ("a version of 30 digits", f"models:/good/{'9' * 30}", ["good/", "good/1"]),
    ("a version that is no number", "models:/good/one", ["models:/NAME/VERSION"]),
    ("a version below 0", "models:/good/-1", ["models:/NAME/VERSION"]),
    ("an alias that is not there", "models:/good@champion", ["good@champion", "good/1"]),
    ("an alias of nothing", "models:/good@", ["models:/NAME@ALIAS"]),
    ("two aliases", "models:/good@a@b", ["models:/NAME@ALIAS"]),
    ("a model without versions", "models:/empty/1", ["empty", "no versions"]),
    ("a quote", "models:/go'od/1", ["go'od"]),
    ("a name of 3,000 characters", f"models:/{'a' * 3000}/1", ["aaa"]),
    ("a folder that is no model", "models:/good/1", ["good/1", "no transformers model"]),
    ("a folder that is gone", "models:/good/2", ["good/2", "cannot be downloaded"]),
    ("a version half registered", "models:/good/3", ["version 3", "never verified"]),
]


@pytest.mark.parametrize(("ref", "says"), [pytest.param(*case[1:], id=case[0]) for case in REFS])
@pytest.mark.parametrize("command", ["check", "get"])
def test_references_to_models_are_refused(
    workplace: Workplace,
    commands: Commands,
    registry: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    command: str,
    ref: str,
    says: list[str],
) -> None:
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path_factory.mktemp("cache")))
    if command == "check":
        commands.refuse("check", workplace.file, f"policy.model={ref}", says=["policy", *says])
    else:
        commands.refuse("models", "get", ref, "--to", "new", "--storage-path", workplace.storage, says=says)


ALIASES: list[tuple[str, str, list[str]]] = [
    ("reserved", "latest", ["latest", "reserved"]),
    ("reserved, written large", "Latest", ["latest", "reserved"]),
    ("like a version", "v1", ["v1", "reserved"]),
    ("nothing", "", ["alias"]),
    ("a space", "my champion", ["my champion"]),
    ("a slash", "a/b", ["a/b"]),
    ("an @", "a@b", ["a@b"]),
    ("300 characters", "a" * 300, ["alias"]),
    ("half a character", "a\udcff", ["alias"]),
]


@pytest.mark.parametrize(("alias", "says"), [pytest.param(*case[1:], id=case[0]) for case in ALIASES])
def test_aliases_are_refused(
    workplace: Workplace, commands: Commands, registry: Path, alias: str, says: list[str]
) -> None:
    arguments = ("models", "promote", "good/1", "--force", "--storage-path", workplace.storage)
    commands.refuse(*arguments, "--alias", alias, says=["alias", *says])


PLACES: list[tuple[str, str, list[str]]] = [
    ("where nothing can be made", "/proc/x", ["/proc/x", "--to"]),
    ("a device", "/dev/null", ["/dev/null", "--to"]),
    ("a file", "pairs.jsonl", ["pairs.jsonl", "--to"]),
    ("in a file", "pairs.jsonl/new", ["pairs.jsonl/new", "--to"]),
    ("a full folder", "runs", ["runs", "--to"]),
    ("here", ".", ["--to"]),
    ("everything", "/", ["--to"]),
    ("the home of nobody", "~nobody-at-all/x", ["--to", "~nobody-at-all"]),
    ("a name of 300 characters", "a" * 300, ["--to"]),
    ("a link to itself", "loop", ["--to", "loop"]),
    ("a NUL byte", "a\0b", ["--to"]),
]


@pytest.mark.parametrize(("to", "says"), [pytest.param(*case[1:], id=case[0]) for case in PLACES])
def test_places_for_copies_are_refused(
    workplace: Workplace, commands: Commands, registry: Path, to: str, says: list[str]
) -> None:
    (workplace.folder / "loop").symlink_to("loop")
    arguments = ("models", "get", "good/1", "--storage-path", workplace.storage)
    commands.refuse(*arguments, "--to", to, says=says)


@pytest.mark.parametrize("command", ["list", "show good/1", "compare good/1 good/2", "promote good/1"])
def test_a_registry_that_is_absent_is_refused(workplace: Workplace, commands: Commands, command: str) -> None:
    commands.refuse(
        "models", *command.split(), "--storage-path", "nowhere", says=["no MLflow database", "nowhere"]
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("show good/7", ["good/7"]),
        ("show :", ["models:/NAME"]),
        ("show nothing", ["nothing"]),
        ("compare good/1", ["two versions"]),
        ("compare good/1 good", ["leaves the version open"]),
        ("promote good", ["leaves the version open"]),
        ("promote good/1", ["does not say which references", "--force"]),
        ("get good/1 --to new --merge --adapter", ["choose one"]),
    ],
)
def test_commands_on_models_are_refused(
    workplace: Workplace, commands: Commands, registry: Path, arguments: str, says: list[str]
) -> None:
    commands.refuse("models", *arguments.split(), "--storage-path", workplace.storage, says=says)
