"""A server's certificate that is read again when its files change, without a restart.

For servers whose clients show a token and not a certificate: the HTTP API and the admin API. The cluster's own network
is mutual (experts/tls.py). OpenSSL asks for every new connection which certificate to show; connections that are open
stay as they are.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from pathlib import Path

from experts.errors import ConfigError

logger = logging.getLogger(__name__)

# Between two attempts to read files that were unusable.
_RETRY_S = 1.0

_Signature = tuple[tuple[int, int, int], ...]


class ServedCertificate:
    """What the two files say now. Any thread may ask."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """PEM files. Raises ConfigError naming the file and the remedy."""
        self._files = certificate, key
        self._lock = threading.Lock()
        self._failed_s: float | None = None
        self._signature = self._read_signature()
        self._context = self._load()

    def make_context(self) -> ssl.SSLContext:
        """For a server that keeps one context for its whole life."""
        context = self._load()
        self.attach(context)
        return context

    def attach(self, context: ssl.SSLContext) -> None:
        """Have a server's context show what the files say when a client connects."""
        context.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject | ssl.SSLSocket, _: str | None, __: ssl.SSLContext) -> None:
        # Also called for clients that name no server.
        connection.context = self._refresh()

    def _refresh(self) -> ssl.SSLContext:
        with self._lock:
            if self._failed_s is not None and time.monotonic() - self._failed_s < _RETRY_S:
                return self._context
            try:
                signature = self._read_signature()
                if signature != self._signature:
                    self._context, self._signature = self._load(), signature
                    logger.info("certificate read again file=%s", self._files[0])
                self._failed_s = None
            except ConfigError as error:
                # Half of a renewal: the certificate in use is still good.
                logger.warning("certificate not renewed, the one before stays in use: %s", error)
                self._failed_s = time.monotonic()
            return self._context

    def _read_signature(self) -> _Signature:
        try:
            states = [os.stat(file) for file in self._files]
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}: name a certificate and its key, as PEM") from None
        return tuple((state.st_ino, state.st_mtime_ns, state.st_size) for state in states)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(*self._files)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"{self._files[0]} and {self._files[1]} cannot be used together: {error}") from error
        return context
