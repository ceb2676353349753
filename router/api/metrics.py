"""GET /metrics: what this front counted, and what the routers say, for Prometheus.

Whoever shows the admin token sees all of it, and a team, of what is told by team, what is its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastapi import APIRouter, Request
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from starlette.responses import Response

from router.api.context import ApiContext, get_context
from router.api.request_use import get_current_use
from router.api.router_metrics import build_router_metrics
from router.api.vllm_metrics import add_vllm_names

routes = APIRouter()


@routes.get("/metrics")
async def get_metrics(request: Request) -> Response:
    families = await collect_metrics(get_context(request), get_current_use().only_team)
    return Response(generate_latest(_Families(families)), media_type=CONTENT_TYPE_PLAIN_0_0_4)  # pyright: ignore[reportArgumentType]


async def collect_metrics(context: ApiContext, only_team: str | None) -> Sequence[Metric]:
    """Routers that do not answer within status_timeout_s are said to be down; nothing else waits for them. only_team:
    leaves out the other teams' samples, also where their names would not show; None: all."""
    statuses = await context.statuses.get()
    families = [
        *context.metrics.registry.collect(),
        *build_router_metrics(
            context.metrics.model,
            {status.endpoint: status.status for status in statuses},
            context.settings.max_step_s,
        ),
    ]
    if only_team is not None:
        families = [_leave_out_others(family, only_team) for family in families]
    return add_vllm_names(families) if context.settings.metrics_compat == "vllm" else families


def _leave_out_others(family: Metric, team: str) -> Metric:
    kept = Metric(family.name, family.documentation, family.type)
    kept.samples = [sample for sample in family.samples if sample.labels.get("team", team) == team]
    return kept


class _Families:
    """As prometheus-client wants what it writes."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
