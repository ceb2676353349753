"""python -m router.api as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.router_api.conftest import MODEL
from tests.router_api.scripted_router import ScriptedRouter

REPOSITORY = Path(__file__).parents[2]
WAIT_S = 30.0


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "router.api", *arguments],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
    )  # fmt: skip


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_it_announces_itself_serves_and_stops(
    checkpoint: Path, router: ScriptedRouter, stop_signal: signal.Signals
) -> None:
    process = start("--checkpoint", str(checkpoint), "--router", router.endpoint)
    watchdog = threading.Timer(WAIT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        assert line["pid"] == process.pid
        body = {"model": MODEL, "prompt": "x"}
        assert httpx.post(f"{line['url']}/v1/completions", json=body, timeout=WAIT_S).status_code == 200
        process.send_signal(stop_signal)
        assert process.wait(WAIT_S) == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


@pytest.mark.parametrize("arguments", [["--router-wait-s", "0.2"], ["--router-dead-s", "1"]])
def test_its_waits_are_set_by_the_command_line(checkpoint: Path, arguments: list[str]) -> None:
    """The router that is named does not exist; with the default wait, a request is still held when it is asked."""
    process = start("--checkpoint", str(checkpoint), "--router", "127.0.0.1:1", *arguments)
    watchdog = threading.Timer(WAIT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        body = {"model": MODEL, "prompt": "x"}
        if "--router-wait-s" in arguments:
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_S).status_code == 503
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=body, timeout=1.0)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    process = start("--checkpoint", str(tmp_path), "--router", "127.0.0.1:1")
    _, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert stderr.startswith("error: config.json: missing") and stderr.count("\n") == 1


def test_without_keys_it_does_not_listen_to_the_network(checkpoint: Path) -> None:
    process = start("--checkpoint", str(checkpoint), "--router", "127.0.0.1:1", "--host", "0.0.0.0")
    _, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "there are no API keys" in stderr and stderr.count("\n") == 1


def test_it_imports_neither_torch_nor_ray() -> None:
    code = "import sys, router.api.app, router.api.__main__; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    assert output.stdout.strip() == "[]"
