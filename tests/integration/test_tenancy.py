"""Two teams on two routers behind two HTTP fronts: shares and limits hold over all of them, and the ledger is right
whoever is killed. One front's usage goes into SQLite, the other's into a PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.cli import main
from router.tenancy.key_file import Limits, TeamEntry, make_key, new_key_file, save_key_file, set_team
from router.tenancy.ledger import Ledger
from router.v1 import router_pb2, router_pb2_grpc
from tests.local_stack import (
    START_TIMEOUT_S,
    ExtraRouter,
    LocalStack,
    ManagedProcess,
    StackOptions,
    api_arguments,
    extra_router,
    local_stack,
    wait_until,
)
from tests.postgres_server import find_postgres, postgres_server

TIMEOUT_S = 60.0
WEIGHTS = {"red": 1.0, "blue": 2.0}
NUM_ROUTERS, NUM_RUNNING = 2, 6
# Tokens, of the 8,192 that the checkpoint takes: seconds of them.
LONG_ANSWER = 2000
CANARY = "the quick brown canary"


@dataclass
class Front:
    """An HTTP front, its journal, and the process that writes its ledger."""

    name: str
    folder: Path
    arguments: list[str]
    ledger_url: str
    api: ManagedProcess = field(init=False)
    writer: ManagedProcess = field(init=False)
    url: str = field(init=False)

    @property
    def journal(self) -> Path:
        return self.folder / f"journal-{self.name}"

    def start_api(self) -> None:
        arguments = [*self.arguments, "--usage-journal", str(self.journal)]
        self.api = ManagedProcess(f"api-{self.name}", arguments, self.folder)

    def wait_api(self) -> None:
        self.url = self.api.wait_ready(time.monotonic() + START_TIMEOUT_S)["url"]

    def start_writer(self) -> None:
        arguments = ["router.tenancy", "--journal", str(self.journal), "--ledger", self.ledger_url]
        self.writer = ManagedProcess(f"writer-{self.name}", arguments, self.folder)


@dataclass
class Tenants:
    stack: LocalStack
    routers: list[ExtraRouter]
    fronts: list[Front]
    keys: dict[str, str]
    folder: Path


@pytest.fixture(scope="module")
def tenants(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL is not installed here (Debian: apt-get install postgresql)")
    folder = tmp_path_factory.mktemp("tenants")
    file, keys, now = new_key_file(), {}, datetime.now(UTC)
    for team, weight in WEIGHTS.items():
        file = set_team(file, team, TeamEntry(weight=weight))
        file, new = make_key(file, team, now)
        keys[team] = new.text
    file, new = make_key(file, "grey", now, limits=Limits(requests_per_minute=4))
    save_key_file(folder / "keys.json", file)
    options = StackOptions(num_groups=1, api=False, extra_router_arguments=("--max-num-seqs", str(NUM_RUNNING)))
    with (
        postgres_server(programs) as postgres,
        local_stack(checkpoint, folder / "stack", options) as stack,
        extra_router(stack) as second,
    ):
        routers = [ExtraRouter(stack.router, stack.router_endpoint), second]
        arguments = [*api_arguments(checkpoint, [router.port for router in routers], 0), "--keys-file"]
        urls = {"sqlite": f"sqlite:///{folder / 'ledger.db'}", "postgres": postgres.create_database()}
        fronts = [Front(name, folder, [*arguments, str(folder / "keys.json")], url) for name, url in urls.items()]
        try:
            for front in fronts:
                front.start_api()
                front.start_writer()
            for front in fronts:
                front.wait_api()
            yield Tenants(stack, routers, fronts, {**keys, "grey": new.text}, folder)
        finally:
            for front in fronts:
                front.api.stop()
                front.writer.stop()


@dataclass
class Answer:
    """num_tokens: received, and most of them in one piece. usage: of the answer, where it came to its end."""

    request_id: str
    num_prompt: int
    num_tokens: int = 0
    largest_piece: int = 0
    usage: dict[str, int] | None = None


async def stream(client: httpx.AsyncClient, key: str, answer: Answer, prompt: list[int], num_answer: int) -> None:
    """Raises httpx.HTTPError where the connection breaks; answer has what was received by then."""
    body = {
        "prompt": prompt, "max_tokens": num_answer, "ignore_eos": True, "logprobs": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    headers = {"authorization": f"Bearer {key}", "x-request-id": answer.request_id}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        usage = None
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.usage = usage
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    piece = len((choice["logprobs"] or {"tokens": []})["tokens"])
                    answer.num_tokens += piece
                    answer.largest_piece = max(answer.largest_piece, piece)


@asynccontextmanager
async def open_clients(fronts: list[Front]) -> AsyncIterator[list[httpx.AsyncClient]]:
    async with AsyncExitStack() as stack:
        limits = httpx.Limits(max_connections=None)
        yield [
            await stack.enter_async_context(httpx.AsyncClient(base_url=front.url, timeout=TIMEOUT_S, limits=limits))
            for front in fronts
        ]


def test_shares_hold_over_two_routers_and_two_fronts(tenants: Tenants) -> None:
    """Both teams have more requests than run at once, each at its own front, and answers of different lengths."""

    async def run() -> dict[str, float]:
        random_source, answers = random.Random(1), {team: list[Answer]() for team in WEIGHTS}

        def count() -> dict[str, int]:
            """What was served, at its cost."""
            return {
                team: sum(one.num_prompt + 2 * one.num_tokens for one in all_ if one.num_tokens)
                for team, all_ in answers.items()
            }

        async def keep_busy(client: httpx.AsyncClient, team: str, num_answer: int) -> None:
            while True:
                prompt = [random_source.randrange(2, 200) for _ in range(4)]
                answer = Answer(f"{team}-{len(answers[team])}", len(prompt))
                answers[team].append(answer)
                await stream(client, tenants.keys[team], answer, prompt, num_answer)

        async with open_clients(tenants.fronts) as (one, other):
            busy = [asyncio.create_task(keep_busy(one, "red", 24)) for _ in range(30)]
            busy += [asyncio.create_task(keep_busy(other, "blue", 40)) for _ in range(30)]

            async def wait_for(num_tokens: int) -> dict[str, int]:
                async with asyncio.timeout(TIMEOUT_S):
                    while sum(count().values()) < 2 * num_tokens:
                        done = [task for task in busy if task.done()]
                        assert not done, done[0].exception()
                        await asyncio.sleep(0.01)
                return count()

            begin = await wait_for(1500)
            end = await wait_for(1500 + 6000)
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)
        return {team: end[team] - begin[team] for team in WEIGHTS}

    served = asyncio.run(run())
    # The paper's bound for two that have work waiting throughout, and what is given before the routers hear of it.
    bound = 2 * (2 * NUM_ROUTERS * NUM_RUNNING * (4 + 40)) + 1000
    assert abs(served["red"] / WEIGHTS["red"] - served["blue"] / WEIGHTS["blue"]) <= bound
    # Shares within 5 % take a longer look: tests/benchmarks/tenancy.py.
    assert served["blue"] > 1.3 * served["red"]


def test_a_limit_holds_over_two_fronts(tenants: Tenants) -> None:
    headers = {"authorization": f"Bearer {tenants.keys['grey']}"}
    body = {"prompt": [5, 6], "max_tokens": 1}
    one, other = tenants.fronts
    for _ in range(4):
        assert httpx.post(f"{one.url}/v1/completions", json=body, headers=headers).status_code == 200

    def list_fronts() -> dict[str, router_pb2.Tally]:
        """What the routers know of each front by now, the oldest of it."""
        oldest: dict[str, router_pb2.Tally] = {}
        for router in tenants.routers:
            with router.channel() as channel:
                stub = router_pb2_grpc.RouterServiceStub(channel)
                tallies = stub.ExchangeTallies(router_pb2.ExchangeTalliesRequest(), timeout=5.0).tallies
            for tally in tallies:
                known = oldest.get(tally.source)
                if tally.kind == router_pb2.TALLY_KIND_FRONT and (known is None or tally.number < known.number):
                    oldest[tally.source] = tally
        return oldest

    def has_arrived() -> bool:
        accounts = [account for tally in list_fronts().values() for account in tally.accounts]
        return any(account.account == "team:grey" and account.num_requests == 4 for account in accounts)

    deadline = time.monotonic() + TIMEOUT_S
    wait_until(has_arrived, deadline, lambda: "the routers were not told")
    before = list_fronts()
    wait_until(
        # Whoever has told twice since then has also heard.
        lambda: all(tally.number >= before[name].number + 2 for name, tally in list_fronts().items() if name in before),
        deadline,
        lambda: "the fronts tell no more",
    )
    statuses = [httpx.post(f"{other.url}/v1/completions", json=body, headers=headers).status_code for _ in range(3)]
    # Alone, it would let in four. One is there again every 15 s.
    assert statuses.count(429) >= 2, statuses


def test_prompts_are_written_down_nowhere(tenants: Tenants) -> None:
    for front in tenants.fronts:
        headers = {"authorization": f"Bearer {tenants.keys['red']}", "x-request-id": "canary"}
        for body in ({"prompt": CANARY, "max_tokens": 2}, {"prompt": CANARY, "max_tokens": "two"}):
            httpx.post(f"{front.url}/v1/completions", json=body, headers=headers)
    written = [path for path in tenants.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".stderr" for path in written) and any(path.suffix == ".log" for path in written)
    for path in written:
        data = path.read_bytes()
        assert CANARY.encode() not in data and not any(key.encode() in data for key in tenants.keys.values()), path


def test_the_ledger_is_exact_for_what_finished_and_within_a_step_for_what_was_cut_off(
    tenants: Tenants, capsys: pytest.CaptureFixture[str]
) -> None:
    """500 requests for each of the two ledgers, while writers, a router and both fronts are killed in turn."""
    num_requests, num_workers = 500, 10
    answers: dict[str, list[Answer]] = {front.name: [] for front in tenants.fronts}
    random_source = random.Random(2)

    async def work(front: Front) -> None:
        while len(answers[front.name]) < num_requests:
            prompt = [random_source.randrange(2, 200) for _ in range(random_source.randrange(1, 9))]
            answer = Answer(f"{front.name}-{len(answers[front.name])}", len(prompt))
            answers[front.name].append(answer)
            url = front.url
            try:
                async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, verify=False) as client:
                    await stream(client, tenants.keys["red"], answer, prompt, random_source.randrange(1, 24))
            except httpx.TransportError:
                while front.url == url:  # until it has been started again
                    await asyncio.sleep(0.02)

    async def cut_off(front: Front) -> None:
        """Kill a front in the middle of an answer that is too long to have arrived whole."""
        prompt = [random_source.randrange(2, 200) for _ in range(4)]
        answer = Answer(f"{front.name}-long", len(prompt))
        answers[front.name].append(answer)
        async with httpx.AsyncClient(base_url=front.url, timeout=TIMEOUT_S, verify=False) as client:
            streaming = asyncio.create_task(stream(client, tenants.keys["red"], answer, prompt, LONG_ANSWER))
            while answer.num_tokens == 0 and not streaming.done():
                await asyncio.sleep(0)
            front.api.kill()
            with pytest.raises(httpx.TransportError):
                await streaming

    async def kill_in_turn() -> None:
        async def reach(count: int) -> None:
            while min(map(len, answers.values())) < count:
                await asyncio.sleep(0.005)

        await reach(80)
        for front in tenants.fronts:
            front.writer.kill()
        await reach(160)
        tenants.routers[1].process.kill()
        await reach(240)
        for front in tenants.fronts:
            front.start_writer()
            await cut_off(front)
            front.start_api()
        for front in tenants.fronts:
            await asyncio.to_thread(front.wait_api)
        await reach(400)
        for front in tenants.fronts:
            front.writer.kill()
            front.start_writer()

    async def run() -> None:
        async with asyncio.timeout(2 * TIMEOUT_S):
            workers = [work(front) for front in tenants.fronts for _ in range(num_workers)]
            await asyncio.gather(kill_in_turn(), *workers)

    asyncio.run(run())
    for front in tenants.fronts:
        assert front.api.stop() == 0
        front.writer.send_signal(signal.SIGTERM)  # it collects what is there, and ends
        assert front.writer.wait(TIMEOUT_S) == 0, front.writer.stderr_tail()
        assert not list(front.journal.iterdir())
        check_ledger(front, answers[front.name])
        assert main(["usage", "--team", "red", "--by", "team", "--ledger", front.ledger_url, "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["usage"]
        assert row["num_requests"] >= len(answers[front.name]) - num_workers


def check_ledger(front: Front, answers: list[Answer]) -> None:
    rows = read_rows(front.ledger_url)
    finished = [answer for answer in answers if answer.usage is not None]
    cut_off = [answer for answer in answers if answer.usage is None]
    assert len(finished) > 0.9 * len(answers) and any(answer.num_tokens > 0 for answer in cut_off)
    largest_piece = max(answer.largest_piece for answer in answers)
    for answer in finished:
        assert answer.usage is not None
        (row,) = rows[answer.request_id]
        assert (row["outcome"], row["tokens_in"], row["tokens_out"]) == (
            "finished", answer.num_prompt, answer.usage["completion_tokens"]
        ), answer  # fmt: skip
        assert row["tokens_out"] == answer.num_tokens and row["router_us"] > 0 and row["expert_us"] > 0
    for answer in cut_off:
        found = rows.get(answer.request_id, [])
        if answer.num_tokens == 0 and not found:
            continue  # the front was gone before it came
        (row,) = found
        # Without drafts a step is one token. Tokens that wait for each other, in a router that is behind or because
        # they are one character, are one piece, which is noted before it is sent.
        assert answer.num_tokens <= row["tokens_out"] <= answer.num_tokens + largest_piece, (answer, row)


def read_rows(url: str) -> dict[str, list[dict[str, Any]]]:
    ledger = Ledger(url)
    try:
        with ledger._engine.connect() as connection:  # pyright: ignore[reportPrivateUsage]
            rows: dict[str, list[dict[str, Any]]] = {}
            for row in connection.exec_driver_sql("SELECT * FROM usage").mappings():
                rows.setdefault(str(row["request_id"]), []).append(dict(row))
            return rows
    finally:
        ledger.close()
