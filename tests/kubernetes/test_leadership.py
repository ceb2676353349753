"""Two real processes want to lead: one does, and another takes over when it is killed, stopped or leaves in order."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cluster.errors import ApiConflict, ApiUnavailable
from cluster.leader_lease import LeaderLease
from tests.cluster.fakes import FakeClock
from tests.kubernetes.conftest import Place
from tests.kubernetes.ray_cluster import NAME
from tests.ray.serve_process import wait_for

LEASE = f"{NAME}-controller"


@contextmanager
def candidate(place: Place, folder: Path, identity: str, num_pods: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"KUBECONFIG": str(place.server.write_kubeconfig(place.token, folder / "kubeconfig"))}
    command = [sys.executable, "-m", "tests.kubernetes.candidate", place.namespace, identity, str(num_pods)]
    with (folder / f"{identity}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def leads(folder: Path, identity: str) -> Callable[[], bool]:
    return lambda: f"leading {identity}" in (folder / f"{identity}.log").read_text()


def has_replicas(place: Place, count: int) -> Callable[[], bool]:
    return lambda: place.cluster.read_groups()["g0"]["replicas"] == count


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_leadership_moves_when_the_leader_is(number: signal.Signals, place: Place, tmp_path: Path):
    with ExitStack() as stack:
        first = stack.enter_context(candidate(place, tmp_path, "first", 2))
        wait_for(leads(tmp_path, "first"), 30)
        wait_for(has_replicas(place, 2), 20)
        stack.enter_context(candidate(place, tmp_path, "second", 4))
        os.kill(first.pid, number)
        wait_for(leads(tmp_path, "second"), 40)
        wait_for(has_replicas(place, 4), 20)
        if number is signal.SIGSTOP:
            # What it still wanted to write is not written: it finds that it leads no more, and ends.
            place.cluster.set_replicas("g0", 1)
            os.kill(first.pid, signal.SIGCONT)
            assert first.wait(20) == 1
        wait_for(has_replicas(place, 4), 20)


class Candidates:
    """Two in this process, on one clock that the test moves; each looks at the Lease when told to."""

    def __init__(self, place: Place) -> None:
        self.clock = FakeClock()
        self.first, self.second = (LeaderLease(place.api, LEASE, name, self.clock) for name in ("first", "second"))


def test_a_lease_that_is_renewed_is_not_taken_and_one_that_ran_out_is(place: Place):
    candidates = Candidates(place)
    assert candidates.first.try_once()
    assert not candidates.second.try_once()
    for _ in range(4):
        candidates.clock.now_s += 8
        assert candidates.first.try_once()
        assert not candidates.second.try_once()
    candidates.clock.now_s += 14.9
    assert not candidates.first.is_held()
    assert not candidates.second.try_once()
    candidates.clock.now_s += 0.2
    assert candidates.second.try_once()
    assert not candidates.first.try_once()
    assert candidates.first.lost.is_set()
    spec = place.api.fetch_lease(LEASE)["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("second", 1)


def test_a_leader_that_leaves_in_order_hands_over_at_once(place: Place):
    candidates = Candidates(place)
    candidates.first.start()
    assert candidates.first.acquired.wait(20)
    assert not candidates.second.try_once()
    candidates.first.release()
    assert not candidates.first.is_held()
    assert candidates.second.try_once()


def test_an_outage_of_the_api_server_lets_nobody_take_what_could_not_be_renewed(place: Place):
    candidates = Candidates(place)
    assert candidates.first.try_once()
    assert not candidates.second.try_once()
    place.server.kill()
    try:
        candidates.clock.now_s += 20
        for each in (candidates.first, candidates.second):
            with pytest.raises(ApiUnavailable):
                each.try_once()
        assert not candidates.first.is_held()
    finally:
        place.server.restart()
    assert not candidates.second.try_once()
    assert candidates.first.try_once()
    assert candidates.first.is_held()


def test_of_two_that_take_a_free_lease_at_once_one_gets_it(place: Place):
    lease = place.api.create_lease(LEASE, {"holderIdentity": "", "leaseDurationSeconds": 1})
    place.api.replace_lease({**lease, "spec": {"holderIdentity": "first", "leaseDurationSeconds": 15}})
    with pytest.raises(ApiConflict):
        place.api.replace_lease({**lease, "spec": {"holderIdentity": "second", "leaseDurationSeconds": 15}})
    with pytest.raises(ApiConflict):
        place.api.create_lease(LEASE, {"holderIdentity": "third", "leaseDurationSeconds": 15})
