import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil

from cluster.process_reaper import SESSION_VARIABLE, Session, list_processes, reap

# The parent ends at once and leaves a child that ignores SIGTERM.
ORPHAN_SCRIPT = """
import os, signal, sys, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


def start(session: Session, script: str) -> "subprocess.Popen[str]":
    environment = os.environ | {SESSION_VARIABLE: session.mark}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)


def test_an_orphan_that_ignores_sigterm_is_ended_and_others_are_left_alone():
    session, other = Session(uuid.uuid4().hex, None), Session(uuid.uuid4().hex, None)
    parent = start(session, ORPHAN_SCRIPT)
    bystander = start(other, "import time; print(1, flush=True); time.sleep(600)")
    try:
        assert parent.stdout is not None and bystander.stdout is not None
        orphan = int(parent.stdout.readline())
        parent.wait(30)
        bystander.stdout.readline()
        assert [process.pid for process in list_processes(session)] == [orphan]

        assert reap(session, wait_s=0.0, term_s=0.1) == [orphan]

        assert list_processes(session) == set()
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait(30)
        for process in list_processes(session):
            process.kill()


def test_processes_that_end_by_themselves_are_not_forced():
    session = Session(uuid.uuid4().hex, None)
    process = start(session, "import sys; print(1, flush=True); sys.stdin.read()")
    assert process.stdout is not None
    process.stdout.readline()
    seen = [psutil.Process(process.pid)]
    process.terminate()
    process.wait(30)
    assert reap(session, wait_s=5.0, known=seen) == []


def test_a_process_is_known_by_a_file_of_the_ray_session_that_it_has_open(tmp_path: Path):
    session = Session(uuid.uuid4().hex, str(tmp_path / "session"))
    log = tmp_path / "session" / "logs" / "agent.log"
    log.parent.mkdir(parents=True)
    # As Ray's agents do: another environment than the one that was inherited.
    script = f"log = open({str(log)!r}, 'w'); print(1, flush=True); import time; time.sleep(600)"
    process = start(Session("another", None), script)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert [found.pid for found in list_processes(session)] == [process.pid]
        assert list_processes(Session(session.mark, str(tmp_path / "sess"))) == set()
        assert reap(session, wait_s=0.0) == [process.pid]
    finally:
        process.kill()
        process.wait(30)
