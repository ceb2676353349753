"""The event loop's share of time between two steps of the engine.

A step hardly lets the loop run: it computes and waits in native code. Everybody else on the loop - handlers that send
tokens, new requests - takes several of its turns for each thing: grpc.aio's threads tell it that a message went out,
and that a request is there, and it takes in one request after the other. With a single turn per step a burst of 32
requests took 32 steps to be let in, and each stream got three tokens at a time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

# After so many turns without progress, grpc.aio's threads are given a core for a while, once.
QUIET_TURNS = 8
BREAK_S = 0.001
# What a further request of a burst may take until it is here.
NEXT_REQUEST_S = 0.0005
# In all: the running sequences wait meanwhile.
LONGEST_S = 0.005


async def give_turns(
    count_untaken: Callable[[], int], count_submitted: Callable[[], int], clock: Callable[[], float] = time.monotonic
) -> None:
    """Let the loop run until the outputs are taken and no request of a burst is missing; one turn at least.

    count_untaken: outputs that their handlers have not come for yet. count_submitted: requests so far.
    clock: in seconds.
    """
    deadline_s = clock() + LONGEST_S
    untaken, submitted = count_untaken(), count_submitted()
    submitted_s, num_quiet, had_break = -math.inf, 0, False
    while True:
        await asyncio.sleep(0)
        now_s = clock()
        untaken_before, untaken = untaken, count_untaken()
        submitted_before, submitted = submitted, count_submitted()
        if submitted != submitted_before:
            submitted_s = now_s
        num_quiet = num_quiet + 1 if untaken == untaken_before and submitted == submitted_before else 0
        if untaken and num_quiet == QUIET_TURNS and not had_break:
            had_break, num_quiet = True, 0
            await asyncio.sleep(BREAK_S)
            continue
        is_quiet = not untaken or num_quiet >= QUIET_TURNS
        if now_s >= deadline_s or (is_quiet and now_s - submitted_s >= NEXT_REQUEST_S):
            return
