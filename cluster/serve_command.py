"""`shoal serve`: the whole life of a cluster in the foreground - check, start, wait until ready, drain, stop.

The first SIGINT or SIGTERM drains; a second one ends everything at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import psutil

from cluster.admin_app import hash_token
from cluster.admin_client import AdminClient
from cluster.errors import ClusterError, PreflightError, RequestFailed, StartError
from cluster.preflight import (
    check_headers,
    check_memory,
    check_port,
    measure_memory,
    resolve_checkpoint,
)
from cluster.process_reaper import Session, reap
from cluster.ray_backend import RayBackend
from cluster.settings import ServeSettings, load_settings, split_threads
from cluster.spec import ClusterSpec, RouterSpec, build_groups
from cluster.state_file import ClusterState, get_state_dir, read_stale, remove_state, write_state
from cluster.status_view import list_failures
from experts.errors import ExpertsError
from experts.logs import set_up_logging
from experts.model_config import ModelConfig
from experts.stop_signal import StopSignal
from router.api.settings import ApiSettings
from router.api.viewer import derive_viewer_token
from router.tenancy.errors import LedgerError
from router.tenancy.key_file import load_key_file
from router.tenancy.open_access import check_open_access

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.1
PROGRESS_INTERVAL_S = 5.0
WATCH_INTERVAL_S = 1.0
# A single failure may be bad luck; the third in a row of the same actor is not.
MAX_FAILED_STARTS = 3


class _Stopped(BaseException):
    """A signal arrived during the start. No Exception, so that nothing on the way takes it for a failure."""


class _Signals:
    """Counts SIGINT and SIGTERM. In the main thread only."""

    def __init__(self, backend: RayBackend) -> None:
        self._backend = backend
        self.stop = StopSignal()
        self.interrupts_start = True

    def install(self) -> None:
        """Again after ray.init, which puts its own handlers there."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.stop.is_set():
            print("forced: ending all processes", file=sys.stderr, flush=True)
            self._backend.reap_now()
            os._exit(128 + number)
        self.stop.set()
        if self.interrupts_start:
            raise _Stopped


def run(options: argparse.Namespace) -> int:
    """Serve until a signal. Returns the exit code; raises ClusterError or ExpertsError for what is wrong."""
    started_s = time.monotonic() - _get_process_age_s()
    settings = load_settings(options.settings, config_file=options.config)
    set_up_logging(settings.log_level, settings.log_format)
    _quiet_libraries()
    spec, api_settings = _check(settings)
    backend = RayBackend(settings)
    signals = _Signals(backend)
    signals.install()
    token = settings.admin_token.get_secret_value() if settings.admin_token is not None else secrets.token_urlsafe(32)
    state: ClusterState | None = None
    admin = AdminClient(settings.admin_url, token, settings.resolved_cluster_tls_dir)
    exit_code = 0
    try:
        deadline_s = time.monotonic() + settings.start_timeout_s
        backend.connect()
        signals.install()
        # Before it is ready: `shoal status` shows how far the start is.
        state = ClusterState(
            settings.url,
            settings.admin_url,
            token,
            os.getpid(),
            *backend.session,
            tls_dir=settings.resolved_cluster_tls_dir,
            ledger_url=settings.ledger_url,
            gpu_hour_price=settings.gpu_hour_price,
        )
        write_state_or_warn(state)
        viewer_token = derive_viewer_token(token)
        api_settings = replace(api_settings, viewer_token=viewer_token)
        _start(settings, spec, api_settings, backend, hash_token(token), hash_token(viewer_token))
        status = _wait_ready(settings, backend, signals, admin, deadline_s)
        _log_caches(status, spec)
        signals.interrupts_start = False
        print(
            f"Shoal is ready on {settings.url} (model {spec.model_name}, {len(spec.groups)} expert groups, "
            f"{time.monotonic() - started_s:.1f} s)",
            flush=True,
        )
        _watch(signals, admin)
        _drain(settings, admin)
    except (_Stopped, SystemExit):
        # SystemExit: while ray.init runs, its own handler of SIGTERM is in place.
        logger.info("stopped before it was ready")
    except (ClusterError, ExpertsError) as error:
        # Told before stopping, which takes seconds.
        print(f"error: {error}", file=sys.stderr, flush=True)
        exit_code = 1
    finally:
        signals.interrupts_start = False
        # From here on a single further signal forces the end, also after a failed start.
        signals.stop.set()
        if state is not None:
            remove_state(get_state_dir(), state)
        stopping_s = time.monotonic()
        forced = backend.stop()
        _collect_usage(api_settings)
        logger.info("stopped duration_s=%.1f forced_processes=%d", time.monotonic() - stopping_s, len(forced))
        admin.close()
    return exit_code


