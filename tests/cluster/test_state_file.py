import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import NotRunning
from cluster.state_file import ClusterState, find_state, get_state_dir, read_stale, remove_state, write_state

STATE = ClusterState("http://127.0.0.1:8000", "http://127.0.0.1:8001", "secret", os.getpid(), "abc", "/tmp/session")


def test_file_is_for_its_user_only(tmp_path: Path):
    path = write_state(tmp_path / "new" / "shoal", STATE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["8000.json"]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "http://localhost:8000/", "127.0.0.1:8001", "http://[::1]:8001"]
)
def test_cluster_is_found_by_either_url(url: str, tmp_path: Path):
    write_state(tmp_path, replace(STATE, url="http://127.0.0.1:9000", admin_url="http://127.0.0.1:9001"))
    write_state(tmp_path, STATE)
    assert find_state(tmp_path, url) == STATE


def test_unknown_url_and_dead_process_are_not_running(tmp_path: Path):
    write_state(tmp_path, STATE)
    for url in ("http://127.0.0.1:8002", "http://elsewhere:8000"):
        with pytest.raises(NotRunning):
            find_state(tmp_path, url)
    dead = replace(STATE, pid=_get_dead_pid())
    write_state(tmp_path, dead)
    with pytest.raises(NotRunning):
        find_state(tmp_path, STATE.url)
    assert read_stale(tmp_path, STATE.url) == dead


def test_only_the_own_file_is_removed(tmp_path: Path):
    path = write_state(tmp_path, STATE)
    remove_state(tmp_path, replace(STATE, session_mark="other"))
    assert path.exists()
    remove_state(tmp_path, STATE)
    assert not path.exists()
    remove_state(tmp_path, STATE)


def test_damaged_files_are_passed_over(tmp_path: Path):
    (tmp_path / "1.json").write_text("{")
    (tmp_path / "2.json").write_text('{"url": 1}')
    write_state(tmp_path, STATE)
    assert find_state(tmp_path, STATE.url) == STATE


def test_folder_follows_the_environment():
    assert get_state_dir({"SHOAL_STATE_DIR": "/a", "XDG_STATE_HOME": "/b"}) == Path("/a")
    assert get_state_dir({"XDG_STATE_HOME": "/b"}) == Path("/b/shoal")


def _get_dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    return process.pid
