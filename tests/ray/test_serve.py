"""`shoal serve` on the demo checkpoint with real Ray: one cluster for all of these, stopped by the last one."""

import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx
import psutil
import pytest

from tests.other_weights import write_other_weights
from tests.ray.serve_process import ServeProcess, get_replica, stream_chat, wait_for
from tests.scenarios.stream_load import StreamLoad

pytestmark = pytest.mark.timeout(180)
DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    process = ServeProcess(tmp_path_factory.mktemp("serve"), "--log-format", "json")
    try:
        process.wait_ready()
        yield process
    finally:
        process.close()


@pytest.fixture(scope="module")
def undisturbed(serve: ServeProcess) -> str:
    """A long greedy answer while nothing happens."""
    return "".join(stream_chat(serve.url, 200))


def test_stdout_is_one_ready_line_with_the_url(serve: ServeProcess):
    pattern = rf"Shoal is ready on {serve.url} \(model shoal-demo, 4 expert groups, \d+\.\d s\)\n"
    assert re.fullmatch(pattern, serve.stdout)


def test_the_log_says_how_much_each_router_holds_at_once(serve: ServeProcess):
    lines = [json.loads(line) for line in serve.stderr.splitlines() if line.startswith("{")]
    (cache,) = (line for line in lines if "requests_at_full_length" in line)
    assert cache["router"] == "r0" and cache["max_model_len"] == 4096
    assert cache["requests_at_full_length"] == pytest.approx(cache["tokens"] / 4096, abs=0.1)
    assert cache["tokens"] >= 4096


def test_four_expert_groups_run_in_four_processes(serve: ServeProcess):
    result = serve.run_command("status", "--url", serve.url, "--json")
    assert result.returncode == 0, result.stderr
    status = json.loads(result.stdout)
    replicas = [replica for group in status["groups"] for replica in group["replicas"]]
    assert [group["name"] for group in status["groups"]] == ["g0", "g1", "g2", "g3"]
    assert {replica["state"] for replica in replicas} == {"ready"}
    pids = {replica["pid"] for replica in replicas} | {router["pid"] for router in status["routers"]}
    assert len(pids) == 5
    assert all(psutil.pid_exists(pid) for pid in pids)


def test_admin_api_wants_its_token(serve: ServeProcess):
    assert httpx.get(f"{serve.admin_url}/status", timeout=10, trust_env=False).status_code == 401


