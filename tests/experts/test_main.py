"""`python -m experts` as a process: the ready line, signals, and what it says when it cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from experts.__main__ import main
from experts.v1 import experts_pb2, experts_pb2_grpc
from experts.wire import expert_ranges_from_proto

TIMEOUT_S = 60.0
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(fp8_folder: Path) -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "experts", "--checkpoint", str(fp8_folder), "--threads", "1", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=TIMEOUT_S)


def read_ready_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal_and_exits_with_0(start: Start, signal_number: signal.Signals) -> None:
    process = start("--experts", "2:5", "--layers", "1:3", "--group-name", "g1", "--replica-id", "g1-4")
    ready = read_ready_line(process)
    assert ready.keys() == {"endpoint", "replica_id", "group_name", "incarnation", "weight_digest", "pid"}
    assert (ready["group_name"], ready["replica_id"], ready["pid"]) == ("g1", "g1-4", process.pid)
    with grpc.insecure_channel(ready["endpoint"]) as channel:
        stub = experts_pb2_grpc.ExpertServiceStub(channel)
        described = stub.Describe(experts_pb2.DescribeRequest(), timeout=TIMEOUT_S)
    assert [str(block) for block in expert_ranges_from_proto(described.hosted)] == ["layers 1:3, experts 2:5"]
    assert (described.incarnation, described.weight_digest) == (ready["incarnation"], ready["weight_digest"])
    process.send_signal(signal_number)
    rest, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, rest) == (0, "")


def test_a_second_start_has_a_greater_incarnation_and_the_same_digest(start: Start) -> None:
    first, second = read_ready_line(start()), read_ready_line(start())
    assert second["incarnation"] > first["incarnation"]
    assert second["weight_digest"] == first["weight_digest"]


@pytest.mark.usefixtures("restore_signals")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--experts", "0:9"), "--experts 0:9: expected FROM:TO with 0 <= FROM < TO <= 8"),
        (("--experts", "3:3"), "--experts 3:3: expected"),
        (("--experts", "all"), "--experts all: expected"),
        (("--layers", "0:1"), "covers no layer with routed experts"),
        (("--layers", "0:5"), "--layers 0:5: expected FROM:TO with 0 <= FROM < TO <= 4"),
    ],
)
def test_a_range_that_the_model_does_not_have_is_one_line(
    fp8_folder: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["--checkpoint", str(fp8_folder), *arguments]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_folder_that_is_not_there_is_one_line_before_torch_is_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "experts", "--checkpoint", str(tmp_path / "nowhere")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 1 and result.stdout == ""
    assert lines == [f"error: {tmp_path}/nowhere: no such folder (give the folder of a Hugging Face checkpoint)"]
    assert " torch\n" not in result.stderr


def test_a_taken_port_is_one_line(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("--port", str(port), "--log-level", "error")
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1 and output == ""
    assert f"error: cannot listen on 127.0.0.1:{port}" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_a_kill_ends_it_at_once(start: Start) -> None:
    process = start()
    ready = read_ready_line(process)
    os.kill(ready["pid"], signal.SIGKILL)
    assert process.wait(TIMEOUT_S) == -signal.SIGKILL
