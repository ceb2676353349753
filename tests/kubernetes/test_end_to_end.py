"""The whole on one machine: real API server, real Ray, real controller; a pod is a Ray node of its own, and its preStop
hook what `shoal leave` looks for. A group grows, shrinks and loses its pod while streams run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.leave_command import find_actors
from tests.free_ports import find_free_ports
from tests.kubernetes.api_server import ApiServer
from tests.kubernetes.conftest import Place, make_place
from tests.kubernetes.ray_cluster import NAME, PlayedOperator, list_event_messages
from tests.other_weights import write_other_weights
from tests.ray.ray_nodes import RayNodes, kill_node
from tests.ray.serve_process import ADMIN_TOKEN, stream_chat, wait_for
from tests.scenarios.stream_load import StreamLoad

pytestmark = pytest.mark.timeout(400)
MAX_TOKENS = 24
DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "checkpoint"
NUM_STREAMS = 2


class PodProcesses:
    """Ray nodes by pod name; every one is ended in the end.

    One that ends by itself is started again, as a kubelet does: on a busy machine Ray gives up a start whose agents
    take more than some seconds.
    """

    def __init__(self, nodes: RayNodes) -> None:
        self._nodes = nodes
        self._starts: dict[str, tuple[str, dict[str, float]]] = {}
        self.running: dict[str, psutil.Process] = {}

    def start(self, group_name: str, pod_name: str, address: str) -> None:
        self._starts[pod_name] = (address, {f"expert_group_{group_name}": 1})
        self.running[pod_name] = self._nodes.start_worker(pod_name, *self._starts[pod_name])

    def tend(self) -> None:
        for pod_name, node in list(self.running.items()):
            if not node.is_running() or node.status() == psutil.STATUS_ZOMBIE:
                kill_node(node)
                self.running[pod_name] = self._nodes.start_worker(pod_name, *self._starts[pod_name])

    def holds_no_actor(self, pod_name: str) -> bool:
        """As `shoal leave` in the pod's own container."""
        try:
            return pod_name not in self.running or not find_actors(self.running[pod_name].children(recursive=True))
        except psutil.NoSuchProcess:
            return True

    def end(self, pod_name: str) -> None:
        if (node := self.running.pop(pod_name, None)) is not None:
            kill_node(node)

    def close(self) -> None:
        for pod_name in list(self.running):
            self.end(pod_name)