def test_chat_command_prints_an_answer(serve: ServeProcess):
    result = serve.run_command("chat", "--url", serve.url, "-m", "import os", "--max-tokens", "8", "--temperature", "0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_bench_tells_the_steps_of_its_own_run(serve: ServeProcess):
    """The controller's figures are a second old, and the run takes less."""
    load = ["--requests", "4", "--concurrency", "1", "--input-length", "16", "--output-length", "8", "--json"]
    result = serve.run_command("bench", "--url", serve.url, *load)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    (router,) = report["routers"].values()
    during = router["during"]
    assert during["num_steps"] * during["tokens_per_step"] == pytest.approx(report["num_output_tokens"], rel=0.01)
    assert sum(during["parts_share"].values()) == pytest.approx(1, abs=0.01)


def test_every_process_logs_json_with_request_ids_and_without_prompts(serve: ServeProcess):
    secret, request_id = "correct horse battery", "of-this-test"
    body = {"messages": [{"role": "user", "content": secret}], "max_tokens": 2}
    answered = httpx.post(
        f"{serve.url}/v1/chat/completions", json=body, headers={"X-Request-Id": request_id}, timeout=60
    )
    assert answered.status_code == 200
    assert answered.headers.get_list("X-Request-Id") == [request_id]
    [state] = (json.loads(path.read_text()) for path in Path(serve.environment["SHOAL_STATE_DIR"]).glob("*.json"))
    folder = Path(state["session_folder"]) / "logs"

    def read_logs() -> list[str]:
        return [path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()]

    def read_lines() -> list[dict[str, Any]]:
        lines = [line for text in (*read_logs(), serve.stderr) for line in text.splitlines() if line.startswith("{")]
        return [line for line in map(json.loads, lines) if "logger" in line]

    def find_loggers() -> set[str]:
        return {line["logger"] for line in read_lines() if line.get("request_id", "").startswith(request_id)}

    wait_for(lambda: find_loggers() >= {"router.api.edge", "router.service"}, 10)
    loggers = {line["logger"] for line in read_lines()}
    assert loggers >= {"cluster.serve_command", "cluster.stored_state", "experts.load_progress"}
    [request] = [
        line for line in read_lines() if line["logger"] == "router.api.edge" and line["request_id"] == request_id
    ]
    assert (request["level"], request["status"], request["route"]) == ("info", 200, "/v1/chat/completions")
    assert not [text for text in read_logs() if secret in text]


def test_the_proxy_bounds_its_connections(serve: ServeProcess):
    """Its own protocol would keep header fields of any size, and answers what is no HTTP with plain text."""
    address = httpx.URL(serve.url)
    for head, status, code in (
        (b"GET /version HTTP/1.1\r\nX-Long: " + b"x" * 2**20, 431, "header_too_large"),
        (b"GET /version HTTP/x\r\n\r\n", 400, "invalid_http"),
    ):
        with socket.create_connection((address.host, address.port), timeout=20) as connection:
            connection.sendall(head)
            with connection.makefile("rb") as stream:
                answered, _, body = stream.read().partition(b"\r\n\r\n")
        assert int(answered.split()[1]) == status
        assert json.loads(body)["error"]["code"] == code


def test_answer_is_the_same_when_asked_again(serve: ServeProcess, undisturbed: str):
    assert "".join(stream_chat(serve.url, 200)) == undisturbed


def test_stream_goes_on_when_an_expert_actor_is_killed(serve: ServeProcess, undisturbed: str):
    before = serve.fetch_status()
    victim = get_replica(before, "g2")
    parts: list[str] = []
    for part in stream_chat(serve.url, 200):
        parts.append(part)
        if len(parts) == 10:
            os.kill(victim["pid"], signal.SIGKILL)
    assert "".join(parts) == undisturbed
    wait_for(lambda: get_replica(serve.fetch_status(), "g2")["state"] == "ready", 30)
    after = get_replica(serve.fetch_status(), "g2")
    assert after["incarnation"] > victim["incarnation"]
    assert after["pid"] != victim["pid"]
    assert after["weight_digest"] == victim["weight_digest"]
    assert serve.fetch_status()["table_version"] > before["table_version"]


def test_tokens_flow_while_the_controller_is_gone_and_it_comes_back(serve: ServeProcess, undisturbed: str):
    version = serve.fetch_status()["table_version"]
    controllers = [
        process
        for process in psutil.Process(serve.process.pid).children(recursive=True)
        if process.cmdline()[:1] == ["ray::Controller"]
    ]
    assert len(controllers) == 1
    controllers[0].kill()
    assert "".join(stream_chat(serve.url, 200)) == undisturbed
    wait_for(lambda: _is_ready(serve), 60)
    assert serve.fetch_status()["table_version"] == version


def test_clients_see_nothing_of_ray_serve_and_an_error_event_when_the_front_is_killed(serve: ServeProcess):
    own = httpx.get(f"{serve.url}/-/routes", timeout=20, trust_env=False)
    assert (own.status_code, own.json()["error"]["code"]) == (404, "not_found")
    headers = {"X-Request-Timeout-Seconds": "1e-9"}
    timed = httpx.get(f"{serve.url}/v1/models", headers=headers, timeout=20, trust_env=False)
    assert timed.status_code == 200
    (front,) = (
        process
        for process in psutil.Process(serve.process.pid).children(recursive=True)
        if process.cmdline()[:1] == ["ray::ServeReplica:shoal:api"]
    )
    body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    lines: list[str] = []
    with httpx.stream("POST", f"{serve.url}/v1/completions", json=body, timeout=60, trust_env=False) as answered:
        for line in answered.iter_lines():
            if line:
                lines.append(line)
                if len(lines) == 10:
                    front.kill()
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
    wait_for(lambda: httpx.get(f"{serve.url}/health/ready", timeout=30, trust_env=False).is_success, 60)


def test_stream_goes_on_when_the_only_router_is_killed(serve: ServeProcess, undisturbed: str):
    """Ray starts it again, on another address."""
    router = serve.fetch_status()["routers"][0]
    parts: list[str] = []
    for part in stream_chat(serve.url, 200):
        parts.append(part)
        if len(parts) == 10:
            os.kill(router["pid"], signal.SIGKILL)
    assert "".join(parts) == undisturbed
    wait_for(lambda: _is_ready(serve) and serve.fetch_status()["routers"][0]["pid"] != router["pid"], 60)
    wait_for(lambda: httpx.get(f"{serve.url}/health/ready", timeout=10, trust_env=False).is_success, 30)
    assert "".join(stream_chat(serve.url, 200)) == undisturbed


def test_streams_and_new_requests_do_not_notice_that_ray_s_control_service_stands_still(
    serve: ServeProcess, undisturbed: str
):
    """tests/benchmarks/chaos.py stops it for 30 s, and kills it."""
    processes = psutil.Process(serve.process.pid).children(recursive=True)
    control = next(process for process in processes if process.name() == "gcs_server")
    parts: list[str] = []
    try:
        for part in stream_chat(serve.url, 200):
            parts.append(part)
            if len(parts) == 10:
                control.suspend()
        assert control.status() == psutil.STATUS_STOPPED
        assert "".join(parts) == undisturbed
        assert "".join(stream_chat(serve.url, 200)) == undisturbed
    finally:
        control.resume()
    wait_for(lambda: _is_ready(serve) and serve.fetch_status()["control_plane"], 60)


def test_an_upgrade_that_cannot_load_names_the_reason_and_the_old_weights_go_on(
    serve: ServeProcess, undisturbed: str, tmp_path: Path
):
    """Its files vanish once it has begun."""
    wait_for(lambda: serve.fetch_status()["settled"], 30)
    broken = tmp_path / "broken"
    shutil.copytree(DEMO, broken)
    before = serve.fetch_status()
    with StreamLoad(serve.url, 1, 24) as load:
        result = serve.run_command("upgrade", str(broken), "--url", serve.url)
        assert result.returncode == 0, result.stderr
        shutil.rmtree(broken)
        wait_for(lambda: serve.fetch_status()["upgrade"]["phase"] == "failed", 90)
    assert load.failures == []
    assert "failed to start 3 times" in (reason := serve.fetch_status()["upgrade"]["reason"])
    assert str(broken) in reason
    after = serve.fetch_status()
    assert [group["replicas"] for group in after["groups"]] == [
        [{**replica, "load": ANY} for replica in group["replicas"]] for group in before["groups"]
    ]
    assert after["settled"] is True
    assert "".join(stream_chat(serve.url, 200)) == undisturbed


def test_an_upgrade_to_other_weights_fails_no_stream_and_mixes_none(
    serve: ServeProcess, undisturbed: str, tmp_path_factory: pytest.TempPathFactory
):
    other = tmp_path_factory.mktemp("other") / "weights"
    write_other_weights(DEMO, other)
    before = serve.fetch_status()
    with StreamLoad(serve.url, 2, 200) as load:
        result = serve.run_command("upgrade", str(other), "--wait", "--url", serve.url, timeout_s=150)
        assert result.returncode == 0, result.stderr
        num_old = len(load.texts)
        # What is begun from now on.
        wait_for(lambda: len(load.texts) >= num_old + 4, 60)
    assert load.failures == []
    upgraded = "".join(stream_chat(serve.url, 200))
    assert upgraded != undisturbed
    assert set(load.texts) == {undisturbed, upgraded}
    assert set(load.texts[-2:]) == {upgraded}
    after = serve.fetch_status()
    assert (after["checkpoint"], after["settled"], after["beside"]) == (str(other), True, None)
    old_pids, new_pids = _list_pids(before), _list_pids(after)
    assert len(new_pids) == 5
    assert not old_pids & new_pids
    assert not any(psutil.pid_exists(pid) for pid in old_pids)
    digests = {get_replica(status, "g0")["weight_digest"] for status in (before, after)}
    assert len(digests) == 2
    events = json.loads(serve.run_command("events", "--url", serve.url, "--json").stdout)["events"]
    steps = [event["action"] for event in events if event["object"] == "upgrade"]
    assert steps[-9:] == ["begin", *["load"] * 4, "route", "switch", "release", "done"]


def test_an_upgraded_cluster_outlives_its_controller(serve: ServeProcess):
    before = serve.fetch_status()
    controllers = [
        process
        for process in psutil.Process(serve.process.pid).children(recursive=True)
        if process.cmdline()[:1] == ["ray::Controller"]
    ]
    controllers[0].kill()
    wait_for(lambda: _is_ready(serve) and serve.fetch_status()["settled"], 60)
    after = serve.fetch_status()
    assert after["checkpoint"] == before["checkpoint"]
    assert _list_pids(after) == _list_pids(before)


def test_sigint_lets_a_running_stream_finish_and_leaves_no_process(serve: ServeProcess):
    undisturbed = "".join(stream_chat(serve.url, 200))
    serve.remember_processes()
    parts: list[str] = []
    has_begun = threading.Event()

    def read() -> None:
        for part in stream_chat(serve.url, 200):
            parts.append(part)
            has_begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert has_begun.wait(30)
    serve.process.send_signal(signal.SIGINT)
    assert serve.process.wait(60) == 0
    reader.join(10)
    assert not reader.is_alive()
    assert "".join(parts) == undisturbed
    assert serve.list_left_behind() == []
    assert serve.run_command("status", "--url", serve.url).returncode == 1


def _is_ready(serve: ServeProcess) -> bool:
    try:
        return serve.fetch_status()["ready"]
    except httpx.HTTPError:
        return False


def _list_pids(status: dict[str, Any]) -> set[int]:
    return {
        item["pid"]
        for item in (*status["routers"], *(each for group in status["groups"] for each in group["replicas"]))
    }
