"""Joining frames: what is merged, what is not, who gets which rows, and what happens to the neighbours of a bad one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from experts.activation_quantization import quantize_rows
from experts.batcher import Batcher, Computed, Entry, join_frames
from experts.checkpoint import Checkpoint
from experts.errors import Overloaded
from experts.expert_range import split_experts
from experts.group import ExpertGroup
from experts.weights import load_expert_weights
from experts.wire import ComputeFrame, decode_request, encode_request

TIMEOUT_S = 20.0


def make_frame(seed: int, **overrides: Any) -> ComputeFrame:
    """1 to 4 rows, each choosing 2 of 4 experts."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = overrides.pop("num_rows", 1 + seed % 4)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2].sort().values for _ in range(num_rows)])
    request: dict[str, Any] = {
        "frame_id": seed,
        "incarnation": 1,
        "table_version": 1,
        "layer_id": 1,
        "hidden_states": torch.randn(num_rows, 192, generator=generator),
        "pair_rows": torch.arange(num_rows, dtype=torch.int32).repeat_interleave(2),
        "pair_experts": chosen.reshape(-1).to(torch.int32),
        "pair_weights": torch.rand(2 * num_rows, generator=generator) + 0.1,
        "exact": False,
        "deadline_ms": 20_000,
        **overrides,
    }
    return decode_request(encode_request(**request))


class RecordingGroup:
    """Answers with the sum of each row's pair weights; holds every call until told. poison: a value that fails it."""

    def __init__(self) -> None:
        self.calls: list[ComputeFrame] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.poison: float | None = None

    def compute(self, frame: ComputeFrame) -> torch.Tensor:
        self.calls.append(frame)
        self.entered.release()
        assert self.gate.wait(TIMEOUT_S)
        if self.poison is not None and (frame.hidden_states == self.poison).any():
            raise RuntimeError("poison")
        if frame.exact:
            return torch.from_numpy(frame.pair_weights.copy()).unsqueeze(1).expand(-1, 192)
        sums = np.bincount(frame.pair_rows, frame.pair_weights.astype(np.float64), frame.num_result_rows)
        return torch.from_numpy(sums.astype(np.float32)).unsqueeze(1).expand(-1, 192)


def compute(
    batcher: Batcher, frame: ComputeFrame, timeout_s: float = TIMEOUT_S, is_wanted: Callable[[], bool] = lambda: True
) -> Computed:
    """One frame by itself, as a thread of its own brings it. Raises what became of it otherwise."""
    now_s = time.monotonic()
    (entry,) = batcher.compute_all([Entry(frame, now_s, now_s + timeout_s, is_wanted)])
    assert entry.outcome is not None
    if isinstance(entry.outcome, BaseException):
        raise entry.outcome
    return entry.outcome


