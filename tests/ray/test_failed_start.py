"""A start that cannot succeed ends by itself, says why, and leaves nothing behind."""

import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.random_checkpoint import write_random_checkpoint
from tests.ray.serve_process import ServeProcess, get_replica, wait_for

pytestmark = pytest.mark.timeout(180)


def test_an_actor_that_dies_again_and_again_ends_the_start(tmp_path: Path):
    checkpoint = tmp_path / "tiny"
    write_random_checkpoint(checkpoint)
    serve = ServeProcess(tmp_path, str(checkpoint), "--groups", "1")
    killed: set[int] = set()

    def kill_until_it_gives_up() -> bool:
        if serve.process.poll() is not None:
            return True
        serve.remember_processes()
        try:
            pid = get_replica(serve.fetch_status(), "g0")["pid"]
        except httpx.HTTPError:
            return False
        if pid is not None and pid not in killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        return False

    try:
        wait_for(kill_until_it_gives_up, 90)
        assert serve.process.wait(30) == 1
        assert "error: expert group replica g0-0 failed to start 3 times" in serve.stderr
        assert serve.stdout == ""
        assert serve.list_left_behind() == []
    finally:
        serve.close()


def test_sigterm_during_the_start_stops_it(tmp_path: Path):
    checkpoint = tmp_path / "tiny"
    write_random_checkpoint(checkpoint)
    serve = ServeProcess(tmp_path, str(checkpoint), "--groups", "1")

    def has_ray() -> bool:
        serve.remember_processes()
        return any("raylet" in line for line in serve.list_left_behind())

    try:
        wait_for(has_ray, 60)
        serve.process.send_signal(signal.SIGTERM)
        assert serve.process.wait(60) == 0
        assert serve.list_left_behind() == []
    finally:
        serve.close()
