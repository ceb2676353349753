"""Experts' bytes from a replica that lives, over gRPC, instead of from the disk.

A replica gives an expert as the checkpoint has it, one message per tensor, together with the digest that it computed
when it loaded the expert itself; whoever copies compares. So a replica whose disk is slow, or far away, starts at the
speed of the network, and with nothing else than what it would have read. A peer that is gone, or gives something else,
costs nothing but a line in the log: from then on the disk is read.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing

import grpc
import numpy as np

from experts.channels import open_blocking_channel
from experts.checkpoint import Checkpoint, TensorInfo
from experts.errors import NotHosted
from experts.tls import ClusterTls
from experts.v1 import experts_pb2, experts_pb2_grpc
from experts.weights import ExpertWeights, Pair, list_stored_tensors
from experts.wire import MAX_MESSAGE_BYTES

logger = logging.getLogger(__name__)

# For one expert: 44 MB at the published sizes, over 1 GbE in half a second.
FETCH_TIMEOUT_S = 60.0
_OPTIONS = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.enable_retries", 0))


class PeerCopies:
    """A source of experts' bytes; safe to use from several threads. Close it (contextlib.closing)."""

    def __init__(self, endpoint: str, tls: ClusterTls | None = None) -> None:
        """endpoint: host:port of a replica that hosts what will be asked for. tls: None: unencrypted."""
        self._endpoint = endpoint
        self._channel = open_blocking_channel(endpoint, tls, _OPTIONS)
        self._stub = experts_pb2_grpc.ExpertServiceStub(self._channel)
        self._lock = threading.Lock()
        self._is_lost = False
        self.num_copied = 0

    def read_into(self, pair: Pair, tensors: Sequence[TensorInfo], places: Sequence[np.ndarray]) -> bool:
        """Fill the places, uint8, as long as the tensors. False if the peer cannot: they hold nothing of use then."""
        if self._is_lost:
            return False
        try:
            self._fetch(pair, tensors, places)
        except (grpc.RpcError, ValueError) as error:
            reason = error.code().name if isinstance(error, grpc.Call) else str(error)
            with self._lock:
                if not self._is_lost:
                    logger.warning("reading from disk from here on: peer %s: %s", self._endpoint, reason)
                self._is_lost = True
            return False
        with self._lock:
            self.num_copied += 1
        return True

    def close(self) -> None:
        self._channel.close()

    def _fetch(self, pair: Pair, tensors: Sequence[TensorInfo], places: Sequence[np.ndarray]) -> None:
        """Raises grpc.RpcError, or ValueError for anything but what was asked for."""
        digest = hashlib.sha256()
        claimed = b""
        remaining = iter(zip(tensors, places, strict=True))
        request = experts_pb2.FetchExpertRequest(layer_id=pair[0], expert_id=pair[1])
        for piece in self._stub.FetchExpert(request, timeout=FETCH_TIMEOUT_S):
            info, place = next(remaining, (None, None))
            found = piece.name, piece.dtype, tuple(piece.shape)
            if info is None or place is None or found != (info.name, info.dtype, info.shape):
                raise ValueError(f"expert {pair}: got {found}, expected {info}")
            if len(piece.data) != info.size_bytes:
                raise ValueError(f"expert {pair}: {info.name} has {len(piece.data)} bytes, expected {info.size_bytes}")
            place[:] = np.frombuffer(piece.data, dtype=np.uint8)
            digest.update(piece.data)
            claimed = piece.expert_digest
        if next(remaining, None) is not None:
            raise ValueError(f"expert {pair}: a tensor is missing")
        if digest.digest() != claimed:
            raise ValueError(f"expert {pair}: the bytes are not those that the peer loaded")


def give_expert(weights: ExpertWeights, folder: str, pair: Pair) -> Iterator[experts_pb2.FetchExpertResponse]:
    """The tensors of an expert, sorted by name, as folder's checkpoint has them. Raises NotHosted, CheckpointError."""
    expert_digest = weights.expert_digests.get(pair)
    if expert_digest is None:
        raise NotHosted(f"layer {pair[0]}, expert {pair[1]} is not hosted here")
    with closing(Checkpoint(folder)) as checkpoint:
        for info in list_stored_tensors(checkpoint, *pair):
            yield experts_pb2.FetchExpertResponse(
                name=info.name,
                dtype=info.dtype,
                shape=info.shape,
                data=checkpoint.read_raw(info.name).tobytes(),
                expert_digest=expert_digest,
            )
