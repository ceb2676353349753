"""Joins frames that wait for the expert group at the same time into one kernel call.

Reading an expert's weights from memory costs the same for one row as for four, so frames of the same layer from
several routers are worth more together. Nothing waits for company: a frame that finds the group idle is computed
alone, at once, and what arrives meanwhile forms the next call. There is no thread here: the thread of the frame that
leads a call computes for the others. Frames that one thread brings together (those of all routers' streams, say) are
joined in the same way.

The credit of the streams bounds the queue. A row's result does not depend on the frames beside it as far as the kernel
computes rows independently of each other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from experts.errors import Overloaded
from experts.wire import ComputeFrame

logger = logging.getLogger(__name__)

# Of the float32 result of joined frames; a frame that is larger by itself is computed alone.
MAX_JOINED_BYTES = 64 * 1024 * 1024


class FrameComputer(Protocol):
    """What computes: an ExpertGroup."""

    def compute(self, frame: ComputeFrame) -> torch.Tensor: ...


class Computed(NamedTuple):
    """tensor: as ExpertGroup.compute returns, or float32 if frames of several dtypes were joined. started_s, ended_s:
    when the kernel call began and ended, of time.monotonic. num_frames: frames in it."""

    tensor: torch.Tensor
    started_s: float
    ended_s: float
    num_frames: int


class Entry:
    """A frame and what becomes of it. received_s, deadline_s: of time.monotonic. is_wanted is asked when its turn
    comes. woken without an outcome: lead the next call."""

    def __init__(
        self, frame: ComputeFrame, received_s: float, deadline_s: float, is_wanted: Callable[[], bool]
    ) -> None:
        self.frame = frame
        self.received_s = received_s
        self.deadline_s = deadline_s
        self.is_wanted = is_wanted
        # Released once: an Event would take several times as long to make.
        self.woken = threading.Lock()
        self.woken.acquire()
        self.outcome: Computed | BaseException | None = None
        self.key = (frame.layer_id, frame.exact, frame.hidden_states.shape[1])
        self.result_bytes = frame.num_result_rows * frame.hidden_states.shape[1] * torch.float32.itemsize


class Batcher:
    """Gives frames their turn. compute_all() is called from many threads, one call per thread at a time."""

    def __init__(self, group: FrameComputer) -> None:
        self._group = group
        self._lock = threading.Lock()
        self._is_busy = False
        self._waiting: list[Entry] = []

    def compute_all(self, entries: Sequence[Entry]) -> Iterator[Entry]:
        """Compute checked frames (at least one) when their turn comes, with others that wait and can be joined.

        Yields each entry once it has its outcome, in their order: Overloaded if its turn came after its deadline or
        it is not wanted any more, else what the group gave or raised for it. The caller must exhaust the iterator.
        """
        with self._lock:
            leads = not self._is_busy
            self._is_busy = True
            self._waiting += entries[1:] if leads else entries
        for entry in entries:
            if not leads:
                try:
                    self._wait(entry)
                except Overloaded as error:
                    entry.outcome = error
            leads = False
            if entry.outcome is None:
                self._lead(entry)
            yield entry

    def _wait(self, entry: Entry) -> None:
        """Until the frame is computed or has to lead the next call."""
        if entry.woken.acquire(timeout=max(0.0, entry.deadline_s - time.monotonic())):
            return
        with self._lock:
            if entry in self._waiting:
                self._waiting.remove(entry)
                raise Overloaded("the frame's turn did not come within the time that the router allows")
        # It is being computed, or was told to lead just now: either ends soon.
        entry.woken.acquire()

    def _lead(self, leader: Entry) -> None:
        """Compute leader's frame and what can be joined with it, then hand over to the oldest frame left."""
        with self._lock:
            batch = [leader, *self._take_joinable(leader)]
        try:
            _compute_together(self._group, batch)
        except BaseException as error:  # of this thread alone, such as an interrupt: nobody may wait for ever
            for entry in batch:
                entry.outcome = entry.outcome or Overloaded("the call was given up")
            raise error
        finally:
            for entry in batch[1:]:
                entry.woken.release()
            with self._lock:
                if self._waiting:
                    self._waiting.pop(0).woken.release()
                else:
                    self._is_busy = False

    def _take_joinable(self, leader: Entry) -> list[Entry]:
        """Remove and return the waiting frames that fit in one call with leader's, oldest first."""
        taken: list[Entry] = []
        num_bytes = leader.result_bytes
        for entry in self._waiting:
            if entry.key == leader.key and num_bytes + entry.result_bytes <= MAX_JOINED_BYTES:
                taken.append(entry)
                num_bytes += entry.result_bytes
        self._waiting = [entry for entry in self._waiting if entry not in taken]
        return taken


def join_frames(frames: Sequence[ComputeFrame]) -> ComputeFrame:
    """One frame with the rows of all, one after the other. The frames are of one layer, width and combine mode."""
    if len(frames) == 1:
        return frames[0]
    first = frames[0]
    starts = np.cumsum([0, *(frame.hidden_states.shape[0] for frame in frames[:-1])], dtype=np.int32)
    alike = len({(frame.hidden_states.dtype, frame.reply_dtype) for frame in frames}) == 1 and first.scales is None
    hidden_states = [frame.hidden_states if alike else frame.load_hidden_states(torch.float32) for frame in frames]
    return ComputeFrame(
        frame_id=first.frame_id,
        incarnation=first.incarnation,
        table_version=first.table_version,
        layer_id=first.layer_id,
        hidden_states=torch.cat(hidden_states),
        pair_rows=np.concatenate([frame.pair_rows + start for frame, start in zip(frames, starts, strict=True)]),
        pair_experts=np.concatenate([frame.pair_experts for frame in frames]),
        pair_weights=np.concatenate([frame.pair_weights for frame in frames]),
        exact=first.exact,
        deadline_ms=first.deadline_ms,
        reply_dtype=first.reply_dtype if alike else torch.float32,
    )


def _compute_together(group: FrameComputer, batch: Sequence[Entry]) -> None:
    """Give every entry its outcome. If the joined call fails, each frame is computed alone: one may be to blame."""
    wanted: list[Entry] = []
    now_s = time.monotonic()
    for entry in batch:
        if now_s >= entry.deadline_s:
            entry.outcome = Overloaded(f"deadline of {entry.frame.deadline_ms} ms passed before the frame's turn came")
        elif not entry.is_wanted():
            entry.outcome = Overloaded("the router closed the stream before the frame's turn came")
        else:
            wanted.append(entry)
    if len(wanted) > 1:
        try:
            _compute_joined(group, wanted)
            return
        except Exception as error:
            # Whose fault it was shows when each is computed alone, and that one is told.
            logger.warning("a joined call of %d frames failed, computing each alone: %s", len(wanted), error)
    for entry in wanted:
        try:
            _compute_joined(group, [entry])
        except Exception as error:
            entry.outcome = error


def _compute_joined(group: FrameComputer, entries: Sequence[Entry]) -> None:
    started_s = time.monotonic()
    result = group.compute(join_frames([entry.frame for entry in entries]))
    ended_s = time.monotonic()
    if len(entries) == 1:
        entries[0].outcome = Computed(result, started_s, ended_s, 1)
        return
    parts = result.split([entry.frame.num_result_rows for entry in entries])
    for entry, part in zip(entries, parts, strict=True):
        entry.outcome = Computed(part, started_s, ended_s, len(entries))
