"""The Ray actors that hold a router and an expert group replica: thin shells around the classes of those packages.

They are threaded actors (synchronous methods), since a second of work in an async actor would stall the server that
it hosts. Ray places and restarts them and is not heard of again: tokens go over gRPC, addresses through the record
store. Heavy imports wait for __init__, so that naming a class here costs nothing.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from cluster.publisher import Publisher
from cluster.record_store import RayRecordStore
from cluster.records import ReplicaRecord, RouterRecord, replica_key, router_key
from cluster.spec import ClusterSpec, spec_from_json

logger = logging.getLogger(__name__)


class ExpertReplica:
    """One replica of one expert group. Restarted by Ray with the same arguments after a crash."""

    def __init__(self, spec_json: bytes, replica_id: str) -> None:
        spec = _start_process(spec_json)
        group = spec.get_group_of(replica_id)
        publisher = Publisher(
            RayRecordStore(),
            replica_key(replica_id),
            ReplicaRecord,
            actor_id=replica_id,
            node=_get_node_name(spec),
            node_id=_get_node_id(),
            group_name=group.name,
            hosted=group.hosted,
            weight_digest="",
            numerics_id="",
        )
        publisher.wait_turn()
        try:
            import torch

            from experts.allocator import keep_large_buffers
            from experts.checkpoint import Checkpoint
            from experts.device import resolve_device
            from experts.group import ExpertGroup
            from experts.server import ExpertServer, ReplicaIdentity
            from experts.tls import load_cluster_tls
            from experts.weights import load_expert_weights

            keep_large_buffers()
            torch.set_num_threads(spec.expert_threads)
            device = resolve_device(_get_device_setting(spec))
            with Checkpoint(Path(spec.checkpoint)) as checkpoint:
                weights = load_expert_weights(
                    checkpoint,
                    group.hosted,
                    getattr(torch, spec.dtype),
                    device=device,
                    on_fraction=publisher.show_progress,
                )
            loaded = ExpertGroup(weights)
            identity = ReplicaIdentity(group.name, replica_id, publisher.record.incarnation)
            # `shoal serve` has seen to it that an unencrypted network is allowed.
            tls = load_cluster_tls(spec.tls_dir)
            self._server = ExpertServer(loaded, identity, host=_get_listen_host(spec), tls=tls, allow_insecure=True)
            endpoint = self._server.start()
        except Exception as error:
            publisher.publish_failure(error)
            raise
        publisher.publish_ready(endpoint=endpoint, weight_digest=loaded.weight_digest, numerics_id=loaded.numerics_id)
        logger.info(
            "ready replica_id=%s endpoint=%s incarnation=%d", replica_id, endpoint, publisher.record.incarnation
        )

    def drain(self, grace_s: float) -> None:
        """Take no new frames; returns when those taken are answered, or after grace_s."""
        self._server.drain(grace_s)


class Router:
    """One router. Restarted by Ray with the same arguments after a crash."""

    def __init__(self, spec_json: bytes, router_id: str) -> None:
        spec = _start_process(spec_json)
        publisher = Publisher(
            RayRecordStore(),
            router_key(router_id),
            RouterRecord,
            actor_id=router_id,
            node=_get_node_name(spec),
            node_id=_get_node_id(),
        )
        publisher.wait_turn()
        try:
            import torch

            from experts.allocator import keep_large_buffers
            from experts.wire import WireFormat
            from router.heartbeat import HeartbeatOptions
            from router.server import RouterConfig, RouterServer

            keep_large_buffers()
            self._server = RouterServer(
                RouterConfig(
                    checkpoint=spec.checkpoint,
                    router_id=router_id,
                    host=_get_listen_host(spec),
                    dtype=getattr(torch, spec.dtype),
                    wire_format=WireFormat(spec.router.wire_dtype),
                    combine=spec.router.combine,
                    deterministic=spec.router.deterministic,
                    micro_batches=spec.router.micro_batches,
                    max_model_len=spec.router.max_model_len,
                    kv_cache_tokens=spec.router.kv_cache_tokens,
                    speculative_tokens=spec.router.speculative_tokens,
                    expert_wait_s=spec.router.expert_wait_s,
                    heartbeats=HeartbeatOptions(spec.router.heartbeat_s, spec.router.missed_heartbeats),
                    numerics=spec.router.numerics,
                    priority_ageing_s=spec.router.priority_ageing_s,
                    num_threads=spec.router.num_threads,
                    device=_get_device_setting(spec),
                    tls_dir=spec.tls_dir,
                    allow_insecure=True,
                )
            )
            # It listens before its weights are loaded: the expert table can come, and Status says how far it is.
            publisher.update(endpoint=self._server.start(), message="loading weights")
            self._server.wait_loaded()
        except Exception as error:
            publisher.publish_failure(error)
            raise
        publisher.publish_ready()
        logger.info("ready router_id=%s endpoint=%s", router_id, publisher.record.endpoint)

    def drain(self, timeout_s: float) -> int:
        """Take nothing new. Returns the number of sequences still running after timeout_s."""
        return self._server.drain(timeout_s)


def _start_process(spec_json: bytes) -> ClusterSpec:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    return spec_from_json(spec_json)


def _get_device_setting(spec: ClusterSpec) -> str:
    """A process without a share of a card must not take one that Ray gave to somebody else."""
    return spec.device if spec.gpus_per_actor else "cpu"


def _get_listen_host(spec: ClusterSpec) -> str:
    if spec.listen_on == "loopback":
        return "127.0.0.1"
    from ray.util import get_node_ip_address

    return get_node_ip_address()


def _get_node_name(spec: ClusterSpec) -> str:
    """The address where there are several nodes, as two of them may be on one machine."""
    return os.uname().nodename if spec.listen_on == "loopback" else _get_listen_host(spec)


def _get_node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()
