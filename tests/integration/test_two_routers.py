"""Two routers share the expert groups: both serve, a prefix finds its router again, a dead one is passed over."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from router.v1 import router_pb2, router_pb2_grpc
from tests.local_stack import ExtraRouter, LocalStack, StackOptions, extra_api, extra_router, local_stack

NUM_TOKENS = 3
TIMEOUT_S = 60.0


@dataclass
class Pair:
    stack: LocalStack
    routers: list[ExtraRouter]
    url: str

    def complete(self, prompt: list[int]) -> str:
        body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=TIMEOUT_S)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def count_steps(self, index: int) -> int:
        with self.routers[index].channel() as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            return stub.Status(router_pb2.StatusRequest(), timeout=TIMEOUT_S).num_steps

    def find_server(self, prompt: list[int]) -> int:
        """Which router computes it."""
        before = [self.count_steps(index) for index in range(2)]
        self.complete(prompt)
        after = [self.count_steps(index) for index in range(2)]
        (index,) = [index for index in range(2) if after[index] > before[index]]
        return index


@pytest.fixture(scope="module")
def pair(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    options = StackOptions(num_groups=2, api=False)
    with local_stack(checkpoint, tmp_path_factory.mktemp("stack"), options) as stack, extra_router(stack) as second:
        first = ExtraRouter(stack.router, stack.router_endpoint)
        with extra_api(stack, [first.port, second.port]) as url:
            yield Pair(stack, [first, second], url)


def test_routers_share_the_work_and_a_prefix_returns_to_its_router(pair: Pair) -> None:
    # Enough that they cannot all fall to one by chance, which hashes their addresses too.
    prompts = [[10 + index] * 64 for index in range(20)]
    servers = [pair.find_server(prompt) for prompt in prompts]
    assert set(servers) == {0, 1}
    assert [pair.find_server([*prompt, 7, 8, 9]) for prompt in prompts] == servers


def test_a_dead_router_is_passed_over_and_the_answer_is_the_same(pair: Pair) -> None:
    prompts = [[100 + index] * 64 for index in range(6)]
    before = [pair.complete(prompt) for prompt in prompts]
    pair.routers[1].process.kill()
    assert [pair.complete(prompt) for prompt in prompts] == before
