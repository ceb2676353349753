"""`shoal controller`: one of several controllers of a cluster on Kubernetes; the Lease says which of them leads.

Whoever leads joins Ray, sees to routers, expert groups and the HTTP front, and goes on where the last one ended; the
others wait. A leader that cannot renew its Lease does nothing until it can again; one that finds another in its place,
or whose loop hangs, ends, and Kubernetes starts it anew as one that waits.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

import uvicorn

from cluster.admin_app import create_admin_app, hash_token
from cluster.admin_tls import get_scheme, list_server_options
from cluster.controller import ControllerLoop
from cluster.controller_app import ControllerApp
from cluster.errors import BadRecord, ClusterError, PreflightError, SettingsError, StartError
from cluster.kubernetes_api import KubernetesApi, connect
from cluster.kubernetes_backend import KubernetesBackend, check_ray_cluster
from cluster.leader_lease import LeaderLease
from cluster.pod_plan import clamp
from cluster.preflight import check_headers, resolve_checkpoint
from cluster.ray_backend import RayBackend
from cluster.ray_node import RayNode
from cluster.records import CONTROLLER_KEY, SPEC_KEY, ControllerRecord
from cluster.serve_command import build_api_settings, build_spec, check_settings, write_state_or_warn
from cluster.settings import ServeSettings, load_settings
from cluster.spec import ClusterSpec, spec_from_json
from cluster.state_file import ClusterState, get_state_dir, remove_state
from cluster.worker_groups import RayClusterView
from experts.logs import set_up_logging
from experts.model_config import ModelConfig
from experts.tls import load_cluster_tls
from router.api.settings import ApiSettings
from router.api.viewer import derive_viewer_token
from router.tenancy.open_access import check_open_access

logger = logging.getLogger(__name__)

_POLL_S = 0.1
# As in cluster/controller_actor.py: a turn takes milliseconds, its calls end after their deadlines.
_MAX_TURN_S = 90.0
# A standby is of use if the API server has answered it within this.
_MAX_SILENCE_S = 30.0


def run(options: argparse.Namespace) -> NoReturn:
    """Until SIGTERM or SIGINT; ends the process itself. Raises ClusterError or ExpertsError for what is wrong."""
    settings = load_settings(options.settings, config_file=options.config)
    set_up_logging(settings.log_level, settings.log_format)
    for name in ("httpx", "httpcore", "ray", "asyncio", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    spec, api_settings = _check(settings)
    assert settings.kubernetes_cluster is not None  # _check has refused that
    api = connect(settings.kubernetes_namespace, settings.kubernetes_cluster)
    view = check_ray_cluster(api, [group.name for group in spec.groups], settings.kubernetes_scaling)
    spec = fit_replicas(spec, view)
    asyncio.run(_Command(settings, spec, api_settings, api).run())
    raise ClusterError("the controller's loop ended, and its process did not")


def _check(settings: ServeSettings) -> tuple[ClusterSpec, ApiSettings]:
    """Everything that can be found wrong before the Lease is asked for. The file of keys is where the HTTP front is.

    Raises ClusterError, ExpertsError, TenancyError."""
    if settings.kubernetes_cluster is None:
        raise SettingsError("kubernetes_cluster is not set: name the RayCluster that `shoal controller` is for")
    if settings.address is None:
        raise SettingsError("address is not set: give HOST:PORT of the Ray head's GCS, or auto if a Ray node runs here")
    if settings.kubernetes_gpus_per_pod == 0 and settings.device == "cuda":
        raise SettingsError("device is cuda, but kubernetes_gpus_per_pod is 0: set it to the GPUs that a pod has")
    check_open_access(settings.host, has_keys=settings.keys_file is not None, is_allowed=not settings.auth)
    folder, model_name = resolve_checkpoint(settings)
    check_headers(folder, settings.groups)
    config = ModelConfig.from_folder(folder)
    check_settings(settings, config)
    spec = replace(
        build_spec(settings, folder, model_name, config),
        on_pods=True,
        listen_on="node",
        gpus_per_actor=settings.kubernetes_gpus_per_pod,
    )
    if not settings.insecure_cluster_network and load_cluster_tls(spec.tls_dir) is None:
        raise PreflightError(
            "routers and expert groups are in different pods, and traffic between them would be unencrypted: give "
            "certificates with cluster_tls_dir, or allow it with insecure_cluster_network if the network is yours alone"
        )
    return spec, build_api_settings(settings, folder, model_name)


def fit_replicas(spec: ClusterSpec, view: RayClusterView) -> ClusterSpec:
    """Each group begins with as many replicas as the settings say, within the bounds of its own worker group."""
    bounds = {group.name: group for group in view.groups}
    groups = tuple(replace(each, num_replicas=clamp(bounds[each.name], each.num_replicas)) for each in spec.groups)
    return replace(spec, groups=groups)


class _Server(uvicorn.Server):
    """Signals are the command's: the Lease is handed over before the port closes."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Command:
    """Lives on one event loop."""

    def __init__(
        self, settings: ServeSettings, spec: ClusterSpec, api_settings: ApiSettings, api: KubernetesApi
    ) -> None:
        self._settings = settings
        self._spec = spec
        self._api_settings = api_settings
        self._api = api
        # A pod's name and address; elsewhere the process.
        self._host = os.environ.get("POD_IP") or "127.0.0.1"
        name = os.environ.get("POD_NAME") or f"{os.uname().nodename}-{os.getpid()}"
        identity = f"{name}_{self._host}:{settings.resolved_admin_port}"
        self._lease = LeaderLease(api, settings.resolved_kubernetes_lease, identity, time.monotonic)
        self._token = _get_token(settings)
        # For `shoal status` and the like in this container, whoever leads. No process of Ray's is ours to reap.
        self._scheme = get_scheme(spec.tls_dir)
        admin_url = f"{self._scheme}://127.0.0.1:{settings.resolved_admin_port}"
        self._state = ClusterState(
            settings.url, admin_url, self._token, os.getpid(), uuid.uuid4().hex, None, spec.tls_dir
        )
        self._app = ControllerApp(self._is_live, self._is_ready, self._find_leader, spec.tls_dir)
        self._loop: ControllerLoop | None = None
        self._led_s: float | None = None
        self._node: RayNode | None = None
        self._stop = asyncio.Event()

    async def run(self) -> NoReturn:
        """Until a signal, or until only a new process can go on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        config = uvicorn.Config(
            self._app,
            host=self._settings.admin_host,
            port=self._settings.resolved_admin_port,
            log_level="warning",
            access_log=False,
            lifespan="off",
            **list_server_options(self._spec.tls_dir),
        )
        server = _Server(config)
        tasks = [asyncio.create_task(server.serve()), asyncio.create_task(self._lead())]
        stop = asyncio.create_task(self._stop.wait())
        write_state_or_warn(self._state)
        self._lease.start()
        done, _ = await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
        exit_code = 0
        for task in done - {stop}:
            exit_code = 1
            error = task.exception() or "its loop or its admin server ended"
            logger.error("the controller ends: %s", error, exc_info=not isinstance(error, ClusterError | str))
        # No turn begins any more once the Lease is not held.
        await asyncio.to_thread(self._lease.release)
        if self._node is not None:
            self._node.stop()
        remove_state(get_state_dir(), self._state)
        logging.shutdown()
        # Calls into Ray that hang have threads that would be waited for, and another controller may lead by now.
        os._exit(exit_code)

    async def _lead(self) -> None:
        """Wait for the Lease, then control. Ends only by raising."""
        while not self._lease.acquired.is_set():
            await asyncio.sleep(_POLL_S)
        self._led_s = time.monotonic()
        backend = KubernetesBackend(self._api, self._settings.kubernetes_scaling, self._lease.is_held)
        backend.start()
        try:
            ray_backend = await asyncio.to_thread(self._join_ray)
            loop, record = await asyncio.to_thread(self._prepare, backend)
            self._loop = loop
            viewer_hash = hash_token(derive_viewer_token(self._token))
            self._app.admin = create_admin_app(loop, hash_token(self._token), viewer_hash)
            logger.info("leading pid=%d admin=%s", record.pid, record.admin_url)
            turns = asyncio.create_task(loop.run())
            while True:
                self._check_health(ray_backend)
                if turns.done():
                    turns.result()
                await asyncio.sleep(_POLL_S)
        finally:
            backend.stop()

    def _join_ray(self) -> RayBackend:
        if self._settings.address != "auto":
            assert self._settings.address is not None  # _check has refused that
            self._node = RayNode(self._settings.address, os.environ.get("POD_IP"))
            self._node.wait_up()
        ray_backend = RayBackend(self._settings)
        ray_backend.connect()
        ray_backend.start_serve(self._api_settings)
        return ray_backend

    def _prepare(self, backend: KubernetesBackend) -> tuple[ControllerLoop, ControllerRecord]:
        """Raises StartError if what runs here already was cut otherwise."""
        from cluster.actor_factory import ActorFactory
        from cluster.probes import Probes
        from cluster.record_store import RayRecordStore

        store = RayRecordStore()
        serving = take_over(store.get(SPEC_KEY), self._spec)
        store.put(SPEC_KEY, serving.to_json())
        record = ControllerRecord(
            pid=os.getpid(),
            node=os.uname().nodename,
            admin_url=f"{self._scheme}://{self._host}:{self._settings.resolved_admin_port}",
        )
        store.put(CONTROLLER_KEY, record.to_json())
        loop = ControllerLoop(
            serving,
            store,
            ActorFactory(serving),
            Probes(load_cluster_tls(self._spec.tls_dir)),
            time.monotonic,
            time.time,
            backend,
            self._lease.is_held,
            wanted_checkpoint=self._spec.checkpoint,
        )
        return loop, record

    def _check_health(self, ray_backend: RayBackend) -> None:
        """Raises StartError when only a new process can go on."""
        if self._lease.lost.is_set():
            raise StartError("another controller leads now")
        if self._node is not None and not self._node.is_running:
            raise StartError("the Ray node of this container has ended")
        if not self._is_live():
            raise StartError(f"the controller's loop has not turned for {_MAX_TURN_S:.0f} s")
        ray_backend.poll_serve()

    def _is_live(self) -> bool:
        if self._loop is None:
            return True
        turned_s = self._loop.turned_s or self._led_s
        return turned_s is None or time.monotonic() - turned_s < _MAX_TURN_S

    def _is_ready(self) -> bool:
        answered_s = self._lease.answered_s
        return answered_s is not None and time.monotonic() - answered_s < _MAX_SILENCE_S

    def _find_leader(self) -> str | None:
        """The identity of a leader ends in its admin port's address."""
        holder = self._lease.get_holder()
        return holder.rpartition("_")[2] if holder and "_" in holder else None


