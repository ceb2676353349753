"""Experts move between groups of a running cluster under load, while its controller is killed: no request fails, no
token changes, rows even out."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.biased_checkpoint import write_biased_checkpoint
from tests.ray.serve_process import ADMIN_TOKEN, TLS_CONTEXT, ServeProcess, stream_chat, wait_for
from tests.scenarios.stream_load import StreamLoad
from tests.scenarios.test_scaling import find_controller, list_replicas, run_json

pytestmark = pytest.mark.timeout(240)
MAX_TOKENS = 24


def test_a_skewed_load_is_evened_out_while_it_is_served(tmp_path: Path) -> None:
    checkpoint = write_biased_checkpoint(tmp_path / "biased", (0, 1, 2))
    arguments = (str(checkpoint), "--groups", "2", "--expert-threads", "1", "--combine", "exact", "--deterministic")
    serve = ServeProcess(tmp_path, *arguments)
    try:
        serve.wait_ready()
        undisturbed = "".join(stream_chat(serve.url, MAX_TOKENS))
        pids = {replica["pid"] for replica in list_replicas(serve.fetch_status())}
        with StreamLoad(serve.url, 2, MAX_TOKENS) as load:
            wait_for(lambda: len(load.texts) >= 8, 60)
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(serve.run_command, "rebalance", "--url", serve.url)
                wait_for(lambda: running.done() or _is_moving(serve), 60)
                # It is restarted, and goes on with what it had begun; the command waits for it.
                find_controller(serve).kill()
                result = running.result(120)
            assert result.returncode == 0, result.stderr
        assert load.failures == []
        assert set(load.texts) == {undisturbed}
        gains = [float(number) for number in re.findall(r"max over mean: +([\d.]+) (?:now|before)", result.stdout)]
        measured = [float(number) for number in re.findall(r"([\d.]+) measured now", result.stdout)]
        assert len(gains) == 2 and measured[0] < gains[0], result.stdout
        # The processes are the same ones: only experts moved.
        replicas = list_replicas(serve.fetch_status())
        assert {replica["pid"] for replica in replicas} == pids
        events = run_json(serve, "events")["events"]
        actions = [event["action"] for event in events if event["object"] in ("balancer", "replica g1-0")]
        assert actions.index("continue") < actions.index("moved") < actions.index("done")
        assert "host" in actions

        # One that dies now comes back with what its group holds now.
        victim = next(replica for replica in replicas if replica["id"] == "g1-0")
        os.kill(victim["pid"], signal.SIGKILL)
        wait_for(lambda: _find(serve, "g1-0")["pid"] not in (victim["pid"], None), 60)
        wait_for(lambda: _find(serve, "g1-0")["state"] == "ready", 60)
        assert _find(serve, "g1-0")["weight_digest"] == victim["weight_digest"]
        assert "".join(stream_chat(serve.url, MAX_TOKENS)) == undisturbed
    finally:
        serve.close()


def _is_moving(serve: ServeProcess) -> bool:
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    options = {"headers": headers, "timeout": 10, "verify": TLS_CONTEXT, "trust_env": False}
    current = httpx.get(f"{serve.admin_url}/rebalance", **options).json()["current"]
    return current is not None and current["phase"] == "moving"


def _find(serve: ServeProcess, replica_id: str) -> dict[str, object]:
    return next(item for item in list_replicas(serve.fetch_status()) if item["id"] == replica_id)
