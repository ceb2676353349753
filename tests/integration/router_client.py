"""Calling a router's gRPC service from a test: whole generations as plain data."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from router.v1 import router_pb2, router_pb2_grpc

CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Generation:
    """token_ids and logprobs of what was generated; prompt_logprobs without the first token's."""

    token_ids: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


def build_request(prompt: Sequence[int], max_tokens: int) -> router_pb2.GenerateRequest:
    """Greedy, to the full length, with the logprobs of prompt and answer."""
    return router_pb2.GenerateRequest(
        request_id="test",
        prompt_token_ids=prompt,
        sampling=router_pb2.SamplingParams(temperature=0.0, top_p=1.0),
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0,
    )


def generate(channel: grpc.Channel, prompt: Sequence[int], max_tokens: int) -> Generation:
    """Raises grpc.RpcError if the router refuses or the deadline passes."""
    tokens: list[router_pb2.TokenOutput] = []
    prompt_tokens: list[router_pb2.TokenOutput] = []
    stub = router_pb2_grpc.RouterServiceStub(channel)
    for response in stub.Generate(build_request(prompt, max_tokens), timeout=CALL_TIMEOUT_S):
        tokens.extend(response.tokens)
        prompt_tokens.extend(response.prompt_tokens)
    return Generation(
        token_ids=[token.token_id for token in tokens],
        logprobs=[token.logprob for token in tokens],
        prompt_logprobs=[token.logprob for token in prompt_tokens[1:]],
    )