def _get_token(settings: ServeSettings) -> str:
    if settings.admin_token is not None:
        return settings.admin_token.get_secret_value()
    logger.warning("SHOAL_ADMIN_TOKEN is not set: only commands in this container can use the admin API")
    return secrets.token_urlsafe(32)


def take_over(stored: bytes | None, spec: ClusterSpec) -> ClusterSpec:
    """What goes on to serve, with these settings: the checkpoint that runs here already, until it is upgraded to that
    of the settings. Raises StartError if what runs here was cut otherwise."""
    if stored is None:
        return spec
    try:
        before = spec_from_json(stored)
    except BadRecord as error:
        logger.warning("taking over without the spec of before: %s", error)
        return spec
    # Another checkpoint may be of another shape; the pods of its groups have the same names.
    is_same = before.checkpoint == spec.checkpoint
    cuts = [[(group.name, group.hosted if is_same else ()) for group in each.groups] for each in (before, spec)]
    if cuts[0] != cuts[1]:
        raise StartError(
            f"this Ray cluster runs {len(before.groups)} expert groups that are cut otherwise than the settings say: "
            "install another release beside it, move the traffic, and remove this one"
        )
    return replace(
        spec,
        checkpoint=before.checkpoint,
        weights_version=before.weights_version,
        groups=spec.groups if is_same else before.groups,
        # An upgrade has given them other ids.
        router_ids=(*before.router_ids, *(id_ for id_ in spec.router_ids if id_ not in before.router_ids))[
            : len(spec.router_ids)
        ],
    )
