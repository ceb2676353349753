"""The process that compiles clients' grammars may hang, die and be killed; the next grammar finds another."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from router.api.errors import BadRequest, Unavailable
from router.api.grammar_check import GrammarChecker
from router.v1 import router_pb2


def regex(text: str) -> router_pb2.Grammar:
    return router_pb2.Grammar(regex=text)


def process_of(checker: GrammarChecker) -> asyncio.subprocess.Process:
    process = checker._process  # pyright: ignore[reportPrivateUsage]
    assert process is not None
    return process


def pid_of(checker: GrammarChecker) -> int:
    return process_of(checker).pid


async def test_a_process_that_hangs_is_killed_and_replaced(checkpoint: Path) -> None:
    checker = GrammarChecker(checkpoint, timeout_s=0.5)
    try:
        await checker.check(regex("a"), "x")
        first = pid_of(checker)
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(BadRequest, match="too long"):
            await checker.check(regex("b"), "x")
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        await checker.check(regex("c"), "x")
        assert pid_of(checker) != first
    finally:
        await checker.close()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("is_known", [False, True])
def test_a_process_that_has_died_is_replaced_before_anybody_notices(
    checkpoint: Path, new_loop: Callable[[], asyncio.AbstractEventLoop], is_known: bool
) -> None:
    """is_known: the loop has been told of its end."""

    async def run() -> None:
        checker = GrammarChecker(checkpoint)
        try:
            await checker.check(regex("a"), "x")
            first = pid_of(checker)
            os.kill(first, signal.SIGKILL)
            if is_known:
                await process_of(checker).wait()
            await checker.check(regex("b"), "x")
            assert pid_of(checker) != first
            with pytest.raises(BadRequest):
                await checker.check(regex("(bad"), "x")
        finally:
            await checker.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(asyncio.wait_for(run(), 60.0))


async def test_a_process_that_does_not_start_is_nobodys_fault(tmp_path: Path) -> None:
    checker = GrammarChecker(tmp_path)  # no checkpoint
    with pytest.raises(Unavailable):
        await checker.check(regex("a"), "x")


async def test_a_client_that_leaves_takes_no_answer_of_the_next_one(checkpoint: Path) -> None:
    checker = GrammarChecker(checkpoint)
    try:
        await checker.check(regex("a"), "x")
        leaving = asyncio.create_task(checker.check(regex("(bad"), "x"))
        await asyncio.sleep(0)
        leaving.cancel()
        await checker.check(regex("good"), "x")
        with pytest.raises(BadRequest):
            await checker.check(regex("(bad"), "x")
    finally:
        await checker.close()


async def test_many_at_once_all_get_their_own_answer(checkpoint: Path) -> None:
    checker = GrammarChecker(checkpoint)
    try:
        texts = [f"({n}" if n % 2 else f"({n})" for n in range(20)]
        results = await asyncio.gather(*(checker.check(regex(text), "x") for text in texts), return_exceptions=True)
        assert [isinstance(result, BadRequest) for result in results] == [bool(n % 2) for n in range(20)]
    finally:
        await checker.close()
