"""How much of one request's prompts routers are given at a time.

Its sequences would otherwise stand in the routers' queues all at once, and before all that the same team asks for
meanwhile: 50 prompts of 2,000 tokens held up a request for one token for 27 s. A prompt that several sequences share is
also computed once, and then found in the cache, where it is longer than the backlog.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

# Four steps of a router, by default: enough for it never to wait for this front.
MAX_BACKLOG_TOKENS = 8192


class PromptBacklog:
    """Prompts that routers have and did not answer yet. Of one request; used on one event loop."""

    def __init__(self, max_tokens: int = MAX_BACKLOG_TOKENS) -> None:
        """max_tokens: in prompts together, but for one that is longer."""
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, num_tokens: int) -> Callable[[], None]:
        """Wait for the turn of a prompt. Returns what says, once or more often, that it is answered."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((num_tokens, turn))
        self._call_next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(num_tokens)
            raise
        is_inside = True

        def leave() -> None:
            nonlocal is_inside
            if is_inside:
                is_inside = False
                self._leave(num_tokens)

        return leave

    def _leave(self, num_tokens: int) -> None:
        self._num_tokens -= num_tokens
        self._call_next()

    def _call_next(self) -> None:
        while self._waiting:
            num_tokens, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
                continue
            if self._num_tokens > 0 and self._num_tokens + num_tokens > self._max_tokens:
                return
            self._waiting.popleft()
            self._num_tokens += num_tokens
            turn.set_result(None)
