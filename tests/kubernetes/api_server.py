"""A real etcd and kube-apiserver on loopback with KubeRay's CRDs, and ways to stop, kill and start it again.

They are not part of the project: a folder with an `apiserver.py` that starts them is looked for in SHOAL_KUBE_ASSETS,
KUBEBUILDER_ASSETS and ../shared/kubernetes beside the repository, in this order.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import urllib3
from kubernetes import client, config

from cluster.kubernetes_api import KubernetesApi

# The client takes plain dicts as bodies and can give raw answers: its annotations know neither.
CoreApi: Any = client.CoreV1Api
RbacApi: Any = client.RbacAuthorizationV1Api
CoordinationApi: Any = client.CoordinationV1Api

REPOSITORY = Path(__file__).resolve().parents[2]
# Set by .ci/run: an API server that is not there is a failure then.
REQUIRE_VARIABLE = "REQUIRE_KUBE_API"
START_TIMEOUT_S = 110.0


def find_assets() -> Path:
    """The folder; skips the test where there is none."""
    candidates = [
        *(Path(folder) for name in ("SHOAL_KUBE_ASSETS", "KUBEBUILDER_ASSETS") if (folder := os.environ.get(name))),
        REPOSITORY.parent / "shared" / "kubernetes",
    ]
    for folder in candidates:
        if (folder / "apiserver.py").is_file():
            return folder
    reason = f"no apiserver.py that starts a Kubernetes API in {', '.join(map(str, candidates))}"
    if os.environ.get(REQUIRE_VARIABLE):
        pytest.fail(reason)
    pytest.skip(reason)


class ApiServer:
    """Running once made; close it. `admin` may do everything."""

    def __init__(self, assets: Path, folder: Path) -> None:
        self._folder = folder
        result = subprocess.run(
            [sys.executable, str(assets / "apiserver.py"), "start", str(folder), "--crds"],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
        )
        assert result.returncode == 0, result.stderr or result.stdout
        self.kubeconfig = Path(result.stdout.strip().splitlines()[-1])
        etcd_pid, server_pid = (int(text) for text in (folder / "pids").read_text().split())
        self._etcd, self._server = psutil.Process(etcd_pid), psutil.Process(server_pid)
        self._command = self._server.cmdline()
        self._restarted: subprocess.Popen[bytes] | None = None
        configuration = client.Configuration()
        config.load_kube_config(str(self.kubeconfig), client_configuration=configuration)
        self.admin = client.ApiClient(configuration)
        self.host: str = configuration.host

    def pause(self) -> None:
        """SIGSTOP: it accepts connections and answers none."""
        self._server.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._server.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the API server; etcd keeps its data."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._server.kill()
        if self._restarted is not None:
            self._restarted.wait(10)

    def restart(self) -> None:
        """After kill: the same server on the same port, ready."""
        log = (self._folder / "apiserver-again.log").open("w")
        with log:
            self._restarted = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
        self._server = psutil.Process(self._restarted.pid)
        deadline_s = time.monotonic() + 60
        while not self._is_ready():
            assert time.monotonic() < deadline_s, "the API server did not come back"
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        """Whether it has read its Roles, too: before, it answers those who are no administrators with 403."""
        try:
            answer = CoreApi(self.admin).api_client.rest_client.request(
                "GET", f"{self.host}/readyz", _request_timeout=5
            )
        except (client.ApiException, urllib3.exceptions.HTTPError, OSError):
            return False
        return answer.status == 200

    def close(self) -> None:
        """Nothing is to be kept, so nothing is waited for."""
        self.kill()
        self._etcd.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def make_namespace(self, name: str) -> None:
        CoreApi(self.admin).create_namespace({"metadata": {"name": name}})

    def make_account(self, namespace: str, documents: Sequence[dict[str, Any]]) -> str:
        """Create a ServiceAccount, its Role and RoleBinding. Returns the account's token."""
        core, rbac = CoreApi(self.admin), RbacApi(self.admin)
        create = {
            "ServiceAccount": core.create_namespaced_service_account,
            "Role": rbac.create_namespaced_role,
            "RoleBinding": rbac.create_namespaced_role_binding,
        }
        for document in documents:
            create[document["kind"]](namespace, document)
        name = next(document["metadata"]["name"] for document in documents if document["kind"] == "ServiceAccount")
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}
        answer = core.create_namespaced_service_account_token(name, namespace, request, _preload_content=False)
        return json.loads(answer.data)["status"]["token"]

    def make_client(self, token: str) -> client.ApiClient:
        configuration = client.Configuration()
        config.load_kube_config_from_dict(self._build_kubeconfig(token), client_configuration=configuration)
        configuration.retries = 0
        return client.ApiClient(configuration)

    def make_api(self, token: str, namespace: str, cluster_name: str) -> KubernetesApi:
        return KubernetesApi(self.make_client(token), namespace, cluster_name)

    def write_kubeconfig(self, token: str, path: Path) -> Path:
        """For a process of its own."""
        path.write_text(json.dumps(self._build_kubeconfig(token)))
        return path

    def _build_kubeconfig(self, token: str) -> dict[str, Any]:
        document = json.loads(self.kubeconfig.read_text())
        assert base64.b64decode(document["clusters"][0]["cluster"]["certificate-authority-data"])
        document["users"] = [{"name": "admin", "user": {"token": token}}]
        return document
