"""A router's parts in the test's own process: tiny weights, experts reached by a plain call or by real gRPC."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import enum
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experts.batcher import Entry
from experts.checkpoint import Checkpoint
from experts.errors import NotHosted, Overloaded
from experts.expert_range import list_hosted_pairs, split_experts
from experts.group import ExpertGroup
from experts.router_streams import UNAVAILABLE, StreamBroken
from experts.server import ExpertServer, ReplicaIdentity
from experts.weights import load_expert_weights
from experts.wire import Buffer, ComputeFrame, encode_response_parts
from router.decoder_layer import ExpertDispatcher
from router.drafter import Drafter
from router.engine import Engine
from router.expert_table import ExpertTable, GroupEntry, ReplicaEntry
from router.latent_cache import LatentCache
from router.sampler import SamplingParams
from router.scheduler import SchedulerLimits
from router.sequence import GenerationRequest, Sequence, SequenceOutput
from router.trunk import Trunk
from router.weights import load_trunk_weights

DEADLINE_S = 20.0
GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


class Fault(enum.Enum):
    """What a replica does to the next frames it gets."""

    DIE_BEFORE = "breaks the stream instead of computing"
    DIE_AFTER = "computes, then breaks the stream instead of answering"
    SLOW = "answers after the router has given up"
    WRONG_SHAPE = "answers with a row too many"
    OVERLOADED = "sheds the frame"
    NOT_HOSTED = "says it does not host an expert that the table places there"
    GARBLED = "answers with bytes that are no message"
    NOT_FINITE = "answers with a number that is none"
    TWICE = "answers twice"
    WRONG_FRAME = "answers a frame that it was not sent"
    TRUNCATED = "answers with the last bytes missing"


class FaultyExpertServer(ExpertServer):
    """A real server whose next num_faults frames meet a fault. num_frames counts every frame."""

    slow_s = 1.0

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, native=False, **keywords)
        self.fault: Fault | None = None
        self.num_faults = 0
        self.num_frames = 0
        self._spoiled_ids: list[int] = []
        self.frame_arrived = threading.Event()

    def _check(self, frame: ComputeFrame) -> None:
        self.num_frames += 1
        self.frame_arrived.set()
        if self.num_faults == 0:
            super()._check(frame)
            return
        self.num_faults -= 1
        match self.fault:
            case Fault.DIE_BEFORE:
                raise StreamBroken(UNAVAILABLE, "fault")
            case Fault.OVERLOADED:
                raise Overloaded("fault")
            case Fault.NOT_HOSTED:
                raise NotHosted("fault")
            case Fault.SLOW:
                time.sleep(self.slow_s)  # the fault itself, not a wait for something
            case None:
                raise AssertionError("num_faults without a fault")
            case _:
                self._spoiled_ids.append(frame.frame_id)

    def _encode(self, entry: Entry) -> list[Buffer]:
        answer = super()._encode(entry)
        frame = entry.frame
        if frame.frame_id not in self._spoiled_ids:
            return answer
        self._spoiled_ids.remove(frame.frame_id)
        match self.fault:
            case Fault.DIE_AFTER:
                raise StreamBroken(UNAVAILABLE, "fault")
            case Fault.WRONG_SHAPE:
                return _answer(frame, frame.frame_id, frame.num_result_rows + 1)
            case Fault.WRONG_FRAME:
                return _answer(frame, frame.frame_id + 1_000_000, frame.num_result_rows)
            case Fault.NOT_FINITE:
                return _answer(frame, frame.frame_id, frame.num_result_rows, float("nan"))
            case Fault.TRUNCATED:
                return [*answer[:-1], answer[-1][:-4]]
            case Fault.TWICE:
                stream = next(iter(self._streams._streams.values()))  # pyright: ignore[reportPrivateUsage]
                stream.messages.send(0, answer, sum(map(len, answer)))
                return answer
            case _:
                return [b"\xff\xff\xff"]


def _answer(frame: ComputeFrame, frame_id: int, num_rows: int, first: float = 0.0) -> list[Buffer]:
    tensor = torch.zeros(num_rows, frame.hidden_states.shape[1])
    tensor[0, 0] = first
    return encode_response_parts(
        frame_id=frame_id,
        incarnation=frame.incarnation,
        tensor=tensor,
        queue_us=0,
        compute_us=0,
        dtype=frame.reply_dtype,
    )


def load_groups(folder: Path, num_groups: int, dtype: torch.dtype = torch.float32) -> list[ExpertGroup]:
    checkpoint = Checkpoint(folder)
    return [
        ExpertGroup(load_expert_weights(checkpoint, hosted, dtype))
        for hosted in split_experts(checkpoint.config, num_groups)
    ]


def start_replica(group: ExpertGroup, name: str, replica_id: str) -> FaultyExpertServer:
    server = FaultyExpertServer(group, ReplicaIdentity(name, replica_id, incarnation=time.time_ns()))
    server.start()
    return server


def entry_of(server: ExpertServer, group: ExpertGroup) -> ReplicaEntry:
    identity = server._identity  # pyright: ignore[reportPrivateUsage]
    return ReplicaEntry(
        identity.replica_id, server.endpoint, identity.incarnation, group.weight_digest, group.numerics_id
    )


def build_table(version: int, groups: list[ExpertGroup], servers: list[list[ExpertServer]]) -> ExpertTable:
    """servers[i]: the replicas of groups[i]."""
    return ExpertTable(
        version,
        tuple(
            GroupEntry(f"g{index}", tuple(group.hosted), tuple(entry_of(server, group) for server in replicas))
            for index, (group, replicas) in enumerate(zip(groups, servers, strict=True))
        ),
    )


class LocalDispatcher:
    """decoder_layer.ExpertDispatcher by plain calls: same plan and sums, no transport. Can be told to fail or wait."""

    def __init__(self, groups: list[ExpertGroup]) -> None:
        self._groups = groups
        self._hosted = {group: set(list_hosted_pairs(group.config, tuple(group.hosted))) for group in groups}
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        # Experts that each row is said to have done without in each layer.
        self.num_left_out = 0
        # Rows that each layer has asked for.
        self.num_rows = collections.Counter[int]()

    async def scatter(
        self, layer_id: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Any:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.num_rows[layer_id] += hidden_states.shape[0]
        total = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for row in range(hidden_states.shape[0]):
            order = topk_ids[row].argsort()
            for group in self._groups:
                owned = [i for i in order.tolist() if (layer_id, int(topk_ids[row, i])) in self._hosted[group]]
                if owned:
                    frame = ComputeFrame(
                        frame_id=1, incarnation=0, table_version=0, layer_id=layer_id,
                        hidden_states=hidden_states[row : row + 1].float(),
                        pair_rows=torch.zeros(len(owned), dtype=torch.int32).numpy(),
                        pair_experts=topk_ids[row, owned].int().numpy(),
                        pair_weights=topk_weights[row, owned].numpy(),
                        exact=False, deadline_ms=1000, reply_dtype=torch.float32,
                    )  # fmt: skip
                    total[row] += group.compute(frame)[0]
        return _Gathered(total, self.num_left_out)


class _Gathered:
    def __init__(self, total: torch.Tensor, num_left_out: int) -> None:
        self._total = total
        self.num_left_out = np.full(len(total), num_left_out, dtype=np.int32) if num_left_out else None

    async def gather(self) -> torch.Tensor:
        return self._total


def build_engine(
    folder: Path,
    dispatcher: ExpertDispatcher,
    *,
    limits: SchedulerLimits | None = None,
    max_model_len: int = 256,
    deterministic: bool = True,
    drafter: Drafter | None = None,
    find_outage: Callable[[], str | None] = lambda: None,
) -> Engine:
    checkpoint = Checkpoint(folder)
    limits = limits or SchedulerLimits(max_num_seqs=16, max_batched_tokens=512, num_blocks=128, max_waiting=32)
    with torch.inference_mode():
        trunk = Trunk(
            checkpoint.config,
            load_trunk_weights(checkpoint, torch.float32),
            dispatcher,
            LatentCache(checkpoint.config, limits.num_blocks, torch.float32),
            max_model_len=max_model_len,
            deterministic=deterministic,
        )
    return Engine(
        checkpoint.config, trunk, limits, max_model_len=max_model_len, drafter=drafter, find_outage=find_outage
    )


@contextlib.asynccontextmanager
async def running_engine(engine: Engine) -> AsyncIterator[Engine]:
    """The engine, stepping until the block ends."""
    task = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def request(prompt: list[int], max_tokens: int = 8, **overrides: Any) -> GenerationRequest:
    fields: dict[str, Any] = {
        "request_id": "test",
        "prompt_token_ids": tuple(prompt),
        "sampling": GREEDY,
        "max_tokens": max_tokens,
        "stop_token_ids": frozenset(),
        "ignore_eos": True,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
    }
    return GenerationRequest(**{**fields, **overrides})


async def collect(sequence: Sequence) -> SequenceOutput:
    """Everything a sequence gave, as one output. Raises the error that ended it."""
    whole = SequenceOutput()
    while whole.finish_reason is None:
        output = await asyncio.wait_for(sequence.outputs.get(), DEADLINE_S)
        if isinstance(output, Exception):
            raise output
        whole = SequenceOutput(
            whole.tokens + output.tokens,
            whole.prompt_tokens + output.prompt_tokens,
            output.finish_reason,
            output.stop_token_id,
        )
    return whole


def token_ids(output: SequenceOutput) -> list[int]:
    return [token.token_id for token in output.tokens]
