import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from cluster.leave_command import find_actors, list_actors, wait_until_gone
from tests.ray.serve_process import wait_for

# Both are titles that Ray 2.60 gives: an actor at rest, and one in a method.
TITLES = ("ray::ExpertReplica", "ray::g1-0:ExpertReplica.drain", "ray::Router", "ray::r0:Router.__init__")


@pytest.fixture
def actor(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the title of an actor; it ends when its stdin does."""
    command = [getattr(request, "param", TITLES[0]), "-c", "import sys; sys.stdin.read()"]
    process = subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def list_own(actor: subprocess.Popen[bytes]) -> list[str]:
    """Other tests of this machine may run actors too; in a pod there are no others."""
    return find_actors([psutil.Process(actor.pid)]) if actor.poll() is None else []


@pytest.mark.parametrize("actor", TITLES, indirect=True)
def test_an_actor_is_found_by_its_title_at_rest_and_at_work(actor: subprocess.Popen[bytes]):
    wait_for(lambda: bool(list_own(actor)), 10)
    assert list_own(actor)[0] in list_actors()


def test_other_processes_do_not_hold_a_pod():
    assert find_actors([psutil.Process()]) == []


def test_it_waits_until_the_actor_has_ended(actor: subprocess.Popen[bytes]):
    wait_for(lambda: bool(list_own(actor)), 10)
    left: list[list[str]] = []
    waiting = threading.Thread(target=lambda: left.append(wait_until_gone(lambda: list_own(actor), 60.0)))
    waiting.start()
    waiting.join(1.0)
    assert waiting.is_alive()
    actor.kill()
    actor.wait(10)
    waiting.join(20)
    assert left == [[]]


def test_what_is_still_there_when_time_is_up_is_named(actor: subprocess.Popen[bytes]):
    wait_for(lambda: bool(list_own(actor)), 10)
    assert wait_until_gone(lambda: list_own(actor), 0.0) == [TITLES[0]]