def _check(settings: ServeSettings) -> tuple[ClusterSpec, ApiSettings]:
    """Everything that can be found wrong before anything is started.

    Raises ClusterError, ExpertsError, TenancyError."""
    check_open_access(settings.host, has_keys=settings.keys_file is not None, is_allowed=not settings.auth)
    if settings.keys_file is not None:
        load_key_file(settings.keys_file)
    if settings.ledger_url is not None:
        from router.tenancy.ledger import Ledger

        Ledger(settings.ledger_url).close()
    folder, model_name = resolve_checkpoint(settings)
    report = check_headers(folder, settings.groups)
    config = ModelConfig.from_folder(folder)
    check_settings(settings, config)
    _reap_leftovers(settings)
    check_port(settings.host, settings.port, "--port")
    check_port(settings.admin_host, settings.resolved_admin_port, "--admin-port")
    need = measure_memory(settings, report)
    if settings.address is None:
        check_memory(need)
    spec = build_spec(settings, folder, model_name, config)
    # Only now: a start that is refused is one line.
    logger.info("settings %s", settings.describe())
    logger.info("device=%s cores=%d memory: %s", settings.device, _count_cores(), need)
    logger.info(
        "model=%s groups=%d replicas=%d routers=%d expert_threads=%d router_threads=%d api=%s admin=%s",
        model_name,
        settings.groups,
        settings.replicas,
        settings.routers,
        spec.expert_threads,
        spec.router.num_threads,
        settings.url,
        settings.admin_url,
    )
    return spec, build_api_settings(settings, folder, model_name)


def check_settings(settings: ServeSettings, config: ModelConfig) -> None:
    """Raises PreflightError for what this model cannot do."""
    if settings.max_model_len is not None and settings.max_model_len > config.max_position_embeddings:
        raise PreflightError(
            f"max_model_len is {settings.max_model_len}, but the checkpoint was made for at most "
            f"{config.max_position_embeddings} positions"
        )
    if settings.speculative_tokens and config.num_nextn_predict_layers == 0:
        raise PreflightError(
            f"speculative_tokens is {settings.speculative_tokens}, but the checkpoint has no MTP layer to draft with"
        )


def build_spec(settings: ServeSettings, folder: Path, model_name: str, config: ModelConfig) -> ClusterSpec:
    """What the cluster begins as, on loopback and without cards: those are found out from the Ray cluster."""
    threads = split_threads(settings, _count_cores())
    return ClusterSpec(
        model_name=model_name,
        checkpoint=str(folder),
        dtype=settings.dtype,
        groups=build_groups(config, settings.groups, settings.replicas),
        expert_threads=threads.expert_threads,
        router_ids=tuple(f"r{index}" for index in range(settings.routers)),
        router=RouterSpec(
            wire_dtype=settings.wire_dtype,
            combine=settings.combine,
            deterministic=settings.deterministic,
            micro_batches=settings.micro_batches,
            max_model_len=settings.max_model_len,
            speculative_tokens=settings.speculative_tokens,
            expert_wait_s=settings.expert_wait_s,
            heartbeat_s=settings.heartbeat_s,
            missed_heartbeats=settings.missed_heartbeats,
            numerics=settings.numerics,
            priority_ageing_s=settings.priority_ageing_s,
            max_missing_experts=settings.max_missing_experts,
            num_threads=threads.router_threads,
            kv_cache_tokens=settings.kv_cache_tokens,
            trace_to=settings.trace_to,
        ),
        listen_on="loopback",
        own_ray=settings.address is None,
        autoscale=tuple((pattern, rule.build_rule()) for pattern, rule in settings.autoscale.items()),
        autoscale_dry_run=settings.autoscale_dry_run,
        load_from=settings.load_from,
        rebalance_interval_s=settings.rebalance_interval_s,
        rebalance_extra_share=settings.rebalance_extra_share,
        device=settings.device,
        tls_dir=settings.resolved_cluster_tls_dir,
        log_format=settings.log_format,
    )


