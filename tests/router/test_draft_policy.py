"""The policy against made-up acceptance and step times: it ends at the depth that is fastest, and notices changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from router.draft_policy import Acceptance, DraftPolicy


class MadeUpEngine:
    """Sequences whose draft j + 1 holds every so often, by `rates`, and steps that last what `seconds` says."""

    def __init__(self, max_depth: int, rates: list[list[float]], seconds: Callable[[list[int]], float]) -> None:
        self.policy = DraftPolicy(max_depth)
        self.rates = rates
        self.seconds = seconds
        self.acceptances = [self.policy.new_acceptance() for _ in rates]
        self.depths: list[list[int]] = []
        self._owed = [[0.0] * max_depth for _ in rates]

    def run(self, num_steps: int) -> None:
        drafted = self.policy.choose(self.acceptances)
        for _ in range(num_steps):
            for index, depth in enumerate(drafted):
                self.policy.note_verified(self.acceptances[index], depth, self._count_held(index, depth))
            chosen = self.policy.choose(self.acceptances)
            self.policy.note_step(len(self.rates), self.seconds(drafted), False)
            drafted = chosen
            self.depths.append(chosen)

    def _count_held(self, index: int, depth: int) -> int:
        """Deterministic: a draft holds each time its rate has added up to another whole."""
        for position in range(depth):
            self._owed[index][position] += self.rates[index][position]
            if self._owed[index][position] < 1:
                return position
            self._owed[index][position] -= 1
        return depth

    def share(self, depth: int, index: int = 0, last: int = 150) -> float:
        """Of the last steps, those in which a sequence was drafted for at that depth."""
        return sum(depths[index] == depth for depths in self.depths[-last:]) / last


def linear(base: float, per_draft: float) -> Callable[[list[int]], float]:
    return lambda depths: base + per_draft * sum(depths)


@pytest.mark.parametrize(
    ("rates", "per_draft", "best"),
    [
        ([0.8, 0.1, 0.1], 0.2, 1),  # 1.8 tokens for 1.2; a second adds 0.08 for 0.2
        ([0.9, 0.9, 0.9], 0.1, 3),
        ([0.8, 0.8, 0.1], 0.2, 2),  # 2.44 for 1.4 against 1.8 for 1.2 and 2.5 for 1.6
        ([0.3, 0.3, 0.3], 0.5, 0),
        ([0.9, 0.9, 0.9], 2.0, 0),
    ],
)
def test_it_settles_at_the_depth_that_is_fastest(rates: list[float], per_draft: float, best: int) -> None:
    engine = MadeUpEngine(3, [rates], linear(1.0, per_draft))
    engine.run(800)
    assert engine.share(best) > 0.9


def test_it_notices_when_drafting_no_longer_pays_and_when_it_pays_again() -> None:
    engine = MadeUpEngine(1, [[0.6]], linear(1.0, 0.1))
    engine.run(300)
    assert engine.share(1) > 0.9
    engine.seconds = linear(1.0, 2.0)
    engine.run(1000)
    assert engine.share(0) > 0.9
    engine.seconds = linear(1.0, 0.1)
    engine.run(1000)
    assert engine.share(1) > 0.9


def test_not_drafting_pays_for_the_layer_that_follows_along() -> None:
    """A step of 1.0 for one token, but each tenth takes 11: drafting, 1.8 tokens for 2.7, is faster than it looks."""
    policy = DraftPolicy(1)
    acceptances = [Acceptance([0.8])]
    chosen: list[int] = []
    for number in range(600):
        chosen += policy.choose(acceptances)
        followed = chosen[-1] == 0 and number % 10 == 0
        policy.note_step(1, 2.7 if chosen[-1] else 11.0 if followed else 1.0, followed)
    assert sum(chosen[-200:]) > 180


def test_one_slow_step_changes_nothing() -> None:
    engine = MadeUpEngine(1, [[0.7]], linear(1.0, 0.2))
    engine.run(300)
    engine.policy.note_step(1, 60.0, False)
    engine.run(50)
    assert engine.share(1, last=50) > 0.9


def test_a_sequence_that_rejects_its_drafts_gets_none_while_others_do() -> None:
    """Together a depth pays well, but not for the one whose drafts never hold."""
    engine = MadeUpEngine(1, [[0.9]] * 7 + [[0.0]], linear(1.0, 0.06))
    engine.run(800)
    assert engine.share(1, index=0) > 0.9
    assert engine.share(0, index=7) > 0.8
    assert engine.share(1, index=7) > 0  # but it is looked at again


def test_batch_sizes_are_judged_apart() -> None:
    """Alone a draft is cheap; with many sequences its rows cost more than they bring."""
    policy = DraftPolicy(1)
    one, many = [Acceptance([0.8])], [Acceptance([0.8]) for _ in range(32)]
    for acceptances, seconds in ((one, (1.0, 1.1)), (many, (2.0, 4.5))):
        for _ in range(40):
            depth = max(policy.choose(acceptances))
            policy.note_step(len(acceptances), seconds[depth], False)
    assert policy.choose(one) == [1]
    assert policy.choose(many) == [0] * 32


def test_new_sequences_begin_with_what_the_others_had() -> None:
    policy = DraftPolicy(1)
    acceptance = policy.new_acceptance()
    for _ in range(400):
        policy.note_verified(acceptance, 1, 0)
    assert policy.new_acceptance().rates[0] < 0.1
