"""The parts of a step's time are counted where they are spent, and explain most of it."""

import asyncio
from pathlib import Path

from tests.router.in_process import LocalDispatcher, build_engine, collect, load_groups, request


async def test_every_part_of_a_step_is_counted(tiny_checkpoint: Path) -> None:
    engine = build_engine(tiny_checkpoint, LocalDispatcher(load_groups(tiny_checkpoint, 1)))
    task = asyncio.create_task(engine.run())
    try:
        await collect(engine.submit(request([0, 5, 9], 4)))
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    times = engine.progress().times
    parts = (times.attention_ns, times.gate_ns, times.scatter_ns, times.wait_ns, times.shared_ns, times.head_ns)
    assert all(part > 0 for part in (*parts, times.sample_ns, times.step_ns))
    assert sum(parts) + times.sample_ns + times.overhead_ns == times.step_ns
