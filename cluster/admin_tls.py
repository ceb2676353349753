"""The admin API over TLS, where the cluster has certificates: with the cluster's own, for the name `shoal`.

The server shows a certificate and the client a token. Clients need no certificate of their own: Prometheus and people
are known by their tokens, and what encryption is for here is that nobody else reads these.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from experts.errors import ConfigError
from experts.served_certificate import ServedCertificate
from experts.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, PEER_NAME


def list_server_options(tls_dir: str | None) -> dict[str, Any]:
    """Arguments of uvicorn.Config. None: plain HTTP. Raises ConfigError."""
    if tls_dir is None:
        return {}
    certificate = ServedCertificate(Path(tls_dir) / CERTIFICATE_FILE, Path(tls_dir) / KEY_FILE)
    return {"ssl_context_factory": lambda *_: certificate.make_context()}


def get_scheme(tls_dir: str | None) -> str:
    return "http" if tls_dir is None else "https"


def list_client_options(tls_dir: str | None) -> dict[str, Any]:
    """Arguments of an httpx client: only servers of the cluster's CA are believed. A CA that is changed takes another
    client. Raises ConfigError."""
    if tls_dir is None:
        return {}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(Path(tls_dir) / CA_FILE)
    except OSError as error:
        raise ConfigError(f"{Path(tls_dir) / CA_FILE} cannot be used: {error}") from error
    return {"verify": context}


def get_ca_time_ns(tls_dir: str) -> int:
    """When the CA was last written. Raises ConfigError."""
    try:
        return (Path(tls_dir) / CA_FILE).stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error


def list_request_options(tls_dir: str | None) -> dict[str, Any]:
    """Arguments of each request: whom the certificate must be for, whatever address it goes to."""
    return {} if tls_dir is None else {"extensions": {"sni_hostname": PEER_NAME}}
