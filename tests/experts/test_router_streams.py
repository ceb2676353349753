"""What becomes of an expert process whose thread of the routers' streams fails."""

import subprocess
import sys

TIMEOUT_S = 60.0
PROGRAM = """
import socket, threading
from experts.http2_stream import MessageStream, make_client_opening
from experts.router_streams import RouterStreams

def fail(received):
    raise ValueError("a bug")

streams = RouterStreams(fail, lambda: None, lambda: None)
streams.start()
ours, theirs = socket.socketpair()
ours.setblocking(False)
theirs.setblocking(False)
streams.adopt(theirs)
router = MessageStream(ours, b"", 1000)
router.send(1, [b"frame"], 5)
router.flush()
threading.Event().wait(30)
"""


def test_a_process_that_can_answer_no_router_any_more_ends_to_be_restarted() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ended.returncode == 1
    assert "ValueError: a bug" in ended.stderr
