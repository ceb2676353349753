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


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    process = start("--checkpoint", str(tmp_path), "--router", "127.0.0.1:1")
    _, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert stderr.startswith("error: config.json: missing") and stderr.count("\n") == 1


def test_it_imports_neither_torch_nor_ray() -> None:
    code = "import sys, router.api.app, router.api.__main__; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    assert output.stdout.strip() == "[]"
