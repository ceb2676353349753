"""The app under real uvicorn, in a thread of the test process."""

from __future__ import annotations

import socket
import threading
import time

import uvicorn

from router.api.app import create_app
from router.api.cluster_source import ClusterSource
from router.api.http_protocol import BoundedProtocol
from router.api.router_client import RouterEndpoints
from router.api.settings import ApiSettings

START_TIMEOUT_S = 20.0


class ApiServer:
    """Serves until `stop`. url: of its root."""

    def __init__(
        self,
        settings: ApiSettings,
        endpoints: RouterEndpoints,
        cluster: ClusterSource | None = None,
        protocol: type[BoundedProtocol] = BoundedProtocol,
    ) -> None:
        self.app = create_app(settings, endpoints, cluster)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, http=protocol, log_config=None, timeout_graceful_shutdown=2)
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        # The listener accepts already; this only waits for the lifespan to have begun.
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(START_TIMEOUT_S)
        assert not self._thread.is_alive(), "the server did not stop"
