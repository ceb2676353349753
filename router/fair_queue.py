"""Fair sharing between teams: a weighted virtual token counter, with classes of priority and ageing.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588): each account (the
fairness_key of its requests) has a counter of the service it got, a token of a prompt counting 1 and a generated one 2,
divided by its weight. The account with the least is next; one that comes back is lifted to the others, so that nobody
saves up. Then two accounts that both have work waiting never differ by more than 2 max(longest prompt, 2 x tokens that
run at once), and nobody waits while there is room.

What is ours: a prompt counts from its admission on, less what the cache had, but is taken off again where it is not
computed after all (cancelled); tokens that other routers give the same account count here (note_elsewhere). Classes of
priority are served strictly one before the other and each has counters of its own, so that what a team's batch jobs
took of idle time is not held against its interactive requests; what has waited for long rises a class. And an account
with nothing running need not wait until somebody else has finished: the one furthest ahead gives it a place.

No torch, no network; the clock is passed in.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

from router.queue_policy import rank_of
from router.sequence import Rank, Sequence

# Of the paper's evaluation; about what a token costs in time.
PROMPT_COST = 1.0
GENERATED_COST = 2.0
DEFAULT_AGEING_S = 60.0
# Class numbers on the wire; what lies outside counts as the nearest.
MOST_URGENT, LEAST_URGENT = -1, 1
# Accounts with nothing to do are forgotten beyond so many.
MAX_ACCOUNTS = 4096


class AccountService(NamedTuple):
    """service: tokens at their cost, whatever the account's weight, given by one router since it started.
    is_backlogged: it has work waiting there."""

    band: int
    account: str
    service: float
    is_backlogged: bool


@dataclass(eq=False, slots=True)
class _Account:
    """One account in one class. counter: by which accounts are compared; uncomputed: the part of it that stands for
    prompts not computed yet. given: unweighted, by this router alone. backlogged_elsewhere: at some other router."""

    name: str
    weight: float = 1.0
    counter: float = 0.0
    uncomputed: float = 0.0
    given: float = 0.0
    num_running: int = 0
    backlogged_elsewhere: bool = False
    waiting: list[Sequence] = field(default_factory=list[Sequence])

    @property
    def is_active(self) -> bool:
        return bool(self.waiting) or self.num_running > 0

    @property
    def standing(self) -> float:
        """The service that was really given."""
        return self.counter - self.uncomputed

    def charge(self, cost: float) -> None:
        self.given += cost
        self.counter += cost / self.weight


class _Place(NamedTuple):
    """Where a sequence is: in which class and account, and since when it has waited there."""

    account: _Account
    since_s: float


class FairQueue:
    """A QueuePolicy. Owned by the scheduler. A rank is (class, 0 if another router had begun it, order of entry)."""

    def __init__(self, clock: Callable[[], float], ageing_s: float = DEFAULT_AGEING_S) -> None:
        """clock: seconds, monotonic. ageing_s: of waiting, after which a request rises a class."""
        self._clock = clock
        self._ageing_s = ageing_s
        self._bands: dict[int, dict[str, _Account]] = {
            band: {} for band in range(MOST_URGENT, LEAST_URGENT + 1)
        }  # fmt: skip
        # Of the account that was the last to have nothing waiting any more, by class.
        self._last_left: dict[int, _Account] = {}
        self._places: dict[Sequence, _Place] = {}
        self._owed: dict[Sequence, float] = {}  # cost of a prompt's tokens that are not computed yet
        self._num_entered = 0
        self._num_waiting = 0

    def list_waiting(self) -> list[Sequence]:
        accounts = (account for band in self._bands.values() for account in band.values())
        return [sequence for account in accounts for sequence in account.waiting]

    def find_refusal(self, sequence: Sequence, max_waiting: int) -> str | None:
        """An account may have at most as many waiting as there are places left, in whatever class."""
        if sequence.request.num_answer_tokens > 0:  # half an answer must not be lost to those who have not begun
            return None
        name = sequence.request.fairness_key
        own = sum(len(band[name].waiting) for band in self._bands.values() if name in band)
        if own < max_waiting - self._num_waiting:
            return None
        return f"{self._num_waiting} requests are waiting already, {own} of them of this team"

    def push(self, sequence: Sequence) -> None:
        request = sequence.request
        if sequence in self._places:  # it ran
            account = self._places[sequence].account
            account.num_running -= 1
        else:
            band = min(max(request.priority, MOST_URGENT), LEAST_URGENT)
            account = self._get_account(band, request.fairness_key)
            account.weight = request.fairness_weight
            if not account.waiting:
                self._lift(account, band)
            sequence.rank = (band, 0 if request.num_answer_tokens else 1, self._next_entry())
        self._enqueue(sequence, account)

    def peek(self) -> Sequence | None:
        if self._num_waiting == 0:
            return None
        self._promote()
        for band in self._bands.values():
            waiting = [account for account in band.values() if account.waiting]
            if waiting:
                begun = [account.waiting[0] for account in waiting if account.waiting[0].rank[1] == 0]
                if begun:
                    return min(begun, key=rank_of)
                return min(waiting, key=lambda each: (each.counter, each.waiting[0].rank)).waiting[0]
        raise AssertionError(f"{self._num_waiting} wait and no account has them")

    def admit(self, sequence: Sequence) -> None:
        account = self._dequeue(sequence)
        account.num_running += 1
        if sequence in self._owed or sequence.num_generated > 0 or sequence.request.num_answer_tokens > 0:
            return  # it was admitted before, here or by a router that was lost
        cost = PROMPT_COST * (sequence.num_prompt_tokens - sequence.num_computed)
        self._owed[sequence] = cost
        account.charge(cost)
        account.uncomputed += cost / account.weight

    def drop(self, sequence: Sequence) -> None:
        place = self._places.get(sequence)
        if place is None:
            return
        account = place.account
        if sequence in account.waiting:
            self._dequeue(sequence)
        else:
            account.num_running -= 1
        if (owed := self._owed.pop(sequence, 0.0)) > 0:
            account.uncomputed -= owed / account.weight
            account.charge(-owed)
        del self._places[sequence]

    def note_computed(self, sequence: Sequence, num_prompt_tokens: int, num_generated: int) -> None:
        account = self._places[sequence].account
        if num_prompt_tokens > 0 and (owed := self._owed.get(sequence, 0.0)) > 0:
            paid = min(owed, PROMPT_COST * num_prompt_tokens)
            self._owed[sequence] = owed - paid
            account.uncomputed -= paid / account.weight
        if num_generated > 0:
            account.charge(GENERATED_COST * num_generated)

    def turn(self, sequence: Sequence) -> Rank:
        band, begun, entered = sequence.rank
        return (band, begun, self._places[sequence].account.standing, entered)

    def find_victims(self, running: Items[Sequence], newcomer: Sequence | None) -> list[Sequence]:
        if newcomer is None:
            lowest = max(each.rank[0] for each in running)
            level = [each for each in running if each.rank[0] == lowest]
            return self._choose_surplus(level) or sorted(level, key=rank_of, reverse=True)
        band = newcomer.rank[0]
        victims = sorted((each for each in running if each.rank[0] > band), key=rank_of, reverse=True)
        account = self._places[newcomer].account
        if account.num_running == 0:
            level = [each for each in running if each.rank[0] == band]
            victims += [
                each for each in self._choose_surplus(level) if self._places[each].account.standing > account.standing
            ]
        return victims

    def list_service(self) -> list[AccountService]:
        """What this router gave since it started."""
        return [
            AccountService(band, account.name, account.given, bool(account.waiting))
            for band, accounts in self._bands.items()
            for account in accounts.values()
            if account.given > 0 or account.waiting
        ]

    def note_elsewhere(self, band: int, name: str, service: float, *, is_backlogged: bool) -> None:
        """Other routers gave the account so much more. is_backlogged: it has work waiting at one of them."""
        if band not in self._bands or (service == 0 and name not in self._bands[band] and not is_backlogged):
            return
        account = self._get_account(band, name)
        account.backlogged_elsewhere = is_backlogged
        account.counter += service / account.weight

    def _choose_surplus(self, running: Items[Sequence]) -> list[Sequence]:
        """All but the oldest of each account: those of the account furthest ahead first, its youngest first."""
        by_account: defaultdict[_Account, list[Sequence]] = defaultdict(list)
        for sequence in sorted(running, key=rank_of):
            by_account[self._places[sequence].account].append(sequence)
        surplus = [sequence for sequences in by_account.values() for sequence in sequences[1:]]
        return sorted(surplus, key=lambda one: (self._places[one].account.standing, one.rank), reverse=True)

    def _lift(self, account: _Account, band: int) -> None:
        """It has work waiting again: what it did not use in the meantime is gone."""
        if account.backlogged_elsewhere:
            return
        others = [one.counter for one in self._bands[band].values() if one.waiting]
        if others:
            account.counter = max(account.counter, min(others))
        elif (last := self._last_left.get(band)) is not None:
            account.counter = max(account.counter, last.counter)

    def _promote(self) -> None:
        """Move those that have waited for long to the next class."""
        now_s = self._clock()
        for band in range(MOST_URGENT + 1, LEAST_URGENT + 1):
            for account in list(self._bands[band].values()):
                while account.waiting and now_s - self._places[account.waiting[0]].since_s >= self._ageing_s:
                    self._move_up(account.waiting[0], account, band - 1)

    def _move_up(self, sequence: Sequence, account: _Account, band: int) -> None:
        self._dequeue(sequence)
        upper = self._get_account(band, account.name)
        upper.weight = account.weight
        if not upper.waiting:
            self._lift(upper, band)
        if (owed := self._owed.get(sequence, 0.0)) > 0:  # it ran, and had to give way
            for one, sign in ((account, -1), (upper, 1)):
                one.uncomputed += sign * owed / one.weight
                one.charge(sign * owed)
        sequence.rank = (band, sequence.rank[1], self._next_entry())
        self._enqueue(sequence, upper)

    def _enqueue(self, sequence: Sequence, account: _Account) -> None:
        self._places[sequence] = _Place(account, self._clock())
        insort(account.waiting, sequence, key=rank_of)
        self._num_waiting += 1

    def _dequeue(self, sequence: Sequence) -> _Account:
        account = self._places[sequence].account
        del account.waiting[bisect_left(account.waiting, sequence.rank, key=rank_of)]
        self._num_waiting -= 1
        if not account.waiting:
            self._last_left[int(sequence.rank[0])] = account
        return account

    def _get_account(self, band: int, name: str) -> _Account:
        accounts = self._bands[band]
        account = accounts.get(name)
        if account is None:
            if len(accounts) >= MAX_ACCOUNTS:
                idle = (one for one in accounts.values() if not one.is_active and not one.backlogged_elsewhere)
                for forgotten in sorted(idle, key=lambda one: one.counter)[: MAX_ACCOUNTS // 4]:
                    del accounts[forgotten.name]
            account = accounts[name] = _Account(name)
        return account

    def _next_entry(self) -> int:
        self._num_entered += 1
        return self._num_entered
