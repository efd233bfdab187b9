"""A judge behind an HTTP server: retries, resuming, votes, and messages without the key."""

import json
import math
import re
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest

from orchestrator.errors import RunFailed, UsageError
from orchestrator.labels.label import label_pairs
from orchestrator.labels.settings import EndpointSettings, LabelSettings, parse_judges
from orchestrator.labels.templates import load_template
from preferences.config import SourceConfig

pytest.importorskip("openai")

KEY = "sk-very-secret-1234"
SHOWN = re.compile(r"Answer A:\n(\w+)\n\nAnswer B:\n(\w+)")


class FakeServer:
    """A chat endpoint whose judge gives the longer answer log-odds of the difference in length.

    `plan` has a status for each of the next requests; after them come answers. `die_after` closes the
    connection of every later request without an answer.
    """

    def __init__(self):
        self.plan, self.requests, self.keys = [], [], []
        self.die_after, self.logprobs, self.refused = math.inf, True, None
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def take_status(self, body, key):
        with self._lock:
            self.requests.append(body)
            self.keys.append(key)
            if len(self.requests) > self.die_after:
                return None
            return self.plan.pop(0) if self.plan else 200

    @property
    def questions(self):
        return Counter(body["messages"][0]["content"] for body in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.fake.take_status(body, self.headers["Authorization"])
        if self.fake.refused and self.fake.refused in body["messages"][0]["content"]:
            status = 400
        if status is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        key = self.headers["Authorization"]
        answer = (
            self._judge(body)
            if status == 200
            else {"error": {"message": f"refused for {key}", "code": self.fake.refused and "content_filter"}}
        )
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(content)

    def _judge(self, body):
        first, second = SHOWN.search(body["messages"][0]["content"]).groups()
        difference = len(first) - len(second)
        scores = {
            "A": math.log(1 / (1 + math.exp(-difference))),
            "B": math.log(1 / (1 + math.exp(difference))),
        }
        top = [{"token": t, "logprob": p, "bytes": None} for t, p in scores.items()]
        token = max(scores, key=scores.get)
        content = [{"token": token, "logprob": scores[token], "bytes": None, "top_logprobs": top}]
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "length",
                    "message": {"role": "assistant", "content": f" {token}"},
                    "logprobs": {"content": content} if body.get("logprobs") and self.fake.logprobs else None,
                }
            ],
        }


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.stop()


@pytest.fixture
def label(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows = [{"prompt": f"p{n} ", "chosen": "a" * (n % 3 + 1), "rejected": "b" * 2} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*, temperature=1.0, url=server.url, model="judge-1", **endpoint):
        label_pairs(
            LabelSettings(
                sources=(SourceConfig(source=str(tmp_path / "pairs.jsonl")),),
                storage_path=str(tmp_path / "runs"),
                tracking_uri=None,
                output=tmp_path / "out.parquet",
                judges=parse_judges([], [], model),
                template=load_template("helpfulness"),
                temperature=temperature,
                endpoint=EndpointSettings(**({"url": url, "retries": 2, "concurrency": 3} | endpoint)),
            )
        )
        return pq.read_table(tmp_path / "out.parquet").to_pylist()

    return run


def test_labels_are_the_softmax_of_both_answers_after_retries(server, label, tmp_path, capsys):
    server.plan = [429, 200, 500, 429]
    rows = label(temperature=2.0)
    expected = [1 / (1 + math.exp(-(n % 3 - 1) / 2)) for n in range(12)]
    assert [row["soft_label"] for row in rows] == pytest.approx(expected)
    assert [row["judge_judge-1_first"] for row in rows] == pytest.approx(expected)
    assert len(server.requests) == 24 + 3
    assert all(body["max_tokens"] == 1 and body["top_logprobs"] == 20 for body in server.requests)
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert "0 answers from the store, 24 asked" in capsys.readouterr().out
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()


def test_a_server_that_dies_is_asked_no_question_twice(server, label, tmp_path, capsys):
    server.die_after = 10
    with pytest.raises(RunFailed, match=r"connection was lost .*the same command resumes"):
        label(retries=0)
    assert not (tmp_path / "out.parquet").exists()
    answered = len(next((tmp_path / "runs" / "answers").iterdir()).read_text().splitlines())
    assert answered == 10
    server.die_after = math.inf
    server.requests.clear()
    label()
    assert len(server.requests) == 24 - answered
    assert f"{answered} answers from the store, {24 - answered} asked" in capsys.readouterr().out
    label()
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "out.parquet").unlink()
    label(temperature=3.0)  # answers do not depend on it
    assert len(server.requests) == 24 - answered
    with pytest.raises(UsageError, match="made with different temperature;"):
        label()


def test_without_log_probs_votes_are_counted(server, label):
    server.logprobs = False
    with pytest.raises(UsageError, match="no log-probs for judge-1; give --votes 8"):
        label()
    server.requests.clear()
    rows = label(votes=3)
    # The server always says B of two that are equally long, in whichever order.
    assert [row["soft_label"] for row in rows[:3]] == [0, 0.5, 1]
    assert set(server.questions.values()) == {3}
    assert "logprobs" not in server.requests[0]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "set OPENAI_API_KEY"),
        (403, "may not use judge-1"),
        (404, "usually ends with /v1"),
        (400, "--votes 8"),
    ],
)
def test_what_asking_again_cannot_mend_is_refused_at_once(server, label, status, message):
    server.plan = [status] * 9
    with pytest.raises(UsageError, match=message) as caught:
        label()
    assert len(server.requests) == 1
    assert KEY not in str(caught.value)


def test_a_question_that_the_server_refuses_is_left_out(server, label, tmp_path, capsys):
    server.refused = "aaa"
    rows = label()
    assert [len(row["chosen"]) for row in rows] == [1, 2] * 4
    assert "4 pairs skipped (a judge gave neither answer)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["counts"]["no_answer"] == 4


def test_an_overloaded_server_ends_the_command_with_what_to_do(server, label):
    server.plan = [503] * 9
    with pytest.raises(RunFailed, match=r"status 503.*--rate-limit") as caught:
        label()
    assert KEY not in str(caught.value)


def test_an_address_where_nothing_answers_is_refused(label):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UsageError, match=r"nothing answers there .*correct the address"):
        label(url=f"http://127.0.0.1:{port}/v1")
