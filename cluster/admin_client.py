"""Calls to the admin API of a running cluster, as the commands make them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import httpx

from cluster.errors import NotRunning, RequestFailed
from cluster.state_file import find_state, get_state_dir

TOKEN_VARIABLE = "SHOAL_ADMIN_TOKEN"
CALL_TIMEOUT_S = 10.0


class AdminClient:
    """Each method raises RequestFailed with one line when there is no good answer in time."""

    def __init__(self, admin_url: str, token: str) -> None:
        self._admin_url = admin_url
        # The environment's proxies are for the outside world.
        self._client = httpx.Client(
            base_url=admin_url, headers={"Authorization": f"Bearer {token}"}, timeout=CALL_TIMEOUT_S, trust_env=False
        )

    def fetch_status(self, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        return self._request("GET", "/status", None, timeout_s)

    def drain(self, timeout_s: float) -> int:
        """Drain every router. Returns the number of sequences still running after timeout_s."""
        answer = self._request("POST", "/drain", {"timeout_s": timeout_s}, timeout_s + CALL_TIMEOUT_S)
        return int(answer["num_running"])

    def close(self) -> None:
        self._client.close()

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body, timeout=timeout_s)
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
        return AdminClient(url if "//" in url else f"http://{url}", token)
    return AdminClient(state.admin_url, token or state.token)
