"""The turns between steps: handlers and requests that take several of them, and clients that never read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from router.loop_turns import LONGEST_S, give_turns


class Clock:
    """Goes on by turn_s whenever it is read."""

    def __init__(self, turn_s: float) -> None:
        self.now_s = 0.0
        self._turn_s = turn_s

    def __call__(self) -> float:
        self.now_s += self._turn_s
        return self.now_s


async def count_up(counter: list[int], num_turns: int, times: int = 1) -> None:
    """Something that happens after so many turns of the loop, again and again."""
    for _ in range(times):
        for _ in range(num_turns):
            await asyncio.sleep(0)
        counter[0] += 1


def run(give: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(10.0):
            await give()

    asyncio.run(main())


def test_outputs_that_take_several_turns_each_are_waited_for() -> None:
    async def give() -> None:
        taken = [0]
        handlers = [asyncio.create_task(count_up(taken, num_turns)) for num_turns in (1, 5, 10)]
        await give_turns(lambda: 3 - taken[0], lambda: 0, Clock(1e-5))
        assert taken == [3]
        await asyncio.gather(*handlers)

    run(give)


def test_a_burst_of_requests_comes_in_between_two_steps() -> None:
    async def give() -> None:
        submitted = [0]
        client = asyncio.create_task(count_up(submitted, 7, times=30))
        # The first arrives within the one turn that is given anyway.
        for _ in range(7):
            await asyncio.sleep(0)
        await give_turns(lambda: 0, lambda: submitted[0], Clock(1e-5))
        assert submitted == [30]
        await client

    run(give)


def test_nothing_to_wait_for_is_one_turn() -> None:
    async def give() -> None:
        clock = Clock(1e-5)
        await give_turns(lambda: 0, lambda: 0, clock)
        assert clock.now_s < 3e-5

    run(give)


def test_a_client_that_does_not_read_holds_nobody_up() -> None:
    async def give() -> None:
        clock = Clock(1e-5)
        await give_turns(lambda: 1, lambda: 0, clock)
        assert clock.now_s < LONGEST_S

    run(give)


def test_requests_without_end_do_not_stop_the_running_ones() -> None:
    async def give() -> None:
        clock = Clock(1e-4)
        began_s = time.monotonic()
        submitted = [0]

        def submit() -> int:
            submitted[0] += 1
            return submitted[0]

        await give_turns(lambda: 0, submit, clock)
        assert LONGEST_S <= clock.now_s <= 2 * LONGEST_S
        assert time.monotonic() - began_s < 5.0

    run(give)
