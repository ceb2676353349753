"""What a cluster begins as: the expert groups, their replicas and the routers. Plain data, written once by
`shoal serve` and read back by a restarted controller.

How many replicas there should be later is cluster/desired_state.py, what there is cluster/records.py, and
cluster/planner.py compares the two.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cluster.autoscaler import AutoscaleRule
from cluster.errors import BadRecord
from experts.expert_range import ExpertRange, split_experts
from experts.logs import LogFormat
from experts.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """One expert group: the rectangles of (layer, expert) pairs it hosts, and how many replicas it begins with."""

    name: str
    hosted: tuple[ExpertRange, ...]
    num_replicas: int

    @property
    def replica_ids(self) -> tuple[str, ...]:
        return tuple(f"{self.name}-{index}" for index in range(self.num_replicas))


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """Settings that every router shares; None means what the field of ServeSettings says."""

    wire_dtype: str
    combine: Literal["reduced", "exact"]
    deterministic: bool | None
    micro_batches: Literal["auto", "off"] | int
    max_model_len: int | None
    speculative_tokens: int | None
    expert_wait_s: float
    num_threads: int
    kv_cache_tokens: int | None = None
    heartbeat_s: float = 0.2
    missed_heartbeats: int = 3
    priority_ageing_s: float = 60.0
    numerics: Literal["sticky", "uniform", "mixed"] = "sticky"
    max_missing_experts: int = 0
    trace_to: str | None = None


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """The whole cluster. checkpoint is an absolute folder that every node can read."""

    model_name: str
    checkpoint: str
    dtype: Literal["bfloat16", "float32"]
    groups: tuple[GroupSpec, ...]
    expert_threads: int
    router_ids: tuple[str, ...]
    router: RouterSpec
    # Loopback only, or the node's own address in the Ray cluster.
    listen_on: Literal["loopback", "node"]
    # The Ray cluster was started by `shoal serve` itself, so processes inherit its environment.
    own_ray: bool
    # Group name pattern -> rule, the first match counts; groups without one keep their number of replicas.
    autoscale: tuple[tuple[str, AutoscaleRule], ...] = ()
    # Decide and say so, but change nothing.
    autoscale_dry_run: bool = False
    # How often the balancer looks by itself (None: never), and which part of memory it may use for further copies.
    rebalance_interval_s: float | None = None
    rebalance_extra_share: float = 0.12
    # Where a replica gets its experts when another one of its group lives.
    load_from: Literal["disk", "peer"] = "disk"
    # Where routers and replicas compute, and what each asks Ray for (cluster/gpu_share.py).
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus_per_actor: float = 0.0
    # Each actor asks for the resource of its pods (cluster/pod_resources.py), and Ray finds the node; else we do.
    on_pods: bool = False
    # Folder of certificates on every node, for the network of routers, replicas and controller; None: unencrypted.
    tls_dir: str | None = None
    log_format: LogFormat = "text"
    # Rises with every upgrade to another checkpoint; whoever has another one has nothing to do with these.
    weights_version: int = 1

    @property
    def replica_groups(self) -> dict[str, GroupSpec]:
        """Group of every replica id that the cluster begins with, in table order."""
        return {replica_id: group for group in self.groups for replica_id in group.replica_ids}

    def get_group_of(self, replica_id: str) -> GroupSpec:
        """Raises ValueError if the id is none of this cluster's."""
        name, _ = parse_replica_id(replica_id)
        for group in self.groups:
            if group.name == name:
                return group
        raise ValueError(f"replica id {replica_id!r} names no group of this cluster")

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def parse_replica_id(replica_id: str) -> tuple[str, int]:
    """Group name and number within the group. Raises ValueError if it is no replica id."""
    name, _, index = replica_id.rpartition("-")
    if not name or not index.isascii() or not index.isdigit():
        raise ValueError(f"{replica_id!r} is no replica id: those look like g0-1")
    return name, int(index)


def build_groups(config: ModelConfig, num_groups: int, num_replicas: int) -> tuple[GroupSpec, ...]:
    """Cut the model's experts into groups g0, g1, ... Raises ConfigError if it has fewer experts than that."""
    ranges = split_experts(config, num_groups)
    return tuple(GroupSpec(f"g{index}", hosted, num_replicas) for index, hosted in enumerate(ranges))


def spec_from_json(data: bytes) -> ClusterSpec:
    """Raises BadRecord if the bytes were written by another program or version."""
    try:
        values: dict[str, Any] = json.loads(data)
        groups = tuple(
            GroupSpec(
                name=group["name"],
                hosted=tuple(ExpertRange(**block) for block in group["hosted"]),
                num_replicas=group["num_replicas"],
            )
            for group in values.pop("groups")
        )
        return ClusterSpec(
            groups=groups,
            router_ids=tuple(values.pop("router_ids")),
            router=RouterSpec(**values.pop("router")),
            autoscale=tuple((pattern, AutoscaleRule(**rule)) for pattern, rule in values.pop("autoscale")),
            **values,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRecord(f"the stored cluster spec cannot be read: {error}") from error