class Queue:
    """A batcher whose group is busy with a first frame, so that what is sent next waits together."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.group = RecordingGroup()
        self.batcher = Batcher(self.group)
        self._pool = pool
        self.first = self.send(make_frame(1, layer_id=7))
        assert self.group.entered.acquire(timeout=TIMEOUT_S)

    def send(
        self, frame: ComputeFrame, *, timeout_s: float = TIMEOUT_S, is_wanted: Callable[[], bool] = lambda: True
    ) -> Future[Computed]:
        return self._pool.submit(compute, self.batcher, frame, timeout_s, is_wanted)

    def send_waiting(self, frame: ComputeFrame, **options: Any) -> Future[Computed]:
        """Send, and return once it waits."""
        waiting = self.batcher._waiting  # pyright: ignore[reportPrivateUsage]
        before = len(waiting)
        sent = self.send(frame, **options)
        deadline = time.monotonic() + TIMEOUT_S
        while len(self.batcher._waiting) == before:  # pyright: ignore[reportPrivateUsage]
            assert time.monotonic() < deadline
            threading.Event().wait(0.001)
        return sent


@pytest.fixture
def waiting() -> Iterator[Queue]:
    with ThreadPoolExecutor(16) as pool:
        queue = Queue(pool)
        yield queue
        queue.group.gate.set()


def expect(sent: Future[Computed], frame: ComputeFrame) -> Computed:
    computed = sent.result(TIMEOUT_S)
    alone = RecordingGroup()
    alone.gate.set()
    assert torch.equal(computed.tensor, alone.compute(frame))
    return computed


@pytest.mark.parametrize("exact", [False, True])
def test_frames_that_wait_together_are_one_call_and_each_gets_its_own_rows(waiting: Queue, exact: bool) -> None:
    frames = [make_frame(seed, exact=exact) for seed in range(5)]
    sent = [waiting.send_waiting(frame) for frame in frames]
    waiting.group.gate.set()
    assert [expect(future, frame).num_frames for future, frame in zip(sent, frames, strict=True)] == [5] * 5
    assert len(waiting.group.calls) == 2
    assert waiting.first.result(TIMEOUT_S).num_frames == 1
    joined = waiting.group.calls[1]
    assert torch.equal(joined.hidden_states, torch.cat([frame.hidden_states for frame in frames]))
    order = joined.pair_rows.astype(np.int64) << 32 | joined.pair_experts
    assert (order[1:] > order[:-1]).all()  # sorted by row, then expert: what a kernel may rely on


def test_other_layers_and_combine_modes_are_calls_of_their_own_in_their_order(waiting: Queue) -> None:
    frames = [
        make_frame(2),
        make_frame(3, layer_id=2),
        make_frame(4),
        make_frame(5, exact=True),
        make_frame(6, layer_id=2),
    ]
    sent = [waiting.send_waiting(frame) for frame in frames]
    waiting.group.gate.set()
    for future, frame in zip(sent, frames, strict=True):
        expect(future, frame)
    assert [(call.layer_id, call.exact) for call in waiting.group.calls[1:]] == [(1, False), (2, False), (1, True)]


def test_a_frame_that_finds_the_group_idle_is_not_kept_waiting() -> None:
    group = RecordingGroup()
    group.gate.set()
    batcher = Batcher(group)
    for seed in range(3):
        assert compute(batcher, make_frame(seed)).num_frames == 1


def test_a_joined_call_is_bounded(waiting: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.batcher.MAX_JOINED_BYTES", 2 * 192 * 4)
    frames = [make_frame(seed, num_rows=1) for seed in range(4)] + [make_frame(9, num_rows=3)]
    sent = [waiting.send_waiting(frame) for frame in frames]
    waiting.group.gate.set()
    for future, frame in zip(sent, frames, strict=True):
        expect(future, frame)
    assert [call.hidden_states.shape[0] for call in waiting.group.calls[1:]] == [2, 2, 3]


def test_a_frame_that_fails_does_not_spoil_its_neighbours(waiting: Queue) -> None:
    waiting.group.poison = 666.0
    bad = make_frame(3, hidden_states=torch.full((4, 192), 666.0))
    frames = [make_frame(2), bad, make_frame(4)]
    sent = [waiting.send_waiting(frame) for frame in frames]
    waiting.group.gate.set()
    expect(sent[0], frames[0])
    expect(sent[2], frames[2])
    with pytest.raises(RuntimeError, match="poison"):
        sent[1].result(TIMEOUT_S)


def test_late_and_unwanted_frames_are_shed_and_the_rest_is_computed(waiting: Queue) -> None:
    frames = [make_frame(seed) for seed in range(4)]
    late = waiting.send_waiting(frames[0], timeout_s=0.05)
    with pytest.raises(Overloaded, match="turn did not come"):
        late.result(TIMEOUT_S)
    unwanted = waiting.send_waiting(frames[1], is_wanted=lambda: False)
    sent = [waiting.send_waiting(frame) for frame in frames[2:]]
    waiting.group.gate.set()
    for future, frame in zip(sent, frames[2:], strict=True):
        assert expect(future, frame).num_frames == 2
    with pytest.raises(Overloaded, match="closed the stream"):
        unwanted.result(TIMEOUT_S)
    assert len(waiting.group.calls) == 2


def test_many_threads_get_their_own_results_and_nobody_waits_for_ever() -> None:
    group = RecordingGroup()
    group.gate.set()
    batcher = Batcher(group)

    def ask(worker: int) -> None:
        for number in range(50):
            frame = make_frame(worker * 50 + number, layer_id=1 + number % 2, exact=bool(number % 3))
            sent = compute(batcher, frame)
            alone = RecordingGroup()
            alone.gate.set()
            assert torch.equal(sent.tensor, alone.compute(frame))

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(ask, worker) for worker in range(8)]:
            future.result(TIMEOUT_S)


def test_joining_never_changes_a_row_where_the_kernel_computes_rows_alone(fp8_checkpoint: Checkpoint) -> None:
    """Frames of several wire dtypes: each row as if it had come alone."""
    weights = load_expert_weights(fp8_checkpoint, split_experts(fp8_checkpoint.config, 2)[0], torch.bfloat16)
    group = ExpertGroup(weights)
    if "grouped" in group.numerics_id:
        pytest.skip("torch's products depend on the number of rows")
    hidden_states = torch.randn(4, 192, generator=torch.Generator().manual_seed(0))
    frames = [
        make_frame(3, hidden_states=hidden_states.to(torch.bfloat16)),
        make_frame(7, hidden_states=hidden_states),
        make_frame(11, hidden_states=quantize_rows(hidden_states), reply_dtype=torch.float32),
    ]
    for chosen in (frames, frames[1:2] * 3, frames[:2]):
        joined = group.compute(join_frames(chosen)).split(4)
        for frame, part in zip(chosen, joined, strict=True):
            assert torch.equal(part.to(frame.reply_dtype), group.compute(frame))


def test_frames_that_one_thread_brings_together_are_joined_and_keep_their_order() -> None:
    group = RecordingGroup()
    group.gate.set()
    frames = [make_frame(2), make_frame(3, layer_id=2), make_frame(4), make_frame(5, layer_id=2)]
    now_s = time.monotonic()
    entries = [Entry(frame, now_s, now_s + TIMEOUT_S, lambda: True) for frame in frames]
    assert list(Batcher(group).compute_all(entries)) == entries
    assert [call.layer_id for call in group.calls] == [1, 2]
    for entry in entries:
        alone = RecordingGroup()
        alone.gate.set()
        assert isinstance(entry.outcome, Computed) and entry.outcome.num_frames == 2
        assert torch.equal(entry.outcome.tensor, alone.compute(entry.frame))
