"""Who gets in: every route but health and version wants a key as soon as a key file is configured.

Plain ASGI and in front of all routes, so that a route that is added later, and a path that is none, are closed by
default. Without a key file everybody is in; hosts then refuse to listen to the network (router/tenancy/open_access.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.api.errors import ApiError, BadRequest, NotAuthenticated, RateLimited, error_response
from router.api.request_use import RequestUse, set_current_use
from router.api.viewer import is_admin
from router.tenancy.journal import UsageJournal
from router.tenancy.key_file import Limits
from router.tenancy.key_ring import ANONYMOUS, Account, KeySource, now_utc
from router.tenancy.limits import LimitBook, LimitState
from router.tenancy.priority import PriorityClass

# Compared as they are: what only looks like one of them wants a key.
PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/version", "/ui"})
# Files that say nothing.
PUBLIC_PREFIX = "/ui/static/"
# What the administrator may see, too, who has no key of a team.
VIEWER_PATHS = frozenset({"/metrics", "/ui/state", "/ui/events", "/ui/experts"})
PRIORITY_HEADER = "x-shoal-priority"
# Close code of RFC 6455, section 7.4.1: the message violates the endpoint's policy.
_POLICY_VIOLATION = 1008
# Those that have ended keep theirs for as long as they cannot be logged.
_SLOTS_PER_REQUEST = 2


class Admission:
    """Authenticates, keeps limits, and tells routes whose request it is (request_use)."""

    def __init__(self, app: ASGIApp, accounts: Accounts, viewer_token: str | None = None) -> None:
        """viewer_token: whoever sends the admin token that it follows from may look; None: there is none."""
        self._app = app
        self._accounts = accounts
        self._viewer_token = viewer_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        account = self._accounts.find(Headers(scope=scope))
        if scope["type"] != "http":
            # No route takes any other protocol.
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        if account is None and self._may_pass(scope):
            account = ANONYMOUS
        if account is None:
            await _refuse(NotAuthenticated(), scope, receive, send)
            return
        try:
            use = RequestUse(
                scope["state"]["request_id"],
                account,
                self._accounts.limits,
                self._accounts.journal,
                _read_priority(Headers(scope=scope)),
            )
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        set_current_use(use)
        if scope["method"] == "POST":
            await self._run_limited(account, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        """Without a key."""
        path = scope["path"]
        if path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIX):
            return True
        if path not in VIEWER_PATHS:
            return False
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and is_admin(token.strip(), self._viewer_token)

    async def _run_limited(self, account: Account, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self._accounts.limits

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for what, state in zip(("requests", "tokens"), limits.describe(account), strict=True):
                    if state is not None:
                        _write_limit(headers, what, state)
            await send(message)

        refusal = limits.admit(account)
        if refusal is not None:
            error = RateLimited(refusal.reason, retry_after_s=refusal.retry_after_s)
            await _refuse(error, scope, receive, send_with_limits)
            return
        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            limits.release(account)


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    # For the edge, which counts and logs what was turned away.
    scope["state"]["error_code"] = error.code or "error"
    await error_response(error)(scope, receive, send)


class Accounts:
    """The keys there are, and what each has used."""

    def __init__(
        self,
        keys_file: Path | None,
        usage_journal: Path | None,
        max_parallel: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """keys_file: None: everybody is anonymous. usage_journal: folder; None: usage is not recorded. max_parallel:
        see LimitBook. Raises KeyFileError, LedgerError."""
        self.has_keys = keys_file is not None
        self._keys = None if keys_file is None else KeySource(keys_file, clock)
        self.limits = LimitBook(max_parallel, clock)
        self.journal = None if usage_journal is None else UsageJournal(usage_journal, _SLOTS_PER_REQUEST * max_parallel)

    def find_limits(self, scope_id: str) -> Limits | None:
        """Of a key or a team; None: there is none of that name."""
        return None if self._keys is None else self._keys.get().find_limits(scope_id)

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()

    def find(self, headers: Headers) -> Account | None:
        """Whose key the headers have; None: nobody's."""
        if self._keys is None:
            return ANONYMOUS
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Anthropic's clients send the key in a header of its own.
        text = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return self._keys.get().find(text.encode("utf-8", "surrogatepass"), now_utc())


def _read_priority(headers: Headers) -> PriorityClass | None:
    """Raises BadRequest if the client asks for a class that there is not."""
    name = headers.get(PRIORITY_HEADER)
    if name is None:
        return None
    try:
        return PriorityClass(name.strip().lower())
    except ValueError:
        raise BadRequest(f"{PRIORITY_HEADER}: must be one of {', '.join(PriorityClass)}.") from None


def _write_limit(headers: MutableHeaders, what: str, state: LimitState) -> None:
    """The header names that OpenAI's clients know."""
    headers[f"x-ratelimit-limit-{what}"] = str(state.limit)
    headers[f"x-ratelimit-remaining-{what}"] = str(state.remaining)
    headers[f"x-ratelimit-reset-{what}"] = f"{state.reset_s:.3f}s"
