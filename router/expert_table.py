"""The versioned map (layer, expert) -> live group replicas, as plain data.

The controller writes it and pushes it; a router only reads it. It knows no connection and no clock.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from experts.expert_range import ExpertRange
from router.v1 import router_pb2 as pb

# A power of two. Enough for an expert's hosts to be asked about equally often, whatever their number.
NUM_TURNS = 16


class ProcessKey(NamedTuple):
    """One start of one replica. What it hosts, and so its digest, may change while it lives."""

    replica_id: str
    endpoint: str
    incarnation: int


@dataclass(frozen=True)
class ReplicaEntry:
    """One actor serving a group. incarnation and weight_digest say exactly which process and weights are meant."""

    replica_id: str
    endpoint: str
    incarnation: int
    weight_digest: str
    numerics_id: str

    @property
    def process(self) -> ProcessKey:
        return ProcessKey(self.replica_id, self.endpoint, self.incarnation)


@dataclass(frozen=True)
class GroupEntry:
    """An expert group: the rectangles of (layer, expert) it hosts and the replicas that serve them now."""

    name: str
    hosted: tuple[ExpertRange, ...]
    replicas: tuple[ReplicaEntry, ...]


@dataclass(frozen=True)
class ExpertTable:
    """groups are in the order in which their partial sums are added."""

    version: int
    groups: tuple[GroupEntry, ...]

    @functools.cached_property
    def group_names(self) -> tuple[str, ...]:
        return tuple(group.name for group in self.groups)

    def group(self, name: str) -> GroupEntry | None:
        return next((group for group in self.groups if group.name == name), None)

    def expert_groups(self, layer_id: int, n_routed_experts: int, turn: int = 0) -> npt.NDArray[np.int64]:
        """Which group serves each expert of a layer: [n_routed_experts] indices into groups, -1 where none does.

        Of the k groups that host expert e, in table order, number (e + turn) mod k serves it. So a table and a turn
        give one plan, neighbours go to different hosts, and turns one after another ask each host equally often.
        """
        hosted = np.zeros((max(1, len(self.groups)), n_routed_experts), dtype=bool)
        for index, start, end in self._ranges_by_layer.get(layer_id, ()):
            hosted[index, start:end] = True
        num_hosts = hosted.sum(axis=0)
        wanted = (np.arange(n_routed_experts) + turn) % np.maximum(1, num_hosts)
        rank = np.cumsum(hosted, axis=0) - 1  # [num_groups, n_routed_experts], of a host among the hosts
        chosen = (hosted & (rank == wanted)).argmax(axis=0)
        return np.where(num_hosts > 0, chosen, -1).astype(np.int64)

    def expert_turns(self, layer_id: int, n_routed_experts: int) -> npt.NDArray[np.int64]:
        """[num_turns, n_routed_experts]: expert_groups for each turn that is planned with (dispatch_plan.plan_frames).

        One turn where no expert has several hosts, else NUM_TURNS.
        """
        first = self.expert_groups(layer_id, n_routed_experts)
        second = self.expert_groups(layer_id, n_routed_experts, 1)
        if (first == second).all():
            return first[None]
        return np.stack([self.expert_groups(layer_id, n_routed_experts, turn) for turn in range(NUM_TURNS)])

    @functools.cached_property
    def _ranges_by_layer(self) -> dict[int, list[tuple[int, int, int]]]:
        """(group index, first expert, end) of each rectangle, for each layer it covers. A rebalanced placement has
        thousands of rectangles, so they are not looked through for every layer."""
        ranges: dict[int, list[tuple[int, int, int]]] = {}
        for index, group in enumerate(self.groups):
            for block in group.hosted:
                for layer_id in range(block.layer_start, block.layer_end):
                    ranges.setdefault(layer_id, []).append((index, block.expert_start, block.expert_end))
        return ranges

    def missing(self, layer_ids: Sequence[int], n_routed_experts: int) -> list[tuple[int, int]]:
        """(layer, expert) pairs that no group hosts."""
        pairs: list[tuple[int, int]] = []
        for layer_id in layer_ids:
            absent = np.nonzero(self.expert_groups(layer_id, n_routed_experts) < 0)[0]
            pairs.extend((layer_id, int(expert)) for expert in absent)
        return pairs


EMPTY_TABLE = ExpertTable(version=0, groups=())


def table_from_proto(message: pb.ExpertTable) -> ExpertTable:
    """Replicas that are not ready are left out: a router sends frames to ready ones only.

    Raises ConfigError for a range that is empty.
    """
    return ExpertTable(
        version=message.version,
        groups=tuple(
            GroupEntry(
                name=group.name,
                hosted=tuple(
                    ExpertRange(r.layer_start, r.layer_end, r.expert_start, r.expert_end) for r in group.hosted
                ),
                replicas=tuple(
                    ReplicaEntry(r.replica_id, r.endpoint, r.incarnation, r.weight_digest, r.numerics_id)
                    for r in group.replicas
                    if r.state == pb.REPLICA_STATE_READY
                ),
            )
            for group in message.groups
        ),
    )


def table_to_proto(table: ExpertTable) -> pb.ExpertTable:
    message = pb.ExpertTable(version=table.version)
    for group in table.groups:
        entry = message.groups.add(name=group.name)
        for hosted in group.hosted:
            entry.hosted.add(
                layer_start=hosted.layer_start,
                layer_end=hosted.layer_end,
                expert_start=hosted.expert_start,
                expert_end=hosted.expert_end,
            )
        for replica in group.replicas:
            entry.replicas.add(
                replica_id=replica.replica_id,
                endpoint=replica.endpoint,
                incarnation=replica.incarnation,
                weight_digest=replica.weight_digest,
                numerics_id=replica.numerics_id,
                state=pb.REPLICA_STATE_READY,
            )
    return message
