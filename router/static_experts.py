"""An expert table without a controller: describe the replicas at known addresses, and again when one is lost.

For tests and debugging, where processes are started by hand. A replica that comes back at its address with the same
weights enters a new table under its new incarnation; one with other weights, or with others than its group's, is
refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc
import grpc.aio

from experts.channels import open_channel
from experts.expert_range import ExpertRange
from experts.tls import ClusterTls
from experts.v1 import experts_pb2 as pb
from experts.wire import DESCRIBE_METHOD, expert_ranges_from_proto
from router.expert_connection import CHANNEL_OPTIONS, DIAL_TIMEOUT_S
from router.expert_pool import ExpertPool
from router.expert_table import ExpertTable, GroupEntry, ReplicaEntry

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1


class StaticExperts:
    """Keeps a pool's table true to what answers at fixed endpoints."""

    def __init__(self, endpoints: Sequence[str], pool: ExpertPool, tls: ClusterTls | None = None) -> None:
        self._endpoints = tuple(endpoints)
        self._pool = pool
        self._tls = tls
        self._described: dict[str, pb.DescribeResponse] = {}
        # Incarnation last refused at an endpoint: told once, not at every look.
        self._refused: dict[str, int] = {}

    async def run(self) -> None:
        """Look while any endpoint has no connection; for ever."""
        while True:
            if len(self._pool.connected_replica_ids()) < len(self._endpoints):
                await self._look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self) -> None:
        connected = self._pool.connected_endpoints()
        endpoints = [endpoint for endpoint in self._endpoints if endpoint not in connected]
        answers = await asyncio.gather(*(self._describe(endpoint) for endpoint in endpoints))
        changed = False
        for endpoint, answer in zip(endpoints, answers, strict=True):
            known = self._described.get(endpoint)
            if answer is None or (known is not None and known.incarnation == answer.incarnation):
                continue
            if any(
                other.weight_digest != answer.weight_digest
                for other in self._described.values()
                if other is known or other.group_name == answer.group_name
            ):
                self._refuse(endpoint, answer)
                continue
            self._described[endpoint] = answer
            changed = True
        if changed:
            self._pool.apply(self._build_table())

    def _refuse(self, endpoint: str, answer: pb.DescribeResponse) -> None:
        if self._refused.get(endpoint) != answer.incarnation:
            self._refused[endpoint] = answer.incarnation
            logger.error(
                "replica refused endpoint=%s reason=its weights or experts are not those known of group %s",
                endpoint,
                answer.group_name,
            )

    async def _describe(self, endpoint: str) -> pb.DescribeResponse | None:
        async with open_channel(endpoint, self._tls, CHANNEL_OPTIONS) as channel:
            describe = channel.unary_unary(
                DESCRIBE_METHOD,
                request_serializer=pb.DescribeRequest.SerializeToString,
                response_deserializer=pb.DescribeResponse.FromString,
            )
            try:
                return await describe(pb.DescribeRequest(), timeout=DIAL_TIMEOUT_S)
            except grpc.RpcError:
                return None

    def _build_table(self) -> ExpertTable:
        """Groups in ascending order of what they host, so that sums do not depend on the order of the endpoints."""
        replicas: dict[str, list[ReplicaEntry]] = {}
        hosted: dict[str, tuple[ExpertRange, ...]] = {}
        for endpoint, answer in self._described.items():
            hosted.setdefault(answer.group_name, expert_ranges_from_proto(answer.hosted))
            replicas.setdefault(answer.group_name, []).append(
                ReplicaEntry(answer.replica_id, endpoint, answer.incarnation, answer.weight_digest, answer.numerics_id)
            )
        names = sorted(hosted, key=lambda name: hosted[name])
        return ExpertTable(
            version=self._pool.table.version + 1,
            groups=tuple(GroupEntry(name, hosted[name], tuple(replicas[name])) for name in names),
        )
