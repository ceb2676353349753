"""The router's gRPC service: translates messages to the engine and errors to statuses, nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio

from experts.errors import ConfigError
from experts.logs import logged_request_id
from router.block_pool import BLOCK_SIZE
from router.engine import Engine
from router.errors import BadRequest, ExpertsUnavailable, NotReady, QueueFull, StaleTable
from router.expert_pool import ExpertPool
from router.expert_table import table_from_proto
from router.grammar import Grammar, GrammarCompiler, GrammarState
from router.penalties import LogitBias, Penalties
from router.process_figures import read_process_figures
from router.sampler import SamplingParams
from router.sequence import (
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    Sequence,
    SequenceOutput,
    SequenceTimes,
)
from router.sequence_trace import begin_trace
from router.service_tallies import ServiceTallies
from router.tracing import Tracer
from router.v1 import router_pb2 as pb
from router.v1 import router_pb2_grpc

logger = logging.getLogger(__name__)

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
# Beyond it, logits lose their digits; nobody asks for more than 2.
REPETITION_PENALTY_RANGE = (0.01, 100.0)
# Of a Status, so that names made up by clients cannot fill it.
MAX_TEAMS = 64
_STATUS_OF_ERROR: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (BadRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (QueueFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotReady, grpc.StatusCode.UNAVAILABLE),
    (ExpertsUnavailable, grpc.StatusCode.FAILED_PRECONDITION),
    (StaleTable, grpc.StatusCode.FAILED_PRECONDITION),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),  # an expert table with an empty range
)


class RouterState(Protocol):
    """What the service reads of the process that hosts it. engine is None while the weights load."""

    @property
    def router_id(self) -> str: ...
    @property
    def weights_version(self) -> int: ...
    @property
    def engine(self) -> Engine | None: ...
    @property
    def pool(self) -> ExpertPool: ...
    @property
    def tallies(self) -> ServiceTallies: ...
    @property
    def load_progress(self) -> float: ...
    @property
    def grammars(self) -> GrammarCompiler | None: ...
    @property
    def tracer(self) -> Tracer | None: ...
    def start_drain(self) -> None: ...


class RouterService(router_pb2_grpc.RouterServiceServicer):
    """Lives on the engine's event loop."""

    def __init__(self, state: RouterState) -> None:
        self._state = state

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> AsyncIterator[pb.GenerateResponse]:
        logged_request_id.set(request.request_id or None)
        engine = self._state.engine
        own_version = self._state.weights_version
        if engine is None:
            await _abort(context, NotReady("the router is loading its weights"))
        if request.weights_version not in (0, own_version):
            # Tokens of one answer come from one checkpoint, whatever address the caller took for whose.
            begun = request.weights_version
            await _abort(context, NotReady(f"the answer was begun with weights {begun}; these are {own_version}"))
        try:
            read = _read_request(request)
            sequence = engine.submit(read, await _compile_grammar(self._state.grammars, read, request))
        except Exception as error:
            await _abort(context, error)
        trace = sequence.trace = begin_trace(
            self._state.tracer, request.traceparent, self._state.router_id, request.request_id
        )
        finished = False
        error_text: str | None = None
        try:
            while not finished:
                output = await _next_output(sequence)
                if isinstance(output, Exception):
                    finished, error_text = True, str(output)
                    await _abort(context, output)
                finished = output.finish_reason is not None
                response = _write_output(output, sequence, own_version)
                if finished:
                    response.times.CopyFrom(_write_times(sequence.times(time.monotonic())))
                yield response
        finally:
            if not finished:  # the client left
                engine.cancel(sequence)
            logger.info(
                "sequence prompt_tokens=%d tokens=%d finished=%s error=%s",
                len(request.prompt_token_ids), sequence.num_generated, finished, error_text,
            )  # fmt: skip
            if trace is not None:
                error_text = error_text if finished else "the client left"
                trace.end(sequence.started_s, sequence.first_token_s, sequence.num_generated, error_text)

    async def UpdateExpertTable(
        self,
        request: pb.UpdateExpertTableRequest,
        context: grpc.aio.ServicerContext[pb.UpdateExpertTableRequest, pb.UpdateExpertTableResponse],
    ) -> pb.UpdateExpertTableResponse:
        try:
            self._state.pool.apply(table_from_proto(request.table))
        except Exception as error:
            await _abort(context, error)
        return pb.UpdateExpertTableResponse(version=self._state.pool.table.version)

    async def Drain(
        self, request: pb.DrainRequest, context: grpc.aio.ServicerContext[pb.DrainRequest, pb.DrainResponse]
    ) -> pb.DrainResponse:
        self._state.start_drain()
        engine = self._state.engine
        if engine is None:
            return pb.DrainResponse(num_running=0)
        return pb.DrainResponse(num_running=await wait_drained(engine, request.timeout_ms / 1000))

    async def ExchangeTallies(
        self,
        request: pb.ExchangeTalliesRequest,
        context: grpc.aio.ServicerContext[pb.ExchangeTalliesRequest, pb.ExchangeTalliesResponse],
    ) -> pb.ExchangeTalliesResponse:
        return pb.ExchangeTalliesResponse(tallies=self._state.tallies.exchange(request.tallies))

    async def Status(
        self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[pb.StatusRequest, pb.StatusResponse]
    ) -> pb.StatusResponse:
        state = self._state
        response = pb.StatusResponse(
            router_id=state.router_id,
            weights_version=state.weights_version,
            pid=os.getpid(),
            table_version=state.pool.table.version,
            connected_replica_ids=state.pool.connected_replica_ids(),
            load_progress=state.load_progress,
        )
        response.dispatch.CopyFrom(pb.DispatchCounters(**dataclasses.asdict(state.pool.counters)))
        response.replicas.extend(pb.ReplicaTimes(**replica._asdict()) for replica in state.pool.replica_times())
        response.groups.extend(
            pb.GroupTraffic(name=name, **dataclasses.asdict(traffic))
            for name, traffic in sorted(state.pool.traffic.read().items())
        )
        response.process.CopyFrom(read_process_figures())
        engine = state.engine
        if engine is None:
            response.message = "loading weights"
            return response
        progress = engine.progress()
        response.num_running = progress.num_running
        response.num_waiting = progress.num_waiting
        response.num_steps = progress.num_steps
        response.current_step_ms = progress.current_step_ms
        times = progress.times
        response.step_times.CopyFrom(pb.StepTimes(**dataclasses.asdict(times), overhead_ns=times.overhead_ns))
        response.num_blocks = progress.num_blocks
        response.num_blocks_held = progress.num_blocks_held
        response.num_blocks_idle = progress.num_blocks_idle
        response.block_size = BLOCK_SIZE
        response.num_preemptions = progress.num_preemptions
        response.num_prompt_tokens = progress.num_prompt_tokens
        response.num_cached_tokens = progress.num_cached_tokens
        response.num_turns = progress.num_turns
        response.num_generated_tokens = progress.num_generated_tokens
        response.num_drafted.extend(progress.num_drafted)
        response.num_accepted.extend(progress.num_accepted)
        response.teams.extend(pb.TeamQueue(**team._asdict()) for team in engine.list_team_queues()[:MAX_TEAMS])
        response.draining = engine.draining
        unserved = state.pool.unserved()
        response.unserved_ms = int(state.pool.unserved_s * 1000)
        response.ready = unserved is None and not engine.draining
        response.message = "draining" if engine.draining else engine.find_outage() or unserved or ""
        return response


