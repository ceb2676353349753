"""Engines that take no time: real schedulers and real fair queues on a clock that counts what steps would take.

What teams send, and when, is a function of that clock; what each of them got by when is recorded.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from router.fair_queue import FairQueue
from router.queue_policy import QueuePolicy
from router.scheduler import Scheduler, SchedulerLimits
from router.sequence import Sequence
from router.service_tallies import ServiceTallies
from tests.router.in_process import request

STEP_S = 0.01
TOKEN_S = 0.0002


@dataclass
class Team:
    """num_wanted: of requests that wait or run, at a time of the clock; what is missing is sent at once, to each of
    the routers in turn or only to the one of that number."""

    name: str
    num_prompt: int
    num_answer: int
    num_wanted: Callable[[float], int]
    weight: float = 1.0
    priority: int = 0
    only_router: int | None = None


@dataclass
class Simulation:
    """history[i]: the clock and every team's service (prompt tokens, and generated ones twice) after round i, and which
    teams had work waiting all the time since the round before."""

    teams: list[Team]
    limits: SchedulerLimits
    num_routers: int = 1
    fair: bool = True
    exchange_every_s: float | None = None
    ageing_s: float = 1e9
    now_s: float = 0.0
    num_tokens: int = 0
    service: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    started: dict[Sequence, float] = field(default_factory=dict[Sequence, float])
    sent: dict[Sequence, float] = field(default_factory=dict[Sequence, float])
    finished: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    history: list[tuple[float, dict[str, float], frozenset[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queues = [FairQueue(lambda: self.now_s, self.ageing_s) for _ in range(self.num_routers)]
        policies: list[QueuePolicy | None] = [*self.queues] if self.fair else [None] * self.num_routers
        self.schedulers = [Scheduler(self.limits, policy) for policy in policies]
        self._tallies = [ServiceTallies(queue, lambda: self.now_s) for queue in self.queues]
        self._free_at_s = [0.0] * self.num_routers
        self._tokens = itertools.count()
        self._exchanged_s = 0.0
        self._running: dict[str, set[Sequence]] = {team.name: set() for team in self.teams}
        self._num_served: dict[Sequence, int] = {}
        self._turn = itertools.count()

    def run(self, duration_s: float) -> None:
        end_s = self.now_s + duration_s
        while self.now_s < end_s:
            self._send()
            index = min(range(self.num_routers), key=lambda each: self._free_at_s[each])
            self.now_s = max(self.now_s, self._free_at_s[index])
            self._free_at_s[index] = self.now_s + self._step(index)
            self._exchange()
            running = Counter(one.request.fairness_key for each in self.schedulers for one in each.running)
            backlogged = frozenset(name for name, all_ in self._running.items() if len(all_) > running[name])
            self.history.append((self.now_s, dict(self.service), backlogged))

    def submit(self, team: Team) -> Sequence:
        prompt = [next(self._tokens) % 30_000 for _ in range(team.num_prompt)]
        asked = request(
            prompt, team.num_answer, fairness_key=team.name, fairness_weight=team.weight, priority=team.priority
        )
        sequence = Sequence(request=asked, token_ids=prompt)
        router = next(self._turn) % self.num_routers if team.only_router is None else team.only_router
        self.schedulers[router].add(sequence)
        self._running[team.name].add(sequence)
        self.sent[sequence] = self.now_s
        return sequence

    def gap(self, one: str, other: str, weights: tuple[float, float] = (1.0, 1.0)) -> float:
        """The largest difference of weighted service over any time in which both had work waiting throughout."""
        largest, low, high = 0.0, 0.0, 0.0
        is_first = True
        for _, service, backlogged in self.history:
            if not {one, other} <= backlogged:
                is_first = True
                continue
            difference = service.get(one, 0.0) / weights[0] - service.get(other, 0.0) / weights[1]
            low, high = (difference, difference) if is_first else (min(low, difference), max(high, difference))
            is_first = False
            largest = max(largest, high - low)
        return largest

    def bound(self) -> float:
        """2U of the paper's theorem 4.4: U = max(cost of the longest prompt, cost of all tokens that run at once)."""
        running = self.limits.num_blocks * 32 * self.num_routers
        return 2 * max(max(team.num_prompt for team in self.teams), 2 * running)

    def _send(self) -> None:
        for team in self.teams:
            while len(self._running[team.name]) < team.num_wanted(self.now_s):
                self.submit(team)

    def _step(self, index: int) -> float:
        scheduler = self.schedulers[index]
        chunks = scheduler.schedule()
        for chunk in chunks:
            sequence, name = chunk.sequence, chunk.sequence.request.fairness_key
            self.started.setdefault(sequence, self.now_s)
            computed = sequence.num_computed + chunk.num_new
            # What is computed again because it had to give way is nobody's gain.
            before = self._num_served.get(sequence, 0)
            self._num_served[sequence] = max(before, min(computed, sequence.num_prompt_tokens))
            self.service[name] += self._num_served[sequence] - before
            if computed == len(sequence.token_ids):
                sequence.append(next(self._tokens) % 30_000)
                self.service[name] += 2
            scheduler.advance(sequence, computed)
            if sequence.num_generated >= sequence.request.max_tokens:
                scheduler.remove(sequence)
                self._running[name].discard(sequence)
                self.finished[name] += 1
        num_tokens = sum(chunk.num_new for chunk in chunks)
        self.num_tokens += num_tokens
        return STEP_S + TOKEN_S * num_tokens

    def _exchange(self) -> None:
        """As a front does: it carries what one router knows to all others."""
        if self.exchange_every_s is None or self.now_s - self._exchanged_s < self.exchange_every_s:
            return
        self._exchanged_s = self.now_s
        known = [tally for each in self._tallies for tally in each.exchange([])]
        for each in self._tallies:
            each.exchange(known)
