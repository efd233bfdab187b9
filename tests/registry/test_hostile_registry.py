"""A registry that names files outside of the folder that a version is downloaded to."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.registry.download import _download_artifacts

NAMES = ["../evil", "model/../../evil", "{outside}/evil", "%2e%2e/evil", "file://{outside}/evil"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    """An artifact store with one file, under the name that the test sets as `name`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listing = {"files": [{"path": server.name, "is_dir": False, "file_size": 4}]}
            body = json.dumps(listing).encode() if "?" in self.path else b"evil"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def download(server: http.server.ThreadingHTTPServer, cache: Path) -> list[str]:
    source = f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts/1/model"
    with _download_artifacts(source, source, "models:/evil/1", cache) as folder:
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_outside(
    server: http.server.ThreadingHTTPServer, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    server.name = name.format(outside=outside)
    with pytest.raises(UsageError, match="files of models:/evil/1 cannot be downloaded"):
        download(server, tmp_path / "cache" / "deep")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["model/good", "..\\good"])  # a backslash is a letter like others here
def test_a_file_inside_is_downloaded(
    server: http.server.ThreadingHTTPServer, tmp_path: Path, name: str
) -> None:
    server.name = name
    assert download(server, tmp_path / "cache" / "deep") == [name]
