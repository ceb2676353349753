"""A request with many prompts gives routers a few of them at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from router.api.prompt_backlog import PromptBacklog


class Prompt:
    """One that waits for its turn, or has it."""

    def __init__(self, backlog: PromptBacklog, num_tokens: int) -> None:
        self.leave: Callable[[], None] | None = None
        self.task = asyncio.create_task(self._enter(backlog, num_tokens))

    async def _enter(self, backlog: PromptBacklog, num_tokens: int) -> None:
        self.leave = await backlog.enter(num_tokens)


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def begin(backlog: PromptBacklog, *sizes: int) -> list[Prompt]:
    prompts = [Prompt(backlog, size) for size in sizes]
    await settle()
    return prompts


def list_inside(prompts: list[Prompt]) -> list[int]:
    return [index for index, prompt in enumerate(prompts) if prompt.leave is not None]


async def test_prompts_enter_in_order_as_others_are_answered() -> None:
    prompts = await begin(PromptBacklog(100), 40, 60, 50, 10)
    assert list_inside(prompts) == [0, 1]
    assert prompts[0].leave is not None and prompts[1].leave is not None
    prompts[0].leave()
    await settle()
    assert list_inside(prompts) == [0, 1]  # the third is too long yet, and the fourth does not overtake it
    prompts[1].leave()
    await settle()
    assert list_inside(prompts) == [0, 1, 2, 3]


async def test_a_prompt_longer_than_the_backlog_enters_alone() -> None:
    prompts = await begin(PromptBacklog(100), 1000, 1)
    assert list_inside(prompts) == [0]
    assert prompts[0].leave is not None
    prompts[0].leave()
    await settle()
    assert list_inside(prompts) == [0, 1]


async def test_leaving_twice_counts_once() -> None:
    prompts = await begin(PromptBacklog(100), 50, 50, 50, 50)
    assert prompts[0].leave is not None
    prompts[0].leave()
    prompts[0].leave()
    await settle()
    assert list_inside(prompts) == [0, 1, 2]


async def test_whoever_is_cancelled_gives_its_place_to_the_next() -> None:
    backlog = PromptBacklog(100)
    prompts = await begin(backlog, 100, 100, 100)
    assert prompts[0].leave is not None
    prompts[1].task.cancel()  # while it waits
    prompts[0].leave()
    prompts[2].task.cancel()  # as its turn comes
    await settle()
    assert prompts[1].task.cancelled() and prompts[2].task.cancelled()
    assert list_inside(await begin(backlog, 100)) == [0]
