import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from cluster.leave_command import list_actors, wait_until_gone
from tests.ray.serve_process import wait_for

TITLE = "ray::ExpertReplica.of_this_test"


@pytest.fixture
def actor() -> Iterator[subprocess.Popen[bytes]]:
    """A process with the title of an actor; it ends when its stdin does."""
    command = [TITLE, "-c", "import sys; sys.stdin.read()"]
    process = subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def list_own() -> list[str]:
    """Other tests of this machine may run actors too; in a pod there are no others."""
    return [title for title in list_actors() if title == TITLE]


def test_it_waits_until_the_actor_has_ended(actor: subprocess.Popen[bytes]):
    wait_for(lambda: list_own() == [TITLE], 10)
    left: list[list[str]] = []
    waiting = threading.Thread(target=lambda: left.append(wait_until_gone(list_own, 60.0)))
    waiting.start()
    waiting.join(1.0)
    assert waiting.is_alive()
    actor.kill()
    actor.wait(10)
    waiting.join(20)
    assert left == [[]]


def test_what_is_still_there_when_time_is_up_is_named(actor: subprocess.Popen[bytes]):
    wait_for(lambda: list_own() == [TITLE], 10)
    assert wait_until_gone(list_own, 0.0) == [TITLE]
