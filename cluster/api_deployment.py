"""The HTTP front as a Ray Serve deployment: Serve hosts the FastAPI application of router/api, nothing more.

Serve's limits lie above the application's own, so that a client turned away gets an OpenAI error body with Retry-After
and not Serve's plain text.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.record_store import RecordStore
from cluster.records import SPEC_KEY
from cluster.spec import spec_from_json
from experts.allocator import return_freed_memory
from experts.logs import set_up_logging
from router.api.settings import ApiSettings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

APPLICATION_NAME = "shoal"
# Streams last minutes: health checks and models lists must still come through while all slots are taken.
_EXTRA_ONGOING_REQUESTS = 1024
_MAX_QUEUED_REQUESTS = 8192
# Longest life of a request. `shoal serve` drains first, so this is for a replica that Serve replaces.
_GRACEFUL_SHUTDOWN_S = 600.0


def build_application(settings: ApiSettings) -> Application:
    """The Serve application to run. It is built on the replica: no tokenizer is read or sent from here."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    def build() -> FastAPI:
        return_freed_memory()
        set_up_logging(log_format=settings.log_format, replaces=True)
        from cluster.admin_source import AdminSource
        from cluster.record_store import RayRecordStore
        from cluster.router_endpoints import RecordedEndpoints
        from router.api.app import create_app

        store = RayRecordStore()
        cluster = (
            None
            if settings.viewer_token is None
            else AdminSource(store, settings.viewer_token, settings.cluster_tls_dir)
        )
        return create_app(follow_upgrade(settings, store), RecordedEndpoints(store), cluster)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="api",
        num_replicas=1,
        max_ongoing_requests=settings.max_concurrent_requests + _EXTRA_ONGOING_REQUESTS,
        max_queued_requests=_MAX_QUEUED_REQUESTS,
        graceful_shutdown_timeout_s=_GRACEFUL_SHUTDOWN_S,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=10,
        health_check_timeout_s=30,
        # Beside the proxy, on Ray's head node: another node that is lost takes no stream along.
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    return deployment.bind()


def follow_upgrade(settings: ApiSettings, store: RecordStore) -> ApiSettings:
    """A front that is built after an upgrade reads the new checkpoint's files, which are the same, where the old folder
    is gone. Raises StoreUnavailable or BadRecord."""
    if settings.checkpoint.is_dir() or (data := store.get(SPEC_KEY)) is None:
        return settings
    return replace(settings, checkpoint=Path(spec_from_json(data).checkpoint))
