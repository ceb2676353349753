"""What Ray Serve's proxy needs to be a front for everybody: bounded connections, answers in the API's own form, and a
certificate that is renewed.

The proxy makes its own uvicorn server, without settings for either. It calls a function of ours before that, in its own
process, if its environment names one: the protocol that uvicorn takes by default becomes ours there, and the function
with which it makes a TLS context, which would read certificate and key once, is wrapped, so that the files are looked
at for every new connection.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

from cluster.proxy_guard import ProxyGuard
from experts.errors import ConfigError
from experts.served_certificate import ServedCertificate

logger = logging.getLogger(__name__)

# In the environment of Ray's processes on the head node.
PROXY_ENV = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.api_proxy.prepare"}


def prepare() -> list[Any]:
    """Called by Serve's proxy. Returns what it shall put around itself."""
    from starlette.middleware import Middleware
    from uvicorn import config

    config.HTTP_PROTOCOLS["auto"] = "router.api.http_protocol:BoundedProtocol"
    make = config.create_ssl_context

    def make_renewed(certfile: Any, keyfile: Any, *args: Any, **options: Any) -> ssl.SSLContext:
        context = make(certfile, keyfile, *args, **options)
        try:
            ServedCertificate(Path(certfile), Path(keyfile)).attach(context)
        except ConfigError as error:
            logger.warning("the certificate will not be renewed: %s", error)
        return context

    config.create_ssl_context = make_renewed
    return [Middleware(ProxyGuard)]
