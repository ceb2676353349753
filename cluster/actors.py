"""The Ray actors that hold a router and an expert group replica: thin shells around the classes of those packages.

They are threaded actors (synchronous methods), since a second of work in an async actor would stall the server that
it hosts. Ray places and restarts them and is not heard of again: tokens go over gRPC, addresses through the record
store. Heavy imports wait for __init__, so that naming a class here costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.desired_state import begin, desired_from_json
from cluster.hosting import find_start_hosting, ranges_from_json
from cluster.publisher import Publisher
from cluster.record_store import RayRecordStore, RecordStore
from cluster.records import ReplicaRecord, RouterRecord, desired_key, replica_key, router_key, table_key
from cluster.spec import ClusterSpec, spec_from_json
from cluster.stored_table import memory_from_json
from experts.expert_range import ExpertRange
from experts.logs import set_up_logging
from router.expert_table import EMPTY_TABLE

if TYPE_CHECKING:
    from experts.weights import ExpertWeights

logger = logging.getLogger(__name__)

# Of the thread that loads experts while others are computed with; 19 is the most.
LOADER_NICENESS = 10


class ExpertReplica:
    """One replica of one expert group. Restarted by Ray with the same arguments after a crash."""

    def __init__(self, spec_json: bytes, replica_id: str) -> None:
        spec = _start_process(spec_json)
        group = spec.get_group_of(replica_id)
        store = RayRecordStore()
        publisher = Publisher(
            store,
            replica_key(replica_id),
            ReplicaRecord,
            actor_id=replica_id,
            node=_get_node_name(spec),
            node_id=_get_node_id(),
            weights_version=spec.weights_version,
            group_name=group.name,
            hosted=_find_hosted(spec, store, group.name),
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
            from experts.peer_copy import PeerCopies
            from experts.server import ExpertServer, ReplicaIdentity
            from experts.tls import load_cluster_tls
            from experts.weights import load_expert_weights

            keep_large_buffers()
            torch.set_num_threads(spec.expert_threads)
            device = resolve_device(_get_device_setting(spec))
            tls = load_cluster_tls(spec.tls_dir)
            with contextlib.ExitStack() as stack:
                checkpoint = stack.enter_context(Checkpoint(Path(spec.checkpoint)))
                peer = _find_peer(spec, store, group.name)
                weights = load_expert_weights(
                    checkpoint,
                    publisher.record.hosted,
                    getattr(torch, spec.dtype),
                    device=device,
                    on_fraction=publisher.show_progress,
                    copies=None if peer is None else stack.enter_context(contextlib.closing(PeerCopies(peer, tls))),
                )
            loaded = ExpertGroup(weights)
            identity = ReplicaIdentity(group.name, replica_id, publisher.record.incarnation)
            # `shoal serve` has seen to it that an unencrypted network is allowed.
            self._server = ExpertServer(
                loaded,
                identity,
                host=_get_listen_host(spec),
                tls=tls,
                allow_insecure=True,
                checkpoint=spec.checkpoint,
            )
            endpoint = self._server.start()
        except Exception as error:
            publisher.publish_failure(error)
            raise
        publisher.publish_ready(endpoint=endpoint, weight_digest=loaded.weight_digest, numerics_id=loaded.numerics_id)
        logger.info(
            "ready replica_id=%s endpoint=%s incarnation=%d", replica_id, endpoint, publisher.record.incarnation
        )

        self._spec = spec
        self._group = loaded
        self._publisher = publisher
        self._change_lock = threading.Lock()

    def host(self, hosted: bytes) -> None:
        """Hold exactly these experts (ranges_to_json) from now on; returns when it does. The others are served on.

        Raises an ExpertsError if they cannot be read or do not fit; then nothing has changed.
        """
        with self._change_lock:
            wanted = ranges_from_json(hosted)
            if wanted == self._publisher.record.hosted:
                return
            # In a thread of its own, which steps back for those that compute: nothing waits for this.
            with ThreadPoolExecutor(1, initializer=_step_back) as loader:
                weights = loader.submit(self._load, wanted).result()
            self._server.use_weights(weights)
            self._publisher.update(hosted=weights.hosted, weight_digest=weights.digest)
            logger.info("hosts other experts num_experts=%d", len(weights.expert_digests))

    def _load(self, hosted: tuple[ExpertRange, ...]) -> ExpertWeights:
        from experts.checkpoint import Checkpoint
        from experts.weights import change_hosted

        with Checkpoint(Path(self._spec.checkpoint)) as checkpoint:
            return change_hosted(self._group.weights, checkpoint, hosted)

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
            weights_version=spec.weights_version,
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
                    weights_version=spec.weights_version,
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
                    max_missing_experts=spec.router.max_missing_experts,
                    num_threads=spec.router.num_threads,
                    device=_get_device_setting(spec),
                    tls_dir=spec.tls_dir,
                    allow_insecure=True,
                    trace_to=spec.router.trace_to,
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


def _find_hosted(spec: ClusterSpec, store: RecordStore, group_name: str) -> tuple[ExpertRange, ...]:
    """What the controller wants a replica of the group to begin with. Raises StoreUnavailable or BadRecord."""
    desired, table = store.get(desired_key(spec.weights_version)), store.get(table_key(spec.weights_version))
    return find_start_hosting(
        group_name,
        begin(spec) if desired is None else desired_from_json(desired),
        EMPTY_TABLE if table is None else memory_from_json(table).table,
    )


def _find_peer(spec: ClusterSpec, store: RecordStore, group_name: str) -> str | None:
    """The address of a replica that serves what one of the group begins with; None: the disk is to be read."""
    data = store.get(table_key(spec.weights_version)) if spec.load_from == "peer" else None
    entry = None if data is None else memory_from_json(data).table.group(group_name)
    return None if entry is None or not entry.replicas else entry.replicas[0].endpoint


def _step_back() -> None:
    """Lower the priority of the calling thread, where there is such a thing."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADER_NICENESS)


def _start_process(spec_json: bytes) -> ClusterSpec:
    spec = spec_from_json(spec_json)
    set_up_logging(log_format=spec.log_format)
    return spec


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