async def wait_drained(engine: Engine, timeout_s: float) -> int:
    """Wait until a draining engine is empty. Returns the number of sequences left when the time was over."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        progress = engine.progress()
        left = progress.num_running + progress.num_waiting
        if left == 0 or loop.time() >= deadline:
            return left
        await asyncio.sleep(0.02)


async def _next_output(sequence: Sequence) -> SequenceOutput | Exception:
    """The next output, merged with those that wait behind it: one message per turn of the loop, not per token."""
    output = await sequence.outputs.get()
    while not isinstance(output, Exception) and output.finish_reason is None and not sequence.outputs.empty():
        following = sequence.outputs.get_nowait()
        if isinstance(following, Exception):
            return following
        output = SequenceOutput(
            tokens=output.tokens + following.tokens,
            prompt_tokens=output.prompt_tokens + following.prompt_tokens,
            finish_reason=following.finish_reason,
            stop_token_id=following.stop_token_id,
        )
    return output


def _read_request(message: pb.GenerateRequest) -> GenerationRequest:
    sampling = message.sampling
    penalties = Penalties(
        repetition=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
    )
    for name, value, low, high in (
        ("temperature", sampling.temperature, 0.0, 1e6),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("repetition_penalty", penalties.repetition, *REPETITION_PENALTY_RANGE),
        ("presence_penalty", penalties.presence, -2.0, 2.0),
        ("frequency_penalty", penalties.frequency, -2.0, 2.0),
        *(("logit_bias", value, -100.0, 100.0) for value in sampling.logit_bias.values()),
    ):
        if not low <= value <= high:  # False for NaN too
            raise BadRequest(f"{name} must be between {low:g} and {high:g}")
    return GenerationRequest(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
            min_p=sampling.min_p,
            seed=sampling.seed,
            penalties=penalties if penalties != Penalties() else None,
            logit_bias=LogitBias(sampling.logit_bias.items()) if sampling.logit_bias else None,
        ),
        max_tokens=message.max_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        num_answer_tokens=message.num_answer_tokens,
        priority=message.priority,
        fairness_key=message.fairness_key,
        cache_salt=message.cache_salt,
        fairness_weight=_read_weight(message.fairness_weight),
    )


def _read_weight(weight: float) -> float:
    """Raises BadRequest."""
    if weight == 0.0:
        return 1.0
    if not 1e-6 <= weight <= 1e6:
        raise BadRequest("fairness_weight must be between 1e-06 and 1e+06")
    return weight


async def _compile_grammar(
    compiler: GrammarCompiler | None, request: GenerationRequest, message: pb.GenerateRequest
) -> GrammarState | None:
    """Where the answer starts; behind the tokens that another router has generated. Raises BadRequest."""
    if not message.HasField("grammar"):
        return None
    kind = message.grammar.WhichOneof("kind")
    if kind is None:
        raise BadRequest("a grammar needs a kind")
    if request.ignore_eos:
        raise BadRequest("an answer that must match a grammar ends where that is complete: not with ignore_eos")
    if compiler is None:
        raise BadRequest("without tokenizer.json beside the weights no grammar can be followed")
    start_after = frozenset(message.grammar.start_after)
    grammar = Grammar(kind, getattr(message.grammar, kind), message.grammar.lenient, start_after)
    # The library lets this thread's loop run meanwhile.
    matcher = await asyncio.to_thread(compiler.compile, grammar)
    num_before = len(request.prompt_token_ids) - request.num_answer_tokens
    return GrammarState(matcher, start_after, request.prompt_token_ids[num_before:])


def _write_output(output: SequenceOutput, sequence: Sequence, weights_version: int) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        weights_version=weights_version,
        cached_tokens=sequence.num_cached_tokens or 0,
        router_us=sequence.router_ns // 1000,
        expert_us=sequence.expert_ns // 1000,
        num_left_out=sequence.num_left_out,
        tokens=[_write_token(token) for token in output.tokens],
        prompt_tokens=[_write_token(token) for token in output.prompt_tokens],
    )
    if output.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[output.finish_reason]
    if output.stop_token_id is not None:
        response.stop_token_id = output.stop_token_id
    return response


def _write_times(times: SequenceTimes) -> pb.SequenceTimes:
    return pb.SequenceTimes(
        queue_us=int(times.queue_s * 1e6), prefill_us=int(times.prefill_s * 1e6), decode_us=int(times.decode_s * 1e6)
    )


def _write_token(token: GeneratedToken) -> pb.TokenOutput:
    if token.logprobs is None:
        return pb.TokenOutput(token_id=token.token_id)
    return pb.TokenOutput(
        token_id=token.token_id,
        logprob=token.logprobs.logprob,
        top_token_ids=token.logprobs.top_token_ids,
        top_logprobs=token.logprobs.top_logprobs,
    )


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    for kind, status in _STATUS_OF_ERROR:
        if isinstance(error, kind):
            await context.abort(status, str(error))
    logger.error("internal error", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error of the router; its log says more")
    raise AssertionError("abort always raises")
