"""A RouterService over real gRPC that plays what a test tells it, and remembers what it was asked."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc

from router.v1 import router_pb2, router_pb2_grpc

WAIT_S = 10.0

Script = Callable[[router_pb2.GenerateRequest, grpc.ServicerContext], Iterator[router_pb2.GenerateResponse]]


class ScriptedRouter(router_pb2_grpc.RouterServiceServicer):
    """Listens from the start; `script` may be replaced between requests."""

    def __init__(self) -> None:
        self.requests: list[router_pb2.GenerateRequest] = []
        self.cancelled = threading.Event()
        self.status = router_pb2.StatusResponse(router_id="r0", ready=True, load_progress=1.0)
        # Cleared: asked for its status, it says nothing, as a process that is stopped.
        self.answers = threading.Event()
        self.answers.set()
        self.num_status_calls = 0
        self.weights_version = 0
        self.script: Script = answer([])
        self._server = grpc.server(ThreadPoolExecutor(64))
        router_pb2_grpc.add_RouterServiceServicer_to_server(self, self._server)
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def reset(self) -> None:
        """As new. What is still ending from before belongs to the event of before: gRPC tells of the end of a call
        when it likes, so that clearing the one event would let the last test's calls set it again in the next."""
        self.requests = []
        self.cancelled = threading.Event()
        self.status = router_pb2.StatusResponse(router_id="r0", ready=True, load_progress=1.0)
        self.answers.set()
        self.script = answer([])

    def stop(self) -> None:
        """Drop all connections, as a killed process would."""
        self._server.stop(grace=None).wait(WAIT_S)

    def Generate(
        self, request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateResponse]:
        self.requests.append(request)
        finished = threading.Event()
        cancelled = self.cancelled

        def note_end() -> None:
            if not finished.is_set():
                cancelled.set()

        context.add_callback(note_end)
        for response in self.script(request, context):
            response.weights_version = self.weights_version
            yield response
        finished.set()

    def Status(self, request: router_pb2.StatusRequest, context: grpc.ServicerContext) -> router_pb2.StatusResponse:
        self.num_status_calls += 1
        self.answers.wait(WAIT_S)
        return self.status


def token(token_id: int, request: router_pb2.GenerateRequest, *, is_prompt: bool = False) -> router_pb2.TokenOutput:
    """A token with made-up log probabilities where the request asks for them: -(id + 1) / 7 for itself, and the ids
    above it as alternatives, each a little worse."""
    output = router_pb2.TokenOutput(token_id=token_id)
    field = "prompt_logprobs" if is_prompt else "logprobs"
    if request.HasField(field):
        output.logprob = -(token_id + 1) / 7
        for rank in range(getattr(request, field)):
            output.top_token_ids.append(token_id + rank)
            output.top_logprobs.append(-(token_id + 1) / 7 - rank)
    return output


def prompt_response(request: router_pb2.GenerateRequest) -> router_pb2.GenerateResponse:
    response = router_pb2.GenerateResponse()
    if request.HasField("prompt_logprobs"):
        ids = request.prompt_token_ids
        response.prompt_tokens.append(router_pb2.TokenOutput(token_id=ids[0]))
        response.prompt_tokens.extend(token(token_id, request, is_prompt=True) for token_id in ids[1:])
    return response


def answer(
    token_ids: Sequence[int],
    *,
    per_response: int = 1,
    stop_id: int | None = None,
    cached_tokens: int = 0,
    num_left_out: int = 0,
) -> Script:
    """Generate token_ids, no more than asked for; ends with stop_id (an EOS, say) if given, else by length."""

    def play(
        request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateResponse]:
        response = prompt_response(request)
        response.cached_tokens = cached_tokens
        yield response
        ids = [*token_ids, *([] if stop_id is None else [stop_id])][: request.max_tokens]
        is_stopped = stop_id is not None and ids[-1:] == [stop_id]
        for start in range(0, len(ids), per_response):
            yield router_pb2.GenerateResponse(
                cached_tokens=cached_tokens,
                num_left_out=num_left_out,
                tokens=[token(token_id, request) for token_id in ids[start : start + per_response]],
                finish_reason=_finish_reason(is_stopped) if start + per_response >= len(ids) else None,
                stop_token_id=stop_id if is_stopped and start + per_response >= len(ids) else None,
            )
        if not ids:
            yield router_pb2.GenerateResponse(finish_reason=router_pb2.FINISH_REASON_LENGTH)

    return play


def answer_forever(token_ids: Sequence[int]) -> Script:
    """Generate token_ids, then wait until the call is cancelled."""

    def play(
        request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateResponse]:
        for token_id in token_ids:
            yield router_pb2.GenerateResponse(tokens=[token(token_id, request)])
        ended = threading.Event()
        if context.add_callback(ended.set):
            ended.wait(WAIT_S)

    return play


def fail(code: grpc.StatusCode, details: str = "scripted", *, after: Sequence[int] = ()) -> Script:
    """Generate the tokens of `after`, then fail."""

    def play(
        request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateResponse]:
        for token_id in after:
            yield router_pb2.GenerateResponse(tokens=[token(token_id, request)])
        context.abort(code, details)

    return play


def think(*, vocabulary: range, lost_after: int | None = None) -> Script:
    """Every token depends on all before it, on the seed, and on which of them are the answer's, so whoever goes on from
    anything but the whole truth says something else. lost_after: the router is lost after so many tokens, before it can
    say that they were the last."""

    def play(
        request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateResponse]:
        ids = list(request.prompt_token_ids)
        start = len(ids) - request.num_answer_tokens
        yield prompt_response(request)
        for number in range(request.max_tokens):
            if number == lost_after:
                break
            history = (*ids[:start], -1, *ids[start:], request.sampling.seed)
            ids.append(vocabulary[zlib.crc32(repr(history).encode()) % len(vocabulary)])
            response = router_pb2.GenerateResponse(tokens=[token(ids[-1], request)])
            response.cached_tokens = 2 + request.num_answer_tokens
            if number == request.max_tokens - 1 and lost_after is None:
                response.finish_reason = router_pb2.FINISH_REASON_LENGTH
            yield response
        if lost_after is not None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")

    return play


def in_turn(*scripts: Script) -> Script:
    """One script after the other, the last one for all further requests."""
    remaining = list(scripts)

    def play(
        request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateResponse]:
        script = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        yield from script(request, context)

    return play


def _finish_reason(is_stopped: bool) -> router_pb2.FinishReason:
    return router_pb2.FINISH_REASON_STOP if is_stopped else router_pb2.FINISH_REASON_LENGTH
