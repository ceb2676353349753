"""Names of the Ray resources that tie actors to pods: one of each per pod, and one actor takes it all."""

from __future__ import annotations

ROUTER_RESOURCE = "shoal_router"
_EXPERT_PREFIX = "expert_group_"


def expert_resource(group_name: str) -> str:
    return _EXPERT_PREFIX + group_name
