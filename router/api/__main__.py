"""python -m router.api: the HTTP front under plain uvicorn, without Ray, for tests and debugging.

Prints one JSON line, {"url", "pid"}, when it listens; logs go to stderr. SIGINT or SIGTERM let running requests
finish, then it exits 0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import get_args

import uvicorn

from experts.allocator import return_freed_memory
from experts.errors import ExpertsError
from experts.logs import LOG_FORMATS, set_up_logging
from experts.served_certificate import ServedCertificate
from router.api.app import create_app
from router.api.errors import TokenizerError
from router.api.http_protocol import BoundedProtocol
from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings, ReasoningField
from router.tenancy.errors import TenancyError
from router.tenancy.open_access import check_open_access

_DRAIN_TIMEOUT_S = 30
# Longer than clients keep an idle connection (httpx, and so the openai client: 5 s, which is uvicorn's default, too).
# The client must close first: a request that meets the server's close on its way is lost with a reset connection.
_KEEP_ALIVE_S = 75


def main() -> int:
    return_freed_memory()
    arguments = _parse_arguments()
    set_up_logging(log_format=arguments.log_format)
    settings = ApiSettings(
        checkpoint=arguments.checkpoint,
        served_model_names=tuple(arguments.served_model_name),
        keys_file=arguments.keys_file,
        usage_journal=arguments.usage_journal,
        ledger_url=arguments.ledger,
        max_model_len=arguments.max_model_len,
        router_wait_s=arguments.router_wait_s,
        strict_fields=arguments.strict_fields,
        router_dead_s=arguments.router_dead_s,
        cluster_tls_dir=arguments.tls_dir,
        metrics_compat=arguments.metrics_compat,
        trace_to=arguments.trace_to,
        trace_share=arguments.trace_share,
        log_format=arguments.log_format,
        reasoning_field=arguments.reasoning_field,
    )
    try:
        check_open_access(arguments.host, has_keys=arguments.keys_file is not None, is_allowed=arguments.no_auth)
        certificate = None
        if arguments.tls_cert is not None:
            certificate = ServedCertificate(Path(arguments.tls_cert), Path(arguments.tls_key or arguments.tls_cert))
        app = create_app(settings, StaticEndpoints(arguments.router))
        listener = socket.create_server((arguments.host, arguments.port), backlog=2048)
    except (ExpertsError, TokenizerError, TenancyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        log_level="warning",
        log_config=None,
        timeout_graceful_shutdown=_DRAIN_TIMEOUT_S,
        timeout_keep_alive=_KEEP_ALIVE_S,
        server_header=False,
        ssl_context_factory=None if certificate is None else lambda *_: certificate.make_context(),
    )
    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        # uvicorn drains on these and then raises them again, which would make a proper stop look like a death.
        signal.signal(stop_signal, lambda *_: None)
    _AnnouncingServer(config, "https" if arguments.tls_cert else "http").run(sockets=[listener])
    return 0


class _AnnouncingServer(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, scheme: str) -> None:
        super().__init__(config)
        self._scheme = scheme

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            print(json.dumps({"url": f"{self._scheme}://{host}:{port}", "pid": os.getpid()}), flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m router.api", description="Serve the OpenAI API for routers.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the Hugging Face checkpoint")
    parser.add_argument("--router", action="append", required=True, metavar="HOST:PORT", help="may be repeated")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--served-model-name", action="append", default=[], help="may be repeated")
    parser.add_argument("--keys-file", type=Path, help="teams and keys, as `shoal keys` writes it")
    parser.add_argument("--usage-journal", type=Path, metavar="FOLDER", help="for the ledger; default: none is kept")
    parser.add_argument("--ledger", metavar="URL", help="database that the journal is written into; default: none")
    parser.add_argument("--no-auth", action="store_true", help="listen to the network although there are no keys")
    parser.add_argument("--max-model-len", type=int, help="context length in tokens; default: the checkpoint's")
    parser.add_argument(
        "--router-wait-s", type=float, default=ApiSettings.router_wait_s, help="for a router to come back, then 503"
    )
    parser.add_argument(
        "--router-dead-s", type=float, default=ApiSettings.router_dead_s, help="without a sign of life, until then"
    )
    parser.add_argument("--tls-dir", metavar="DIR", help="certificates to call routers with: tls.crt, tls.key, ca.crt")
    parser.add_argument("--tls-cert", metavar="FILE", help="serve HTTPS with this certificate chain")
    parser.add_argument("--tls-key", metavar="FILE", help="and its key")
    parser.add_argument("--strict-fields", action="store_true", help="refuse unknown request fields")
    parser.add_argument("--trace-to", metavar="URL|FILE", help="where spans go: an OTLP/HTTP collector, or a file")
    parser.add_argument("--trace-share", type=float, default=ApiSettings.trace_share, help="of requests, from 0 to 1")
    parser.add_argument("--metrics-compat", choices=["none", "vllm"], default="none", help="further names in /metrics")
    parser.add_argument("--reasoning-field", choices=get_args(ReasoningField), default=ApiSettings.reasoning_field)
    parser.add_argument("--log-format", choices=LOG_FORMATS, default="text", help="json: one object per line")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
