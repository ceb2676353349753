"""Calls to the admin API of a running cluster, as the commands make them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from cluster.admin_tls import get_scheme, list_client_options, list_request_options
from cluster.errors import NotRunning, RequestFailed
from cluster.state_file import find_state, get_state_dir

TOKEN_VARIABLE = "SHOAL_ADMIN_TOKEN"
# As for `shoal serve`; here only its ca.crt is read.
TLS_DIR_VARIABLE = "SHOAL_CLUSTER_TLS_DIR"
CALL_TIMEOUT_S = 10.0
# Planning takes about a second at the published sizes.
PLAN_TIMEOUT_S = 60.0
_WAIT_INTERVAL_S = 0.2


class AdminClient:
    """Each method raises RequestFailed with one line when there is no good answer in time."""

    def __init__(self, admin_url: str, token: str, tls_dir: str | None = None) -> None:
        """tls_dir: folder with the ca.crt that the server is known by; None: http. Raises ConfigError."""
        self._admin_url = admin_url
        self._request_options = list_request_options(tls_dir)
        # The environment's proxies are for the outside world.
        self._client = httpx.Client(
            base_url=admin_url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=CALL_TIMEOUT_S,
            trust_env=False,
            **list_client_options(tls_dir),
        )

    def fetch_status(self, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        return self._request("GET", "/status", None, timeout_s)

    def fetch_plan(self) -> dict[str, Any]:
        return self._request("GET", "/plan", None, CALL_TIMEOUT_S)

    def fetch_events(self, after: int) -> list[dict[str, Any]]:
        """Events with a greater sequence number, oldest first."""
        return list(self._request("GET", f"/events?after={after}", None, CALL_TIMEOUT_S)["events"])

    def fetch_rebalancing(self, extra_share: float) -> dict[str, Any]:
        """What rebalancing would gain with this part of memory for further copies."""
        return self._request("POST", "/rebalance/plan", {"extra_share": extra_share}, PLAN_TIMEOUT_S)

    def rebalance(self, extra_share: float) -> dict[str, Any]:
        """Begin to move experts. Returns the rebalancing that was begun."""
        return self._request("POST", "/rebalance", {"extra_share": extra_share}, PLAN_TIMEOUT_S)["current"]

    def wait_rebalanced(self, number: int, timeout_s: float) -> dict[str, Any]:
        """Wait until a rebalancing is measured. Raises RequestFailed if it failed, was lost with a controller that had
        to be restarted, or the time is over."""
        deadline_s = time.monotonic() + timeout_s
        phase = "not known"
        while True:
            try:
                current = self._request("GET", "/rebalance", None, CALL_TIMEOUT_S)["current"]
            except RequestFailed as error:
                phase = str(error)
            else:
                if current is None or current["number"] != number:
                    raise RequestFailed(f"rebalancing {number} is not known any more; `shoal events` tells why")
                if current["phase"] == "failed":
                    raise RequestFailed(f"rebalancing {number} failed: {current['failure']}")
                if current["phase"] == "done":
                    return current
                phase = current["phase"]
            if time.monotonic() >= deadline_s:
                raise RequestFailed(f"not done after {timeout_s:g} s, and still {phase}")
            time.sleep(_WAIT_INTERVAL_S)

    def scale(self, counts: Mapping[str, int], force: bool) -> int:
        """Returns the version of the desired state that has these numbers."""
        return self._change("/scale", {"groups": dict(counts), "force": force})

    def drain_replica(self, replica_id: str) -> int:
        """Have one replica replaced. Returns the version of the desired state."""
        return self._change("/replicas/drain", {"replica": replica_id})

    def restart(self, group_names: Sequence[str]) -> int:
        """Have every replica of these groups replaced, of all if none is named, one at a time."""
        return self._change("/restart", {"groups": list(group_names)})

    def upgrade(self, checkpoint: str, timeout_s: float, drain_timeout_s: float) -> dict[str, Any]:
        """Begin to serve another checkpoint in place of this one. Returns the upgrade."""
        body = {"checkpoint": checkpoint, "timeout_s": timeout_s, "drain_timeout_s": drain_timeout_s}
        return self._request("POST", "/upgrade", body, PLAN_TIMEOUT_S)["upgrade"]

    def abort_upgrade(self) -> dict[str, Any]:
        return self._request("POST", "/upgrade/abort", {}, CALL_TIMEOUT_S)["upgrade"]

    def wait_upgraded(self, weights_version: int, timeout_s: float) -> dict[str, Any]:
        """Wait until nothing of the old checkpoint is left. Raises RequestFailed with the reason if the new one could
        not be served, or when the time is over."""
        deadline_s = time.monotonic() + timeout_s
        state = "not known"
        while True:
            try:
                upgrade = self._request("GET", "/upgrade", None, CALL_TIMEOUT_S)["upgrade"]
            except RequestFailed as error:
                state = str(error)
            else:
                if upgrade is None or upgrade["to"]["weights_version"] != weights_version:
                    raise RequestFailed("another upgrade was begun meanwhile; `shoal events` tells why")
                if upgrade["phase"] == "failed":
                    raise RequestFailed(f"the old checkpoint goes on serving: {upgrade['reason']}")
                if upgrade["phase"] == "done":
                    return upgrade
                state = f"{upgrade['phase']}, waiting for {upgrade['waits_for']}"
            if time.monotonic() >= deadline_s:
                raise RequestFailed(
                    f"not done after {timeout_s:g} s, and still {state}; it goes on without this command"
                )
            time.sleep(_WAIT_INTERVAL_S)

    def wait_settled(self, version: int, timeout_s: float) -> dict[str, Any]:
        """Wait until the cluster is as desired, by this version or a later one; returns its status.

        A controller that is being restarted meanwhile is waited for. Raises RequestFailed when the time is over.
        """
        deadline_s = time.monotonic() + timeout_s
        reason = "the cluster has not been asked"
        while True:
            try:
                status = self.fetch_status()
                if status["settled"] and status["desired_version"] >= version:
                    return status
                steps = self.fetch_plan()["steps"]
                reason = "; ".join(f"{step['object']}: {step['reason']}" for step in steps[:3])
            except RequestFailed as error:
                reason = str(error)
            if time.monotonic() >= deadline_s:
                raise RequestFailed(f"not done after {timeout_s:g} s, and still under way: {reason}")
            time.sleep(_WAIT_INTERVAL_S)

    def drain(self, timeout_s: float) -> int:
        """Drain every router. Returns the number of sequences still running after timeout_s."""
        answer = self._request("POST", "/drain", {"timeout_s": timeout_s}, timeout_s + CALL_TIMEOUT_S)
        return int(answer["num_running"])

    def _change(self, path: str, body: Mapping[str, Any]) -> int:
        return int(self._request("POST", path, body, CALL_TIMEOUT_S)["desired_version"])

    def close(self) -> None:
        self._client.close()

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body, timeout=timeout_s, **self._request_options)
            document = response.json()
        except httpx.HTTPError as error:
            raise RequestFailed(f"{self._admin_url} does not answer: {error or type(error).__name__}") from error
        except ValueError:
            raise RequestFailed(f"{self._admin_url} is no admin API of Shoal: its answer is no JSON") from None
        if response.is_success and isinstance(document, dict):
            return document
        message = document.get("error", {}).get("message") if isinstance(document, dict) else None
        raise RequestFailed(f"{self._admin_url}{path} answered {response.status_code}: {message or 'no reason given'}")


def connect(url: str) -> AdminClient:
    """Find admin URL and token of the cluster with this API or admin URL. Raises NotRunning."""
    token = os.environ.get(TOKEN_VARIABLE)
    try:
        state = find_state(get_state_dir(), url)
    except NotRunning:
        if token is None:
            raise
        tls_dir = os.environ.get(TLS_DIR_VARIABLE)
        return AdminClient(url if "//" in url else f"{get_scheme(tls_dir)}://{url}", token, tls_dir)
    return AdminClient(state.admin_url, token or state.token, state.tls_dir)
