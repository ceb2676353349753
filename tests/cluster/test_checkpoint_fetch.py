"""Fetching a checkpoint: whole or not at all, continued, and never something that is not sound."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from cluster.checkpoint_fetch import COMPLETE_FILE, fetch, is_complete, parse_digests, wait_complete
from cluster.cli import main
from cluster.errors import FetchFailed

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "checkpoint"
SHARD = "model-00002-of-00003.safetensors"


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
