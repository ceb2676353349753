"""gRPC channels and servers of the cluster's network, with mutual TLS where there are certificates.

A server asks for its certificate at every handshake. grpcio cannot give an open channel another one, so a channel that
lasts is opened again when the files have changed, and what runs on the old one ends there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from experts.tls import PEER_NAME, ClusterTls

_Stub = TypeVar("_Stub")

ChannelOptions = Sequence[tuple[str, int]]

# What runs on a channel when the certificates are renewed gets this long: a whole answer.
RENEWAL_GRACE_S = 600.0


def open_channel(endpoint: str, tls: ClusterTls | None, options: ChannelOptions) -> grpc.aio.Channel:
    """endpoint: host:port. tls: None: unencrypted."""
    if tls is None:
        return grpc.aio.insecure_channel(endpoint, options=options)
    return grpc.aio.secure_channel(endpoint, _make_channel_credentials(tls), options=_name_peer(options))


def open_blocking_channel(endpoint: str, tls: ClusterTls | None, options: ChannelOptions) -> grpc.Channel:
    """open_channel() for threads."""
    if tls is None:
        return grpc.insecure_channel(endpoint, options=options)
    return grpc.secure_channel(endpoint, _make_channel_credentials(tls), options=_name_peer(options))


def _make_channel_credentials(tls: ClusterTls) -> grpc.ChannelCredentials:
    files = tls.files
    return grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)


def _name_peer(options: ChannelOptions) -> list[tuple[str, Any]]:
    return [*options, ("grpc.ssl_target_name_override", PEER_NAME)]


def listen(server: grpc.aio.Server, address: str, tls: ClusterTls | None) -> int:
    """Add a port to a server; returns it. Raises RuntimeError if it is taken."""
    if tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, _make_server_credentials(tls))


class LastingChannel(Generic[_Stub]):
    """A channel to one endpoint and its stub. Used on one event loop."""

    def __init__(
        self,
        endpoint: str,
        tls: ClusterTls | None,
        options: ChannelOptions,
        make_stub: Callable[[grpc.aio.Channel], _Stub],
    ) -> None:
        self._endpoint = endpoint
        self._tls = tls
        self._options = options
        self._make_stub = make_stub
        self._closing: set[asyncio.Task[None]] = set()
        self._open()

    @property
    def stub(self) -> _Stub:
        """To call now: a later call may need another one."""
        if self._tls is not None and self._tls.version != self._version:
            task = asyncio.get_running_loop().create_task(self._channel.close(RENEWAL_GRACE_S))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self._open()
        return self._stub

    def get_state(self, *, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect=try_to_connect)

    async def close(self) -> None:
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._channel.close()

    def _open(self) -> None:
        self._version = 0 if self._tls is None else self._tls.version
        self._channel = open_channel(self._endpoint, self._tls, self._options)
        self._stub = self._make_stub(self._channel)


def _make_server_credentials(tls: ClusterTls) -> grpc.ServerCredentials:
    given = 0

    # Typed loosely: grpcio takes None for no change, its stubs do not.
    def fetch() -> Any:
        """None: as before. Called by a thread of grpcio at every handshake."""
        nonlocal given
        version = tls.version
        if version == given:
            return None
        files = tls.files
        given = version
        return grpc.ssl_server_certificate_configuration([(files.key, files.certificate)], files.ca)

    return grpc.dynamic_ssl_server_credentials(fetch(), fetch, require_client_authentication=True)