class ControllerProcess:
    """`shoal controller` on free ports."""

    def __init__(self, place: Place, folder: Path, ray_address: str) -> None:
        port, admin_port = find_free_ports(2)
        self.url, self.admin_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}"
        self.log = folder / "controller.log"
        self.environment = os.environ | {
            "KUBECONFIG": str(place.server.write_kubeconfig(place.token, folder / "kubeconfig")),
            "RAY_ADDRESS": ray_address,
            "SHOAL_ADMIN_TOKEN": ADMIN_TOKEN,
            "SHOAL_KUBERNETES_CLUSTER": NAME,
            "SHOAL_KUBERNETES_NAMESPACE": place.namespace,
            "SHOAL_STATE_DIR": str(folder / "state"),
        }
        self._command = command = [sys.executable, "-m", "cluster.cli", "controller"]
        command += ["--kubernetes-scaling", "controller"]
        command += ["--address", "auto", "--insecure-cluster-network", "--port", str(port)]
        command += ["--admin-port", str(admin_port), "--groups", "2", "--deterministic"]
        command += ["--expert-threads", "1", "--router-threads", "1"]
        self.process = self._start()

    def restart(self, checkpoint: Path) -> None:
        """With other settings, as `helm upgrade` does."""
        self.close()
        self._command.append(str(checkpoint))
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("a") as log:
            return subprocess.Popen(self._command, env=self.environment, stdout=log, stderr=log)

    def fetch_status(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        response = httpx.get(f"{self.admin_url}/status", headers=headers, timeout=10, trust_env=False)
        return response.json() if response.status_code == 200 else {}

    def run_command(self, *arguments: str) -> dict[str, Any]:
        """A `shoal` command with --json, as in the controller's container."""
        command = [sys.executable, "-m", "cluster.cli", *arguments, "--url", self.url, "--json"]
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            is_ready = httpx.get(f"{self.url}/health/ready", timeout=5, trust_env=False).is_success
            return is_ready and self.fetch_status().get("settled", False)
        except httpx.HTTPError:
            return False

    def list_ids(self) -> list[str]:
        return [item["id"] for group in self.fetch_status()["groups"] for item in group["replicas"]]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            finally:
                self.process.kill()


@dataclass(frozen=True)
class Running:
    """A cluster that serves, with one replica of each group. The Ray head is the pod of the router and of g1 too."""

    place: Place
    controller: ControllerProcess
    pods: PodProcesses
    operator: PlayedOperator
    undisturbed: str

    def stream(self) -> StreamLoad:
        return StreamLoad(self.controller.url, NUM_STREAMS, MAX_TOKENS)

    def check(self, load: StreamLoad) -> None:
        assert load.failures == []
        assert len(load.texts) >= NUM_STREAMS
        assert set(load.texts) == {self.undisturbed}
        # The operator was never left a choice of which pod to delete.
        assert self.operator.chosen == []


@pytest.fixture(scope="module")
def running(api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("end-to-end")
    place = make_place(api_server)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        # Without it, a token would have to be made and shared first.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        # A second place for each, for an upgrade: the head plays several pods.
        nodes = RayNodes(folder, {"shoal_router": 2, "expert_group_g1": 2})
        stack.callback(nodes.close)
        pods = PodProcesses(nodes)
        stack.callback(pods.close)
        wait_for(lambda: nodes.is_up("head"), 60)
        operator = PlayedOperator(
            api_server.admin,
            place.namespace,
            group_names=["g0"],
            addresses=[f"127.0.1.{number}" for number in range(2, 10)],
            on_start=pods.start,
            on_look=pods.tend,
            may_end=pods.holds_no_actor,
            on_end=pods.end,
        )
        controller = ControllerProcess(place, folder, nodes.address)
        stack.callback(controller.close)
        stack.enter_context(operator)
        wait_for(controller.is_ready, 120)
        yield Running(place, controller, pods, operator, "".join(stream_chat(controller.url, MAX_TOKENS)))


def test_a_group_grows_by_a_patch_takes_traffic_and_is_drained_when_it_shrinks(running: Running):
    controller = running.controller
    with running.stream() as load:
        controller.run_command("scale", "g0=2", "--wait")
        assert controller.list_ids() == ["g0-0", "g0-1", "g1-0"]
        wait_for(lambda: _has_traffic(controller, "g0-1"), 30)
        controller.run_command("scale", "g0=1", "--wait")
        assert controller.list_ids() == ["g0-0", "g1-0"]
        wait_for(lambda: list(running.pods.running) == ["g0-pod-0"], 30)
    running.check(load)
    assert running.operator.deleted == ["g0-pod-1"]
    assert running.place.cluster.read_groups()["g0"]["replicas"] == 1


@pytest.mark.skipif("KUBE_CHAOS" not in os.environ, reason="another Ray node takes long to start: run by make chaos")
def test_a_deleted_pod_ends_once_another_serves(running: Running):
    (pod_name,) = running.pods.running
    (replica_id,) = (id_ for id_ in running.controller.list_ids() if id_.startswith("g0"))
    with running.stream() as load:
        running.operator.delete_pod(pod_name)
        wait_for(lambda: pod_name not in running.pods.running and running.controller.is_ready(), 120)
        assert replica_id not in running.controller.list_ids()
        # The operator has made a pod for the deleted one, the controller one for the successor: the empty one goes.
        wait_for(lambda: len(running.pods.running) == 1 and running.controller.is_ready(), 60)
    running.check(load)


@pytest.mark.skipif("KUBE_CHAOS" not in os.environ, reason="another Ray node takes long to start: run by make chaos")
def test_another_checkpoint_in_the_settings_is_served_without_a_failed_or_mixed_stream(
    running: Running, tmp_path_factory: pytest.TempPathFactory
):
    """Last here: the settings stay so."""
    other = tmp_path_factory.mktemp("other") / "weights"
    write_other_weights(DEMO, other)
    with running.stream() as load:
        running.controller.restart(other)
        wait_for(lambda: running.controller.is_ready() and _fetch_checkpoint(running) == str(other), 200)
        wait_for(lambda: len(running.pods.running) == 1, 60)
    upgraded = "".join(stream_chat(running.controller.url, MAX_TOKENS))
    assert load.failures == []
    assert upgraded != running.undisturbed
    assert set(load.texts) == {running.undisturbed, upgraded}
    assert running.operator.chosen == []
    messages = list_event_messages(running.place.server.admin, running.place.namespace)
    assert any(message.startswith("upgrade: everything is served with weights 2") for message in messages)
    groups = running.place.cluster.read_groups()
    assert (groups["g0"]["replicas"], groups["g1"]["replicas"], groups["routers"]["replicas"]) == (1, 1, 1)


def _fetch_checkpoint(running: Running) -> str | None:
    return running.controller.fetch_status().get("checkpoint")


def _has_traffic(controller: ControllerProcess, replica_id: str) -> bool:
    replicas = [item for group in controller.fetch_status()["groups"] for item in group["replicas"]]
    load = next(item["load"] for item in replicas if item["id"] == replica_id)
    return bool((load or {}).get("busy_share"))
