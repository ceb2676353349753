"""Expert groups that grow, shrink and are replaced under load: no request fails and no token changes."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.ray.serve_process import ServeProcess, stream_chat, wait_for
from tests.scenarios.stream_load import StreamLoad

pytestmark = pytest.mark.timeout(240)
MAX_TOKENS = 24
NUM_STREAMS = 2


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    arguments = ("--groups", "2", "--replicas", "1", "--deterministic", "--expert-threads", "1")
    process = ServeProcess(tmp_path_factory.mktemp("scaling"), *arguments)
    try:
        process.wait_ready()
        yield process
    finally:
        process.close()


@pytest.fixture(scope="module")
def undisturbed(serve: ServeProcess) -> str:
    return "".join(stream_chat(serve.url, MAX_TOKENS))


def test_scaling_up_and_down_fails_no_request(serve: ServeProcess, undisturbed: str):
    with StreamLoad(serve.url, NUM_STREAMS, MAX_TOKENS) as load:
        status = run_json(serve, "scale", "g0=2", "--wait")
        assert list_ids(status) == ["g0-0", "g0-1", "g1-0"]
        status = run_json(serve, "scale", "g0=1", "--wait")
        assert list_ids(status) == ["g0-0", "g1-0"]
    check(load, undisturbed)


def test_a_drained_replica_is_replaced_before_it_leaves(serve: ServeProcess, undisturbed: str):
    with StreamLoad(serve.url, NUM_STREAMS, MAX_TOKENS) as load:
        status = run_json(serve, "drain", "g0-0", "--timeout", "60")
    assert list_ids(status) == ["g0-1", "g1-0"]
    check(load, undisturbed)
    events = run_json(serve, "events")["events"]
    actions = [(event["object"], event["action"]) for event in events]
    ready = max(index for index, action in enumerate(actions) if action == ("replica g0-1", "ready"))
    assert ready < actions.index(("replica g0-0", "drain")) < actions.index(("replica g0-0", "remove"))
    assert serve.run_command("drain", "g0-0", "--url", serve.url).returncode == 1


def test_every_replica_is_replaced_while_the_controller_is_killed(serve: ServeProcess, undisturbed: str):
    pids = {replica["pid"] for replica in list_replicas(serve.fetch_status())}
    with StreamLoad(serve.url, NUM_STREAMS, MAX_TOKENS) as load:
        version = run_json(serve, "restart")["desired_version"]
        wait_for(lambda: any(replica["state"] == "draining" for replica in list_replicas(serve.fetch_status())), 30)
        find_controller(serve).kill()
        wait_for(lambda: is_settled(serve, version), 90)
    check(load, undisturbed)
    replicas = list_replicas(serve.fetch_status())
    assert len(replicas) == 2
    assert not pids & {replica["pid"] for replica in replicas}
    assert run_json(serve, "plan")["steps"] == []


def test_the_load_of_each_group_and_the_gain_of_rebalancing_can_be_read(serve: ServeProcess, undisturbed: str):
    assert "".join(stream_chat(serve.url, MAX_TOKENS)) == undisturbed
    wait_for(
        lambda: all((item["load"] or {}).get("pairs_per_busy_s") for item in list_replicas(serve.fetch_status())), 20
    )
    view = run_json(serve, "rebalance", "--dry-run")
    assert view["num_pairs"] > 0
    assert 1 <= view["after"]["imbalance"] <= view["before"]["imbalance"]


def test_zero_replicas_and_unknown_groups_are_refused(serve: ServeProcess):
    for counts, message in (("g0=0", "--force"), ("g7=1", "no expert group 'g7'")):
        result = serve.run_command("scale", counts, "--url", serve.url)
        assert result.returncode == 1
        assert message in result.stderr


def run_json(serve: ServeProcess, *arguments: str) -> dict[str, Any]:
    result = serve.run_command(*arguments, "--url", serve.url, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def list_replicas(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [replica for group in status["groups"] for replica in group["replicas"]]


def list_ids(status: dict[str, Any]) -> list[str]:
    return [replica["id"] for replica in list_replicas(status)]


def is_settled(serve: ServeProcess, version: int) -> bool:
    try:
        status = serve.fetch_status()
    except httpx.HTTPError:
        return False
    return status["settled"] and status["desired_version"] > version


def find_controller(serve: ServeProcess) -> psutil.Process:
    processes = psutil.Process(serve.process.pid).children(recursive=True)
    return next(process for process in processes if process.cmdline()[:1] == ["ray::Controller"])


def check(load: StreamLoad, expected: str) -> None:
    assert load.failures == []
    assert len(load.texts) >= NUM_STREAMS
    assert set(load.texts) == {expected}
