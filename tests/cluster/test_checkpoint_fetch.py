"""Fetching a checkpoint: whole or not at all, continued, and never something that is not sound."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cluster.checkpoint_fetch import COMPLETE_FILE, fetch, is_complete, parse_digests, wait_complete
from cluster.cli import main
from cluster.errors import FetchFailed

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "checkpoint"
SHARD = "model-00002-of-00003.safetensors"


class Bucket(http.server.ThreadingHTTPServer):
    """What S3's API says of a folder, under /bucket/model/. asked: object and range of each GET."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _BucketHandler)
        self.folder = folder
        self.asked: list[tuple[str, str | None]] = []


class _BucketHandler(http.server.BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = self.server.folder / url.path.removeprefix("/bucket/model/")
        if "Credential=reader/" not in self.headers.get("Authorization", ""):
            self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif "list-type" in urllib.parse.parse_qs(url.query):
            self._answer(200, self._list().encode())
        elif path.is_file():
            self._send_file(path)
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _list(self) -> str:
        objects = "".join(
            f"<Contents><Key>model/{path.name}</Key><Size>{path.stat().st_size}</Size><ETag>1</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for path in sorted(self.server.folder.iterdir())
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>"

    def _send_file(self, path: Path) -> None:
        data, wanted = path.read_bytes(), self.headers.get("Range")
        if self.command == "GET":
            self.server.asked.append((path.name, wanted))
        if wanted is None:
            self._answer(200, data)
            return
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        span = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
        self._answer(206, data[first : last + 1], {"Content-Range": span})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        fields = {"Content-Length": str(len(body)), "ETag": "1", "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        for name, value in (fields | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with Bucket(DEMO) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret", "NO_PROXY": "127.0.0.1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        yield server
        server.shutdown()
        thread.join(20.0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(DEMO, folder)
    (folder / "modeling.py").write_text("raise SystemExit('never')")
    return folder


def write_digests(folder: Path, **wrong: str) -> None:
    lines = [
        f"{wrong.get(path.stem.replace('-', '_'), hashlib.sha256(path.read_bytes()).hexdigest())}  ./{path.name}"
        for path in sorted(folder.iterdir())
    ]
    (folder / "SHA256SUMS").write_text("\n".join(lines))


def test_everything_that_is_served_is_fetched_and_nothing_else(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    fetch(source.as_uri(), target, verify_digests=False)
    assert is_complete(target)
    fetched = {path.name for path in target.iterdir() if not path.name.startswith(".")}
    assert fetched == {path.name for path in DEMO.iterdir()}
    assert (target / SHARD).read_bytes() == (DEMO / SHARD).read_bytes()


def test_any_file_system_of_fsspec_will_do(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in DEMO.iterdir():
        memory.pipe_file(f"/bucket/model/{path.name}", path.read_bytes())
    try:
        fetch("memory://bucket/model", tmp_path, verify_digests=True)
    finally:
        memory.rm("/bucket", recursive=True)
    assert is_complete(tmp_path)


def test_a_bucket_is_read_and_an_interrupted_file_of_it_continued(bucket: Bucket, tmp_path: Path) -> None:
    data = (DEMO / SHARD).read_bytes()
    (tmp_path / f".{SHARD}.part").write_bytes(data[:1000])
    fetch("s3://bucket/model", tmp_path, verify_digests=True)
    assert is_complete(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {path.name for path in DEMO.iterdir()}
    assert (tmp_path / SHARD).read_bytes() == data
    ranges = [wanted for name, wanted in bucket.asked if name == SHARD]
    assert ranges and all(wanted is not None and int(wanted[6:].split("-")[0]) >= 1000 for wanted in ranges)


def test_a_bucket_that_lets_nobody_in_is_one_line(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    with pytest.raises(FetchFailed, match=r"cannot list s3://bucket/model: .*403 Forbidden") as caught:
        fetch("s3://bucket/model", tmp_path, verify_digests=True)
    assert "\n" not in str(caught.value)


def test_an_interrupted_file_is_continued(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    data = (source / SHARD).read_bytes()
    half = len(data) // 2
    # Other bytes than the source's show that they were not fetched again.
    (target / f".{SHARD}.part").write_bytes(b"\0" * half)
    with pytest.raises(FetchFailed, match=r"no (sound )?checkpoint"):
        fetch(source.as_uri(), target, verify_digests=False)
    assert (target / SHARD).read_bytes() == b"\0" * half + data[half:]
    assert not is_complete(target)


def test_a_digest_that_does_not_fit_is_no_complete_checkpoint(source: Path, tmp_path: Path) -> None:
    write_digests(source, model_00002_of_00003="0" * 64)
    target = tmp_path / "target"
    with pytest.raises(FetchFailed, match=f"{SHARD}: SHA-256 is .*the source is damaged"):
        fetch(source.as_uri(), target, verify_digests=False)
    assert not is_complete(target)
    assert not (target / SHARD).exists()


@pytest.mark.parametrize("verify", [True, False])
def test_kept_files_are_read_again_if_asked(source: Path, tmp_path: Path, verify: bool) -> None:
    write_digests(source)
    target = tmp_path / "target"
    fetch(source.as_uri(), target, verify_digests=False)
    damaged = target / "model-00001-of-00003.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    (target / COMPLETE_FILE).unlink()
    fetch(source.as_uri(), target, verify_digests=verify)
    assert (damaged.read_bytes() == (source / damaged.name).read_bytes()) is verify


def test_a_folder_whose_files_shrank_is_not_complete(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    fetch(source.as_uri(), target, verify_digests=False)
    with (target / SHARD).open("r+b") as file:
        file.truncate(100)
    assert not is_complete(target)
    fetch(source.as_uri(), target, verify_digests=False)
    assert is_complete(target)


def test_what_is_no_checkpoint_is_refused(source: Path, tmp_path: Path) -> None:
    (source / SHARD).unlink()
    with pytest.raises(FetchFailed, match="what was fetched is no"):
        fetch(source.as_uri(), tmp_path / "target", verify_digests=False)
    (source / "config.json").unlink()
    with pytest.raises(FetchFailed, match=r"holds no config\.json"):
        fetch(source.as_uri(), tmp_path / "target", verify_digests=False)


def test_unknown_places_are_one_line(tmp_path: Path) -> None:
    for url in ((tmp_path / "nowhere").as_uri(), "nosuch://bucket/model"):
        with pytest.raises(FetchFailed, match="cannot list"):
            fetch(url, tmp_path / "target", verify_digests=False)


def test_digests_are_read_as_sha256sum_writes_them() -> None:
    digest = "ab" * 32
    text = f"{digest}  a.json\n{digest.upper()} *b.json\n{digest}  ./c.json\nnot a line\n{'g' * 64}  d\n"
    assert parse_digests(text) == {"a.json": digest, "b.json": digest, "c.json": digest}


def test_a_pod_waits_for_the_job(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(FetchFailed, match="not complete after"):
        wait_complete(target, timeout_s=0.05, poll_s=0.01)
    waiting = threading.Thread(target=wait_complete, args=(target, 60.0, 0.01))
    waiting.start()
    fetch(source.as_uri(), target, verify_digests=False)
    waiting.join(60.0)
    assert not waiting.is_alive()


def test_two_processes_of_one_node_fetch_once(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    command = [sys.executable, "-m", "cluster.cli", "fetch", source.as_uri(), str(target)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60.0)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("file 1 of" in output for output in outputs) == 1
    assert is_complete(target)


def test_wrong_usage_names_the_right_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["fetch"], ["fetch", "/data", str(tmp_path)], ["fetch", "s3://a", "--wait", str(tmp_path)]):
        assert main(arguments) == 2
        assert "error: " in capsys.readouterr().err
