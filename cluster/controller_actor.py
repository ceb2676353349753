"""The Ray actor around the controller's loop and its admin API: a process that ends when its loop does not turn.

Ray restarts it with the same arguments, and everything else is in the record store.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time

from cluster.controller import ControllerLoop
from cluster.record_store import RayRecordStore
from cluster.records import CONTROLLER_KEY, ControllerRecord
from cluster.spec import spec_from_json
from experts.logs import set_up_logging

logger = logging.getLogger(__name__)

# A turn takes milliseconds; with Ray away its calls end after their deadlines, some 30 s in all.
MAX_TURN_S = 90.0
WATCH_INTERVAL_S = 1.0


class Controller:
    """Threaded: the loop and the admin server run in a thread of their own, and another one watches them."""

    def __init__(self, spec_json: bytes, admin_host: str, admin_port: int, token_hash: str, viewer_hash: str) -> None:
        self._spec = spec_from_json(spec_json)
        set_up_logging(log_format=self._spec.log_format)
        self._address = (admin_host, admin_port)
        self._token_hash, self._viewer_hash = token_hash, viewer_hash
        self._started_s = time.monotonic()
        self._loop: ControllerLoop | None = None
        threading.Thread(target=self._run, name="controller", daemon=True).start()
        threading.Thread(target=self._watch, name="controller watch", daemon=True).start()

    def ping(self) -> int:
        """The process id: answers when the constructor has ended."""
        return os.getpid()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException:
            logger.exception("the controller's loop ended; Ray restarts it")
            os._exit(1)

    def _watch(self) -> None:
        """A controller that hangs looks alive to Ray: it has to end itself."""
        while True:
            time.sleep(WATCH_INTERVAL_S)
            turned_s = self._started_s if self._loop is None else self._loop.turned_s or self._started_s
            if time.monotonic() - turned_s > MAX_TURN_S:
                logger.error("the controller's loop has not turned for %.0f s; Ray restarts it", MAX_TURN_S)
                os._exit(1)

    async def _serve(self) -> None:
        import uvicorn

        from cluster.actor_factory import ActorFactory
        from cluster.admin_app import create_admin_app
        from cluster.admin_tls import get_scheme, list_server_options
        from cluster.probes import Probes
        from experts.tls import load_cluster_tls

        store = RayRecordStore()
        probes = Probes(load_cluster_tls(self._spec.tls_dir))
        loop = self._loop = ControllerLoop(
            self._spec, store, ActorFactory(self._spec), probes, time.monotonic, time.time
        )
        host, port = self._address
        app = create_admin_app(loop, self._token_hash, self._viewer_hash)
        options = list_server_options(self._spec.tls_dir)
        config = uvicorn.Config(
            app, host=host, port=port, log_level="warning", log_config=None, access_log=False, **options
        )
        server = uvicorn.Server(config)
        admin_url = f"{get_scheme(self._spec.tls_dir)}://{host}:{port}"
        record = ControllerRecord(pid=os.getpid(), node=os.uname().nodename, admin_url=admin_url)
        await asyncio.to_thread(store.put, CONTROLLER_KEY, record.to_json())
        done, _ = await asyncio.wait(
            [asyncio.create_task(loop.run()), asyncio.create_task(server.serve())], return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            task.result()
        raise RuntimeError("the admin server ended")
