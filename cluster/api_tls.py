"""The HTTP front's certificate, renewed without a restart.

Ray Serve's proxy reads certificate and key once, and makes its own server. It calls a function of ours before that, in
its own process, if its environment names one; the server's context is then told to look at the files for every new
connection. Serve has no setting for a context, so the function with which uvicorn makes one is wrapped.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

from experts.errors import ConfigError
from experts.served_certificate import ServedCertificate

logger = logging.getLogger(__name__)

# In the environment of Ray's processes on the head node.
PROXY_ENV = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.api_tls.keep_renewed"}


def keep_renewed() -> list[Any]:
    """Called by Serve's proxy. Returns no middleware."""
    from uvicorn import config

    make = config.create_ssl_context

    def make_renewed(certfile: Any, keyfile: Any, *args: Any, **options: Any) -> ssl.SSLContext:
        context = make(certfile, keyfile, *args, **options)
        try:
            ServedCertificate(Path(certfile), Path(keyfile)).attach(context)
        except ConfigError as error:
            logger.warning("the certificate will not be renewed: %s", error)
        return context

    config.create_ssl_context = make_renewed
    return []