def build_api_settings(settings: ServeSettings, folder: Path, model_name: str) -> ApiSettings:
    return ApiSettings(
        checkpoint=folder,
        keys_file=None if settings.keys_file is None else settings.keys_file.absolute(),
        served_model_names=(model_name, *settings.split_aliases()),
        strict_fields=settings.strict_fields,
        reasoning_field=settings.reasoning_field,
        max_model_len=settings.max_model_len,
        usage_journal=None if settings.ledger_url is None else get_state_dir() / "journal",
        ledger_url=settings.ledger_url,
        ledger_retention_days=settings.ledger_retention_days,
        router_wait_s=settings.router_wait_s,
        cluster_tls_dir=settings.resolved_cluster_tls_dir,
        viewer_token=None
        if settings.admin_token is None
        else derive_viewer_token(settings.admin_token.get_secret_value()),
        metrics_compat=settings.metrics_compat,
        trace_to=settings.trace_to,
        trace_share=settings.trace_share,
        log_format=settings.log_format,
        host_sends_request_id=True,
    )


def _start(
    settings: ServeSettings,
    spec: ClusterSpec,
    api_settings: ApiSettings,
    backend: RayBackend,
    token_hash: str,
    viewer_hash: str,
) -> None:
    """Start everything at once; nothing is waited for."""
    if not backend.check_network():
        spec = replace(spec, listen_on="node")
    spec = backend.share_gpus(spec)
    backend.start_serve(api_settings)
    backend.create_actors(spec, token_hash, viewer_hash)


def _wait_ready(
    settings: ServeSettings, backend: RayBackend, signals: _Signals, admin: AdminClient, deadline_s: float
) -> dict[str, Any]:
    """The status in which it is ready. Raises StartError when it is pointless to wait longer."""
    progress = _ProgressLog()
    status: dict[str, Any] | None = None
    while not (status is not None and status["ready"] and backend.poll_serve() and _is_front_ready(settings)):
        if time.monotonic() > deadline_s:
            raise StartError(
                f"not ready after {settings.start_timeout_s:.0f} s: {progress.describe(status)} "
                "(raise start_timeout_s if loading simply takes longer)"
            )
        if signals.stop.wait(POLL_INTERVAL_S):
            raise _Stopped
        backend.poll_serve()
        backend.poll_controller()
        try:
            status = admin.fetch_status(timeout_s=2.0)
        except RequestFailed:
            # The controller is still starting, or starting again.
            continue
        if failures := list_failures(status, MAX_FAILED_STARTS):
            raise StartError(f"{'; '.join(failures)} (Ray's logs of this run: {backend.log_folder})")
        progress.show(status)
    _log_breakdown(backend, status)
    return status


def _log_caches(status: dict[str, Any], spec: ClusterSpec) -> None:
    """How much each router holds at once: what the memory left over decides, unless it was set."""
    max_model_len = spec.router.max_model_len or ModelConfig.from_folder(Path(spec.checkpoint)).max_position_embeddings
    for router in status["routers"]:
        if figures := router.get("figures"):
            num_tokens = figures["num_blocks"] * figures["block_size"]
            logger.info(
                "kv cache router=%s tokens=%d requests_at_full_length=%.1f max_model_len=%d",
                router["id"],
                num_tokens,
                num_tokens / max_model_len,
                max_model_len,
            )


def _is_front_ready(settings: ServeSettings) -> bool:
    """Whether a request would be served now, found by the way that requests take. Nothing is told to whoever answers,
    and its certificate is for the name that clients use."""
    try:
        return httpx.get(f"{settings.url}/health/ready", timeout=5.0, trust_env=False, verify=False).is_success
    except httpx.HTTPError:
        return False


