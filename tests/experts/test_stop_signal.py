"""Signals that arrive at any moment, many at once, as a supervisor and a terminal together send them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from experts.stop_signal import StopSignal

TIMEOUT_S = 30.0

# Setting and waiting all the time, so that most signals arrive in the middle of it.
_PROGRAM = """
import os
from experts.stop_signal import StopSignal
stop = StopSignal()
stop.install()
print("ready", flush=True)
stop.wait()
for _ in range(20_000):
    stop.set()
    assert stop.wait()
print("done", flush=True)
os._exit(0)  # the interpreter takes the handlers away before it is gone
"""


def test_signals_during_signals_and_waits_stop_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                process.send_signal(number)
        rest, _ = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, rest) == (0, "done\n")
    finally:
        process.kill()


def test_a_wait_ends_at_its_timeout_and_at_once_when_set() -> None:
    stop = StopSignal()
    assert not stop.wait(0.01) and not stop.is_set()
    stop.set()
    assert stop.wait() and stop.wait(0.0) and stop.is_set()
