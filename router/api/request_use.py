"""What one HTTP request may do and uses: the one place that every route's work for text goes through.

The use belongs to the request's context (contextvars), not to arguments of routes: a route that is added later cannot
forget to count, or to say whose request it is. generation.generate() is where sequences meet it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from router.api.errors import NotAllowed, RateLimited, Unavailable
from router.tenancy.errors import JournalFull
from router.tenancy.journal import JournalEntry, UsageJournal
from router.tenancy.key_ring import ANONYMOUS, Account
from router.tenancy.limits import LimitBook
from router.tenancy.priority import PriorityClass, choose_default
from router.tenancy.usage import Outcome
from router.v1 import router_pb2

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 5
_CURRENT: ContextVar[RequestUse] = ContextVar("request use")


class Plan(Protocol):
    """What is counted of a sequence to generate; see generation.SequencePlan."""

    @property
    def index(self) -> int: ...
    @property
    def request(self) -> router_pb2.GenerateRequest: ...
    @property
    def shares_prompt(self) -> bool: ...


class Piece(Protocol):
    """What is counted of a piece of a choice; see generation.Delta."""

    @property
    def index(self) -> int: ...
    @property
    def tokens(self) -> Sized: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def router_us(self) -> int: ...
    @property
    def expert_us(self) -> int: ...


class RequestUse:
    """Of one HTTP request. Used on the event loop only."""

    def __init__(
        self,
        request_id: str,
        account: Account,
        limits: LimitBook,
        journal: UsageJournal | None,
        priority: PriorityClass | None,
    ) -> None:
        """journal: None: nothing is recorded. priority: what the client asks for; None: it does not say.

        Raises NotAllowed if its key may not have that priority.
        """
        self.account = account
        self._request_id = request_id
        self._limits = limits
        self._journal = journal
        self._priority = choose_default(account.priorities)
        if priority is not None:
            self.set_priority(priority)
        self._model = ""

    @property
    def only_team(self) -> str | None:
        """The one whose figures the asker may see; None: all, as the administrator, or where there are no keys."""
        return None if self.account is ANONYMOUS else self.account.team

    def set_priority(self, priority: PriorityClass, param: str | None = None) -> None:
        """param: the field that asks for it. Raises NotAllowed if the key may not have it."""
        allowed = self.account.priorities
        if allowed is not None and priority not in allowed:
            names = ", ".join(allowed)
            raise NotAllowed(
                f"This key may not ask for that priority; it may for: {names}.", param=param, code="priority"
            )
        self._priority = priority

    def choose_model(self, name: str | None, served: Iterable[str]) -> str:
        """name, or the first served one that the key may use. Raises NotAllowed if it may not; served: the names that
        exist, of which a given name is one."""
        allowed = self.account.models
        for each in served if name is None else (name,):
            if allowed is None or each in allowed:
                self._model = each
                return each
        raise NotAllowed("This key may not use that model.", param="model", code="model_not_allowed")

    def may_use(self, model: str) -> bool:
        return self.account.models is None or model in self.account.models

    @contextmanager
    def measure(self, plans: Iterable[Plan]) -> Iterator[Meter]:
        """While it is entered, sequences are generated: says in place whose they are, and keeps account of them.

        Raises RateLimited or Unavailable before any is sent.
        """
        plans = list(plans)
        num_prompt_tokens = sum(len(plan.request.prompt_token_ids) for plan in plans if not plan.shares_prompt)
        entry = self._open_entry(num_prompt_tokens)
        outcome = Outcome.FAILED
        try:
            if (refusal := self._limits.admit_tokens(self.account, num_prompt_tokens)) is not None:
                raise RateLimited(refusal.reason, retry_after_s=refusal.retry_after_s)
            for plan in plans:
                self._sign(plan.request)
            yield Meter(self._limits.bind_take(self.account), entry, plans)
            outcome = Outcome.FINISHED
        except (GeneratorExit, asyncio.CancelledError):
            outcome = Outcome.CUT_OFF
            raise
        finally:
            if entry is not None:
                entry.end(outcome)

    def _open_entry(self, num_prompt_tokens: int) -> JournalEntry | None:
        if self._journal is None:
            return None
        try:
            return self._journal.begin(
                request_id=self._request_id,
                team=self.account.team,
                key_id=self.account.key_id,
                model=self._model,
                tokens_in=num_prompt_tokens,
            )
        except JournalFull as error:
            logger.error("request refused: %s", error)
            raise Unavailable("Usage cannot be recorded at the moment.", retry_after_s=_RETRY_AFTER_S) from error

    def _sign(self, request: router_pb2.GenerateRequest) -> None:
        request.fairness_key = self.account.team
        request.fairness_weight = self.account.weight
        request.priority = self._priority.number
        request.cache_salt = self.account.cache_salt + request.cache_salt


class Meter:
    """Counts what the sequences of one request get."""

    def __init__(self, take_tokens: Callable[[int], None], entry: JournalEntry | None, plans: Iterable[Plan]) -> None:
        """take_tokens: from the account's limits. entry: None: nothing is recorded."""
        self._take_tokens = take_tokens
        self._entry = entry
        self._num_tokens = 0
        # Of each sequence so far; what a cache had counts for one of those that share a prompt.
        self._counted = {plan.index: (0, 0, 0) for plan in plans}
        self._sharing_indices = {plan.index for plan in plans if plan.shares_prompt}
        self._cached_tokens = self._router_us = self._expert_us = 0

    def count(self, piece: Piece) -> None:
        """A piece that the client is about to be sent."""
        num_tokens = len(piece.tokens)
        if num_tokens:
            self._take_tokens(num_tokens)
        if self._entry is None:
            return
        cached = 0 if piece.index in self._sharing_indices else piece.cached_tokens
        last_cached, last_router_us, last_expert_us = self._counted[piece.index]
        self._counted[piece.index] = (cached, piece.router_us, piece.expert_us)
        self._num_tokens += num_tokens
        self._cached_tokens += cached - last_cached
        self._router_us += piece.router_us - last_router_us
        self._expert_us += piece.expert_us - last_expert_us
        self._entry.set_counters(
            tokens_cached=self._cached_tokens,
            tokens_out=self._num_tokens,
            router_us=self._router_us,
            expert_us=self._expert_us,
        )


def set_current_use(use: RequestUse) -> None:
    """For everything that the current task does from now on, and the tasks that it starts."""
    _CURRENT.set(use)


def get_current_use() -> RequestUse:
    """Raises LookupError outside of a request."""
    return _CURRENT.get()
