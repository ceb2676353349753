"""Mutual TLS on the cluster's network: one folder of certificate files for both sides of every connection.

The files are those of cert-manager and of `shoal certs`: tls.crt, tls.key, ca.crt. Whoever has a certificate of the CA
is a peer, so the CA should be this cluster's own. Pods come and go under addresses that no certificate could name:
servers are known by the name `shoal` instead. Files are looked at again for every new connection, so a renewed
certificate is used without a restart; connections that are open stay. Sessions are not resumed: a certificate that has
expired, or whose CA is no longer trusted, opens nothing.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import ssl
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from experts.errors import ConfigError

logger = logging.getLogger(__name__)

CERTIFICATE_FILE, KEY_FILE, CA_FILE = "tls.crt", "tls.key", "ca.crt"
# In the certificate's subjectAltName: what a client asks a server to be.
PEER_NAME = "shoal"
_FILES = (CERTIFICATE_FILE, KEY_FILE, CA_FILE)
# Between two attempts to read files that were unusable.
_RETRY_S = 1.0


class TlsFiles(NamedTuple):
    """Contents, as PEM."""

    certificate: bytes
    key: bytes
    ca: bytes


class _Loaded(NamedTuple):
    files: TlsFiles
    server: ssl.SSLContext
    client: ssl.SSLContext


class ClusterTls:
    """What the files say now. Any thread may ask."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError naming the file and the remedy."""
        self._folder = folder
        self._lock = threading.Lock()
        self._signature = self._read_signature()
        self._loaded = self._load()
        self._version = 1
        self._failed_s: float | None = None

    @property
    def server_context(self) -> ssl.SSLContext:
        """For a new connection that was accepted: it must show a certificate of the CA."""
        return self._refresh().server

    @property
    def client_context(self) -> ssl.SSLContext:
        """For a new connection to a server, whose name is PEER_NAME."""
        return self._refresh().client

    @property
    def files(self) -> TlsFiles:
        return self._refresh().files

    @property
    def version(self) -> int:
        """Greater whenever the files have changed: whoever keeps something made of them makes it again."""
        self._refresh()
        return self._version

    def _refresh(self) -> _Loaded:
        with self._lock:
            try:
                signature = self._read_signature()
                if signature != self._signature and not self._is_pausing():
                    self._loaded, self._signature = self._load(), signature
                    self._version += 1
                    self._failed_s = None
                    logger.info("certificates read again folder=%s version=%d", self._folder, self._version)
            except ConfigError as error:
                # Half of a renewal, or a broken one: the certificate in use is still good.
                if not self._is_pausing():
                    logger.warning("certificates not renewed, the ones before stay in use: %s", error)
                    self._failed_s = time.monotonic()
            return self._loaded

    def _is_pausing(self) -> bool:
        return self._failed_s is not None and time.monotonic() - self._failed_s < _RETRY_S

    def _read_signature(self) -> tuple[tuple[int, int, int], ...]:
        try:
            states = [os.stat(self._folder / name) for name in _FILES]
        except OSError as error:
            raise ConfigError(
                f"{error.filename}: {error.strerror} (a folder of certificates holds {', '.join(_FILES)}, as "
                "cert-manager and `shoal certs` write them)"
            ) from None
        return tuple((state.st_ino, state.st_mtime_ns, state.st_size) for state in states)

    def _load(self) -> _Loaded:
        try:
            files = TlsFiles(*((self._folder / name).read_bytes() for name in _FILES))
            check_files(files, str(self._folder))
            server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            server.verify_mode = ssl.CERT_REQUIRED
            server.num_tickets = 0
            client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            for context in (server, client):
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.set_alpn_protocols(["h2"])
                context.load_verify_locations(cadata=files.ca.decode("ascii"))
                context.load_cert_chain(self._folder / CERTIFICATE_FILE, self._folder / KEY_FILE)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(f"the certificates in {self._folder} cannot be used: {error}") from error
        return _Loaded(files, server, client)


def load_cluster_tls(folder: str | Path | None) -> ClusterTls | None:
    """None for None: no encryption. Raises ConfigError."""
    return ClusterTls(Path(folder)) if folder is not None else None


def check_files(files: TlsFiles, place: str) -> datetime:
    """When the certificate expires. Raises ConfigError if it is not one that peers would take."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        certificate = x509.load_pem_x509_certificate(files.certificate)
        key = load_pem_private_key(files.key, password=None)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise ConfigError(f"{CERTIFICATE_FILE} or {KEY_FILE} in {place} is not usable: {error}") from error
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{KEY_FILE} in {place} is not the key of {CERTIFICATE_FILE}: they are of different renewals")
    if PEER_NAME not in names.get_values_for_type(x509.DNSName):
        raise ConfigError(
            f"{CERTIFICATE_FILE} in {place} is not for the name {PEER_NAME!r}: add it to the certificate's dnsNames"
        )
    expires_at = certificate.not_valid_after_utc
    if expires_at <= datetime.now(UTC):
        raise ConfigError(f"{CERTIFICATE_FILE} in {place} expired at {expires_at:%Y-%m-%d %H:%M} UTC: renew it")
    return expires_at


def check_listen_address(host: str, tls: ClusterTls | None, *, allow_insecure: bool) -> None:
    """Raises ConfigError for an address that others can reach, if what goes over it could be read by them."""
    if tls is None and not allow_insecure and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines, and traffic would be unencrypted: give a folder of "
            "certificates, or allow it with --insecure-cluster-network if the network is yours alone"
        )


def is_loopback(host: str) -> bool:
    """Of an address or a name; a name that could be anything is none."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
