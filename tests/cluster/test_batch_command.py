"""`shoal batch` against a server that refuses, dies and comes back; and its files, cut off anywhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.batch_file import AnswerFile
from cluster.cli import main
from cluster.errors import RequestFailed

Answer = tuple[int, dict[str, str], Any]


class Server:
    """Answers as `play` says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.play: Callable[[dict[str, Any]], Answer] = lambda body: (200, {}, {"echo": body["n"]})
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.asked.append((self.path, body, {name.lower(): text for name, text in self.headers.items()}))
                status, headers, answered = server.play(body)
                content = json.dumps(answered).encode()
                self.send_response(status)
                for name, text in {**headers, "Content-Length": str(len(content)), "X-Request-Id": "r1"}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def write_input(folder: Path, count: int) -> Path:
    path = folder / "in.jsonl"
    lines = [
        {"custom_id": f"q{n}", "method": "POST", "url": "/v1/chat/completions", "body": {"n": n, "stream": True}}
        for n in range(count)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def run(server: Server, folder: Path, *more: str) -> int:
    return main(["batch", str(folder / "in.jsonl"), str(folder / "out.jsonl"), "--url", server.url, *more])


def read_answers(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def test_every_request_has_its_answer_and_the_lowest_priority(server: Server, tmp_path: Path) -> None:
    write_input(tmp_path, 30)
    assert run(server, tmp_path, "--api-key", "k") == 0
    answers = read_answers(tmp_path)
    assert {name: line["response"]["body"] for name, line in answers.items()} == {
        f"q{n}": {"echo": n} for n in range(30)
    }
    assert answers["q0"]["response"]["request_id"] == "r1" and answers["q0"]["error"] is None
    path, body, headers = server.asked[0]
    assert (path, body["stream"]) == ("/v1/chat/completions", False)
    assert (headers["x-shoal-priority"], headers["authorization"]) == ("batch", "Bearer k")


def test_what_was_answered_before_the_end_is_not_asked_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_input(tmp_path, 10)
    assert run(server, tmp_path) == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    cut = whole[: len(whole) * 6 // 10]
    num_left = cut.count(b"\n")
    (tmp_path / "out.jsonl").write_bytes(cut)
    server.asked.clear()
    capsys.readouterr()
    assert run(server, tmp_path, "--json") == 0
    assert len(server.asked) == 10 - num_left
    assert len(read_answers(tmp_path)) == 10
    assert json.loads(capsys.readouterr().out) == {"skipped": num_left, "done": 10 - num_left, "failed": 0}


def test_a_server_that_turns_away_is_asked_again(server: Server, tmp_path: Path) -> None:
    write_input(tmp_path, 4)
    refusals = [(429, {"Retry-After": "0"}, {}), (503, {}, {})]
    server.play = lambda body: refusals.pop() if refusals else (200, {}, {"echo": body["n"]})
    assert run(server, tmp_path) == 0
    assert len(server.asked) == 6


def test_a_request_that_can_never_succeed_is_recorded(server: Server, tmp_path: Path) -> None:
    write_input(tmp_path, 3)
    server.play = lambda body: (400, {}, {"error": {"message": "no"}}) if body["n"] == 1 else (200, {}, {})
    assert run(server, tmp_path) == 1
    answers = read_answers(tmp_path)
    assert answers["q1"]["error"] == {"message": "no"} and answers["q1"]["response"]["status_code"] == 400
    assert run(server, tmp_path) == 0
    assert len(server.asked) == 3


def test_a_wrong_key_ends_the_batch_and_is_no_request_s_answer(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_input(tmp_path, 3)
    server.play = lambda body: (401, {}, {"error": {"message": "no"}})
    assert run(server, tmp_path, "--api-key", "wrong") == 1
    assert "--api-key" in capsys.readouterr().err
    assert read_answers(tmp_path) == {}
    server.play = lambda body: (200, {}, {})
    assert run(server, tmp_path, "--api-key", "right") == 0
    assert len(read_answers(tmp_path)) == 3


def test_a_server_that_stays_away_ends_the_batch(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_input(tmp_path, 3)
    server.play = lambda body: (503, {}, {})
    assert run(server, tmp_path, "--give-up-after", "0.2") == 1
    assert "run the same command to go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"url": "/v1/completions", "body": {}}', '{"custom_id": "a", "url": "/x", "body": {}}',
     '{"custom_id": "a", "url": "/v1/completions", "body": 1}',
     '{"custom_id": "q0", "url": "/v1/completions", "body": {"n": 1}}'],
)  # fmt: skip
def test_a_line_that_is_no_request_is_named(
    server: Server, tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_input(tmp_path, 1)
    path.write_text(path.read_text() + "\n" + line)
    assert run(server, tmp_path) == 1
    assert "in.jsonl, line 2" in capsys.readouterr().err


def test_two_batches_never_write_one_file(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "out.jsonl"):
        with pytest.raises(RequestFailed, match="another batch"):
            AnswerFile(tmp_path / "out.jsonl")


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("# notes\n")
    with pytest.raises(RequestFailed, match="something else"):
        AnswerFile(path)
    assert path.read_text() == "# notes\n"