def _watch(signals: _Signals, admin: AdminClient) -> None:
    """Until a signal: log what changes, so that the terminal tells of a replica that died and came back."""
    known: dict[str, str] | None = None
    while not signals.stop.wait(WATCH_INTERVAL_S):
        try:
            status = admin.fetch_status(timeout_s=2.0)
        except RequestFailed as error:
            logger.debug("watching: %s", error)
            continue
        items = _list_processes(status)
        states = {item["id"]: item["state"] for item in items}
        if known is not None:
            for item in items:
                if known.get(item["id"]) != item["state"]:
                    reason = _parenthesise(item["message"])
                    logger.info("%s is %s%s pid=%s", item["id"], item["state"], reason, item["pid"])
        known = states


class _ProgressLog:
    """A line about what is still waited for, every few seconds and whenever it changes."""

    def __init__(self) -> None:
        self._shown_s = time.monotonic()

    def show(self, status: dict[str, Any]) -> None:
        if time.monotonic() - self._shown_s >= PROGRESS_INTERVAL_S:
            self._shown_s = time.monotonic()
            logger.info("starting: %s", self.describe(status))

    def describe(self, status: dict[str, Any] | None) -> str:
        if status is None:
            return "the controller has not answered yet"
        items = _list_processes(status)
        waiting = [f"{item['id']} {item['state']}{_parenthesise(item['message'])}" for item in items]
        return ", ".join(line for line, item in zip(waiting, items, strict=True) if item["state"] != "ready") or (
            "the HTTP front is not up yet"
        )


def _drain(settings: ServeSettings, admin: AdminClient) -> None:
    print("draining: running requests may end; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
    try:
        num_running = admin.drain(settings.drain_timeout_s)
    except RequestFailed as error:
        logger.warning("not drained: %s", error)
        return
    if num_running:
        logger.warning(
            "requests cut off after drain_timeout_s=%g num_running=%d", settings.drain_timeout_s, num_running
        )


def _collect_usage(api_settings: ApiSettings) -> None:
    """What the front noted last: its writer may have ended with it."""
    if api_settings.usage_journal is None or api_settings.ledger_url is None:
        return
    from router.tenancy.ledger_writer import collect_once

    try:
        collect_once(api_settings.usage_journal, api_settings.ledger_url)
    except (LedgerError, OSError) as error:
        logger.warning("the last usage stays in the journal until the next start: %s", error)


def write_state_or_warn(state: ClusterState) -> None:
    try:
        write_state(get_state_dir(), state)
    except OSError as error:
        logger.warning("no state file, so `shoal status` will not find this cluster (set SHOAL_STATE_DIR): %s", error)


def _reap_leftovers(settings: ServeSettings) -> None:
    """A `shoal serve` that was killed outright may have left processes on our ports."""
    stale = read_stale(get_state_dir(), settings.url)
    if stale is None:
        return
    if pids := reap(Session(stale.session_mark, stale.session_folder), wait_s=0.0):
        logger.warning("ended processes that an earlier run on %s left behind pids=%s", settings.url, pids)


def _log_breakdown(backend: RayBackend, status: dict[str, Any]) -> None:
    """Where the start went: phases of this process, then of each actor (times overlap)."""
    for phase, duration_s in backend.durations_s.items():
        logger.debug("start: %-22s %5.1f s", phase, duration_s)
    now = time.time()
    for item in _list_processes(status):
        if item["started_at"] is not None and item["ready_at"] is not None:
            logger.debug(
                "start: %-22s %5.1f s, ready %.1f s ago",
                f"actor {item['id']}",
                item["ready_at"] - item["started_at"],
                now - item["ready_at"],
            )


def _list_processes(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Routers and replicas of a status object."""
    return [*status["routers"], *(replica for group in status["groups"] for replica in group["replicas"])]


def _quiet_libraries() -> None:
    """Their INFO lines are about themselves."""
    for name in ("httpx", "httpcore", "ray", "asyncio", "filelock", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _get_process_age_s() -> float:
    """Seconds since this process started, interpreter and imports included."""
    return max(0.0, time.time() - psutil.Process().create_time())


def _parenthesise(text: str) -> str:
    return f" ({text})" if text else ""
