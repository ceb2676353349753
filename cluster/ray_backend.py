"""Starts and stops what a cluster consists of: Ray itself if need be, the actors, Ray Serve with the HTTP front.

Everything that takes time is started at once and waited for afterwards. Stopping leaves no process behind; a Ray
cluster that was joined keeps running, without what belongs to us.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from cluster.api_proxy import PROXY_ENV
from cluster.data_plane_env import DATA_PLANE_ENV
from cluster.errors import ClusterError, StartError
from cluster.gpu_share import compute_gpu_share
from cluster.process_reaper import SESSION_VARIABLE, Session, list_processes, reap
from cluster.settings import ServeSettings
from cluster.spec import ClusterSpec
from router.api.settings import ApiSettings

logger = logging.getLogger(__name__)

# No tensor goes through Ray's object store; this is the least that it accepts, rounded up.
_OBJECT_STORE_BYTES = 100 * 2**20
_SERVE_STOP_S = 10.0
_SERVE_START_S = 3.0
_RAY_STOP_S = 5.0

_OWN_RAY_ENV = {
    **DATA_PLANE_ENV,
    "RAY_USAGE_STATS_ENABLED": "0",
    # With the default, drivers and actors end 60 s after Ray's control service did: a dead head would stop serving.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Ray Serve's proxy is killed if it is not up after this, three times; by default 5 s, which is little on a machine
    # where all actors start at once.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # By default workers run at nice 15, behind everything else on the machine; ours are what it is for.
    "RAY_worker_niceness": "0",
}


class RayBackend:
    """Owns the connection to Ray. Not thread-safe, except that stop() may interrupt a start."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self.session = Session(uuid.uuid4().hex, None)
        self.durations_s: dict[str, float] = {}
        self._factory: Any = None
        self._spec: ClusterSpec | None = None
        self._controller_ping: Any = None
        self._serve_thread: threading.Thread | None = None
        self._serve_error: Exception | None = None
        self._serve_started = False
        self._is_stopping = False
        self._is_connected = False

    @property
    def own_ray(self) -> bool:
        return self._settings.address is None

    def connect(self) -> None:
        """Start Ray here, or join the cluster at the address. Raises StartError."""
        with self._timed("import ray"):
            # Without AUTO_CONNECT=0 a thread that still uses Ray while it is shut down would start another cluster.
            os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0"})
            if self.own_ray:
                os.environ.update(_OWN_RAY_ENV | PROXY_ENV | {SESSION_VARIABLE: self.session.mark})
            import ray
        # Starting Ray is mostly waiting for its processes: import meanwhile what is needed next.
        threading.Thread(target=_import_serve, name="import serve", daemon=True).start()
        options: dict[str, Any] = {"address": self._settings.address}
        if self.own_ray:
            options = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        self._is_connected = True
        with self._timed("start Ray" if self.own_ray else "join Ray"):
            try:
                ray.init(**options, namespace="shoal", log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
                reason = " ".join(str(error).split())[:500]
                place = "here" if self.own_ray else f"at {self._settings.address}"
                hint = "" if self.own_ray else " (is it running? if it wants a token: RAY_AUTH_MODE=token)"
                raise StartError(f"cannot use Ray {place}: {reason}{hint}") from error
        if self.own_ray:
            self.session = self.session._replace(folder=str(Path(self.log_folder).parent))
        _quiet_ray()

    def check_network(self) -> bool:
        """Whether processes may listen on loopback only. Nodes may join later, so an allowed network is used at once.

        Raises StartError if there are several nodes and the network between them is not allowed to be used.
        """
        import ray

        addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        is_allowed = self._settings.insecure_cluster_network or self._settings.cluster_tls_dir is not None
        if is_allowed and not self.own_ray:
            return False
        if len(addresses) > 1:
            raise StartError(
                f"this Ray cluster has {len(addresses)} nodes, and traffic between them would be unencrypted: give "
                "certificates with --cluster-tls-dir, or allow it with --insecure-cluster-network if the network is "
                "yours alone"
            )
        return False

    def share_gpus(self, spec: ClusterSpec) -> ClusterSpec:
        """The spec with what each actor gets of this Ray cluster's cards. Raises StartError, see gpu_share."""
        import ray

        num_gpus = ray.cluster_resources().get("GPU", 0)
        num_actors = len(spec.router_ids) + len(spec.replica_groups)
        share = compute_gpu_share(spec.device, num_gpus, num_actors)
        if num_gpus or share:
            logger.info("gpus=%g actors=%d gpus_per_actor=%g", num_gpus, num_actors, share)
        return replace(spec, gpus_per_actor=share)

    def create_actors(self, spec: ClusterSpec, token_hash: str, viewer_hash: str) -> None:
        """Create controller, replicas and routers without waiting for any. Raises StartError if a cluster is there."""
        from cluster.actor_factory import ActorFactory
        from cluster.node_placement import choose_node
        from cluster.record_store import RayRecordStore
        from cluster.records import SPEC_KEY

        with self._timed("create actors"):
            factory = ActorFactory(spec)
            if not self.own_ray and factory.list_existing():
                raise StartError("a Shoal cluster runs in this Ray cluster already: stop it first")
            store = RayRecordStore()
            store.delete_all()
            store.put(SPEC_KEY, spec.to_json())
            self._spec, self._factory = spec, factory
            # Routers take longest to start.
            for router_id in spec.router_ids:
                factory.create_router(router_id)
            node_ids = factory.list_nodes()
            occupied: dict[str, str] = {}
            for replica_id in spec.replica_groups:
                node_id = choose_node(replica_id, node_ids, occupied)
                factory.create_replica(replica_id, node_id)
                if node_id is not None:
                    occupied[replica_id] = node_id
            controller = factory.create_controller(
                self._settings.admin_host, self._settings.resolved_admin_port, token_hash, viewer_hash
            )
            self._controller_ping = controller.ping.remote()

    def poll_controller(self) -> None:
        """Raises StartError if the controller's constructor failed."""
        import ray
        from ray.exceptions import RayError

        done, _ = ray.wait([self._controller_ping], timeout=0)
        if done:
            try:
                ray.get(done[0], timeout=1)
            except RayError as error:
                reason = " ".join(str(error).split())[-500:]
                raise StartError(f"the controller did not start: {reason}") from error

    @property
    def log_folder(self) -> str:
        from ray._private.worker import global_worker

        node = global_worker.node
        return node.get_logs_dir_path() if node is not None else "unknown"

    def start_serve(self, api_settings: ApiSettings) -> None:
        """Start the HTTP front in a thread; poll_serve says when it is up. One that runs already is left as it is."""
        self._serve_thread = threading.Thread(target=self._run_serve, args=(api_settings,), name="serve", daemon=True)
        self._serve_thread.start()

    def poll_serve(self) -> bool:
        """Whether the HTTP front is up. Raises StartError if it cannot be."""
        if self._serve_error is not None:
            reason = " ".join(str(self._serve_error).split())[:1000]
            raise StartError(f"the HTTP front did not start: {reason}") from self._serve_error
        return self._serve_started

    def stop(self) -> list[int]:
        """End everything of ours. Returns the ids of the processes that had to be forced."""
        if not self._is_connected:
            return []
        import ray

        known = self._list_processes()
        if ray.is_initialized():
            with self._timed("stop the HTTP front"):
                self._stop_serve()
            if not self.own_ray:
                self._kill_actors()
            # Ray ends a process in which a thread uses it after the shutdown, and then nobody would look for the rest.
            if self._serve_thread is None or not self._serve_thread.is_alive():
                with self._timed("stop Ray"):
                    _run_bounded(ray.shutdown, _RAY_STOP_S)
        if not self.own_ray:
            return []
        with self._timed("wait for processes"):
            return reap(self.session, wait_s=2.0, known=known)

    def reap_now(self) -> None:
        """End every process of a local cluster at once, whatever it does."""
        if self.own_ray:
            reap(self.session, wait_s=0.0, term_s=0.2, known=self._list_processes())

    def _list_processes(self) -> set[psutil.Process]:
        """Of a local cluster. This process has no other children than Ray's."""
        if not self.own_ray:
            return set()
        return {*psutil.Process().children(recursive=True), *list_processes(self.session)}

    def _run_serve(self, api_settings: ApiSettings) -> None:
        try:
            with self._timed("import Ray Serve"):
                from ray import serve
                from ray.serve.config import HTTPOptions
                from ray.serve.schema import LoggingConfig

                from cluster.api_deployment import APPLICATION_NAME, build_application
            logging_config = LoggingConfig(log_level="WARNING", enable_access_log=False)
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            with self._timed("start Ray Serve"):
                serve.start(
                    proxy_location="HeadOnly",
                    # No request_timeout_s: the application has its own, which answers properly.
                    http_options=HTTPOptions(
                        host=self._settings.host,
                        port=self._settings.port,
                        ssl_certfile=_to_text(self._settings.tls_cert),
                        ssl_keyfile=_to_text(self._settings.tls_key),
                    ),
                    logging_config=logging_config,
                )
            if self._is_stopping:
                return
            if APPLICATION_NAME in serve.status().applications:
                self._serve_started = True
                return
            with self._timed("start the HTTP front"):
                serve.run(build_application(api_settings), name=APPLICATION_NAME, route_prefix="/")
            self._serve_started = True
        except Exception as error:
            self._serve_error = error

    def _stop_serve(self) -> None:
        from ray import serve

        def stop() -> None:
            if self.own_ray:
                serve.shutdown()
            else:
                from cluster.api_deployment import APPLICATION_NAME

                serve.delete(APPLICATION_NAME)
                if not serve.status().applications:
                    serve.shutdown()

        if self._serve_thread is None:
            return
        self._is_stopping = True
        # What is being started ends by itself, or by being stopped, which does nothing before there is something.
        self._serve_thread.join(_SERVE_START_S)
        _run_bounded(stop, _SERVE_STOP_S)
        self._serve_thread.join(_SERVE_START_S)

    def _kill_actors(self) -> None:
        from cluster.actor_factory import CONTROLLER_NAME
        from cluster.record_store import RayRecordStore

        if self._spec is None:
            return
        # The controller first: it would make the others again. What it made meanwhile is in no spec.
        self._factory.kill(CONTROLLER_NAME)
        for name in sorted(self._factory.list_existing()):
            self._factory.kill(name)
        with contextlib.suppress(ClusterError):
            RayRecordStore().delete_all()

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.durations_s[phase] = time.monotonic() - started_s
            logger.debug("phase=%r duration_s=%.2f", phase, self.durations_s[phase])


def _to_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _import_serve() -> None:
    import ray.serve
    import ray.serve.schema  # noqa: F401


def _run_bounded(function: Any, timeout_s: float) -> None:
    """Run in a thread and wait at most timeout_s: what hangs is ended by the reaper."""

    def run() -> None:
        try:
            function()
        except Exception as error:
            logger.debug("while stopping: %s", error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)


def _quiet_ray() -> None:
    """Ray prints a paragraph on our stdout whenever a process of an actor ends; the cluster's state says it in a line.

    There is no setting for it, so the private function is replaced, where this version of Ray has it.
    """
    from ray._private import worker

    def log(data: dict[str, Any], *_: Any, **__: Any) -> None:
        logger.debug("ray: %s", " ".join(str(data.get("lines")).split())[:500])

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = log
