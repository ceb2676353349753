"""The HTTP front as an ASGI app. Knows no Ray: cluster/ hosts it in Ray Serve, __main__.py in plain uvicorn."""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from router.api import chat, completions, health, messages, models, openapi, responses, tokenize, unsupported
from router.api.admission import Accounts, Admission
from router.api.context import ApiContext
from router.api.edge import Edge
from router.api.errors import install_error_handlers
from router.api.ledger_process import ledger_writer
from router.api.router_client import RouterEndpoints
from router.api.settings import ApiSettings
from router.api.tally_exchange import sharing


def create_app(settings: ApiSettings, router_endpoints: RouterEndpoints) -> FastAPI:
    """Load tokenizer and keys and make the app. Raises ConfigError, TokenizerError, KeyFileError,
    LedgerError."""
    context = ApiContext(settings, router_endpoints)
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
    for module in (completions, chat, messages, responses, models, tokenize, openapi, health, unsupported):
        app.include_router(module.routes)

    @app.get("/version")
    async def get_version() -> dict[str, str]:
        return {"version": find_version()}

    # The last one added is the outermost.
    app.add_middleware(Admission, accounts=accounts)
    app.add_middleware(Edge, settings=settings)
    return app


def find_version() -> str:
    """The installed version; "unknown" when run from a checkout that is not installed."""
    try:
        return importlib.metadata.version("shoal")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
