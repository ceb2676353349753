"""A cluster over two Ray nodes: replicas of a group on both, and one node lost whole under load."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray.ray_nodes import WORKER_HOST, RayNodes
from tests.ray.serve_process import ServeProcess, stream_chat, wait_for
from tests.scenarios.stream_load import StreamLoad
from tests.scenarios.test_scaling import list_replicas

pytestmark = pytest.mark.timeout(300)
MAX_TOKENS = 24


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayNodes]:
    # Without it, a token would have to be made and shared first.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    nodes = RayNodes(tmp_path)
    try:
        yield nodes
    finally:
        nodes.close()


def test_losing_a_node_fails_no_request_and_its_replicas_come_back_elsewhere(nodes: RayNodes, tmp_path: Path):
    wait_for(lambda: nodes.is_up("head"), 60)
    nodes.add_worker()
    wait_for(lambda: nodes.is_up("worker"), 60)
    arguments = ("--address", nodes.address, "--groups", "1", "--replicas", "2", "--insecure-cluster-network")
    serve = ServeProcess(tmp_path, *arguments, "--expert-threads", "1", "--deterministic")
    try:
        serve.wait_ready()
        replicas = list_replicas(serve.fetch_status())
        hosts = {replica["endpoint"].split(":")[0] for replica in replicas}
        assert len(hosts) == 2 and WORKER_HOST in hosts
        assert {replica["node"] for replica in replicas} == hosts
        undisturbed = "".join(stream_chat(serve.url, MAX_TOKENS))
        lost = next(replica for replica in replicas if replica["node"] == WORKER_HOST)
        with StreamLoad(serve.url, 2, MAX_TOKENS) as load:
            nodes.kill_worker()
            wait_for(lambda: _get_state(serve, lost["id"]) != "ready", 30)
            wait_for(lambda: _get_state(serve, lost["id"]) == "ready", 90)
        assert load.failures == []
        assert set(load.texts) == {undisturbed}
        moved = next(replica for replica in list_replicas(serve.fetch_status()) if replica["id"] == lost["id"])
        assert {moved["node"]} == hosts - {WORKER_HOST}
    finally:
        serve.close()


def _get_state(serve: ServeProcess, replica_id: str) -> str:
    return next(item["state"] for item in list_replicas(serve.fetch_status()) if item["id"] == replica_id)
