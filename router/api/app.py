"""The HTTP front as an ASGI app. Knows no Ray: cluster/ hosts it in Ray Serve, __main__.py in plain uvicorn."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from router.api import (
    chat,
    completions,
    health,
    messages,
    metrics,
    models,
    openapi,
    responses,
    tokenize,
    ui,
    unsupported,
)
from router.api.admission import Accounts, Admission
from router.api.cluster_source import ClusterSource, NoCluster
from router.api.context import ApiContext
from router.api.edge import Edge
from router.api.errors import install_error_handlers
from router.api.ledger_process import ledger_writer
from router.api.router_client import RouterEndpoints
from router.api.settings import ApiSettings
from router.api.tally_exchange import sharing
from router.api.version import find_version


def create_app(
    settings: ApiSettings, router_endpoints: RouterEndpoints, cluster: ClusterSource | None = None
) -> FastAPI:
    """Load tokenizer and keys and make the app. cluster: None where no controller runs.

    Raises ConfigError, TokenizerError, KeyFileError, LedgerError."""
    context = ApiContext(settings, router_endpoints, cluster or NoCluster())
    accounts = Accounts(settings.keys_file, settings.usage_journal, settings.max_concurrent_requests)

    @asynccontextmanager
    async def run(_app: FastAPI) -> AsyncGenerator[None, None]:
        async with ledger_writer(settings), sharing(context.routers, accounts):
            yield
        await context.close()
        accounts.close()

    # The interactive documentation would load scripts from elsewhere.
    app = FastAPI(lifespan=run, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.context = context
    app.state.openapi_document = openapi.build_document(find_version())
    install_error_handlers(app)
    for module in (completions, chat, messages, responses, models, tokenize, openapi, health, metrics, ui, unsupported):
        app.include_router(module.routes)

    @app.get("/version")
    async def get_version() -> dict[str, str]:
        return {"version": find_version()}

    # The last one added is the outermost.
    app.add_middleware(Admission, accounts=accounts, viewer_token=settings.viewer_token)
    app.add_middleware(Edge, settings=settings, metrics=context.metrics, tracer=context.tracer)
    return app
