"""Frames answered by the native loop: the same answers as the interpreter's, and everything unusual left to it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from experts import wire
from experts.checkpoint import Checkpoint
from experts.expert_range import ExpertRange, split_experts
from experts.group import ExpertGroup
from experts.http2_stream import make_frame
from experts.native_serving import NativeServing
from experts.server import ExpertServer, ReplicaIdentity
from experts.weights import change_hosted, load_expert_weights
from experts.wire import ComputeReply, ComputeStatus
from tests.experts.test_server import TIMEOUT_S, RouterClient, make_request

IDENTITY = ReplicaIdentity("g0", "g0-0", 77)
PING = make_frame(6, 0, 0, b"01234567")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def group(fp8_checkpoint: Checkpoint, request: pytest.FixtureRequest) -> ExpertGroup:
    group = ExpertGroup(load_expert_weights(fp8_checkpoint, split_experts(fp8_checkpoint.config, 2)[0], request.param))
    if group.frame_function is None:
        pytest.skip("no native kernel here")
    return group


class Served:
    """A server and a client of it. num_native: frames that the native loop answered."""

    def __init__(self, group: ExpertGroup, *, native: bool) -> None:
        self.server = ExpertServer(group, IDENTITY, native=native)
        self.client = RouterClient(self.server.start())
        self.dtype = torch.float32 if "float32" in group.numerics_id else torch.bfloat16

    def ask(self, **overrides: Any) -> ComputeReply:
        overrides.setdefault("hidden_states", torch.ones(2, 192, dtype=self.dtype))
        return self.client.ask(**overrides)

    @property
    def num_native(self) -> int:
        native = self.server._native  # pyright: ignore[reportPrivateUsage]
        assert isinstance(native, NativeServing)
        return sum(slot.num_frames for slot in native.take_load().slots)

    def close(self) -> None:
        self.client.close()
        self.server.stop(grace_s=TIMEOUT_S)


@pytest.fixture
def served(group: ExpertGroup) -> Iterator[Served]:
    served = Served(group, native=True)
    yield served
    served.close()


def random_frame(seed: int, dtype: torch.dtype) -> dict[str, Any]:
    chosen = random.Random(seed)
    num_rows = chosen.choice([1, 1, 2, 7, 40])
    pairs = [
        (row, expert) for row in range(num_rows) for expert in sorted(chosen.sample(range(4), chosen.choice([1, 2])))
    ]
    return {
        "frame_id": chosen.randrange(1, 1 << 40),
        "hidden_states": torch.randn(num_rows, 192, generator=torch.Generator().manual_seed(seed)).to(dtype),
        "pair_rows": torch.tensor([row for row, _ in pairs], dtype=torch.int32),
        "pair_experts": torch.tensor([expert for _, expert in pairs], dtype=torch.int32),
        "pair_weights": torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)),
        "exact": chosen.random() < 0.5,
        "reply_dtype": chosen.choice([None, torch.bfloat16, torch.float32]),
    }


def test_answers_are_those_of_the_interpreter_bit_for_bit(group: ExpertGroup, served: Served) -> None:
    plain = Served(group, native=False)
    frames = [random_frame(seed, served.dtype) for seed in range(40)]
    try:
        for frame in frames:
            found, expected = served.ask(**frame), plain.ask(**frame)
            assert (found.status, found.frame_id, found.incarnation) == (ComputeStatus.OK, frame["frame_id"], 77)
            assert found.dtype == expected.dtype
            assert found.tensor is not None and expected.tensor is not None
            assert torch.equal(found.tensor, expected.tensor)
        # The first frame of a stream may come together with its opening.
        assert served.num_native >= len(frames) - 1
    finally:
        plain.close()


def test_what_is_unusual_is_answered_between_usual_frames(served: Served) -> None:
    other = torch.float32 if served.dtype == torch.bfloat16 else torch.bfloat16
    assert served.ask().status is ComputeStatus.OK
    for overrides, status in [
        ({"incarnation": 76}, ComputeStatus.STALE_INCARNATION),
        ({"layer_id": 0}, ComputeStatus.NOT_HOSTED),
        ({"layer_id": 1_000}, ComputeStatus.NOT_HOSTED),
        ({"pair_experts": torch.tensor([0, 7, 1], dtype=torch.int32)}, ComputeStatus.NOT_HOSTED),
        ({"pair_experts": torch.tensor([3, 0, 1], dtype=torch.int32)}, ComputeStatus.BAD_REQUEST),
        ({"pair_rows": torch.tensor([0, 0, 2], dtype=torch.int32)}, ComputeStatus.BAD_REQUEST),
        ({"pair_weights": torch.tensor([1.0, float("nan"), 1.0])}, ComputeStatus.BAD_REQUEST),
        ({"hidden_states": torch.ones(2, 64)}, ComputeStatus.BAD_REQUEST),
        ({"hidden_states": torch.ones(2, 192, dtype=other)}, ComputeStatus.OK),
        ({"deadline_ms": 0}, ComputeStatus.OVERLOADED),
    ]:
        for _ in range(20):  # past the turns that the interpreter keeps for itself
            assert served.ask().status is ComputeStatus.OK
        assert served.ask(**overrides).status is status, overrides


def test_many_frames_sent_at_once_are_each_answered(served: Served) -> None:
    """Whole, cut, joined and mixed with other frames of HTTP/2, in one stream."""
    frames = [random_frame(seed, served.dtype) | {"frame_id": seed + 1} for seed in range(60)]
    stream = served.client._stream  # pyright: ignore[reportPrivateUsage]
    for index, frame in enumerate(frames):
        served.client.send(make_request(**frame, layer_id=1 + index % 2))
        if index % 7 == 0:
            stream.socket.send(PING)
    answered = [served.client.receive() for _ in frames]
    assert sorted(reply.frame_id for reply in answered) == list(range(1, 61))
    assert {reply.status for reply in answered} <= {ComputeStatus.OK, ComputeStatus.NOT_HOSTED}


def test_a_frame_may_arrive_byte_by_byte(served: Served) -> None:
    served.ask()
    message = make_request(hidden_states=torch.ones(2, 192, dtype=served.dtype))
    data = make_frame(0, 0, 1, b"\0" + len(message).to_bytes(4, "big") + message)
    connection = served.client._stream.socket  # pyright: ignore[reportPrivateUsage]
    for byte in data[:40]:
        connection.send(bytes((byte,)))
    connection.send(data[40:])
    assert served.client.receive().status is ComputeStatus.OK


def test_credit_is_given_for_as_long_as_frames_come(served: Served) -> None:
    """Many times the window goes through, both ways."""
    frame = random_frame(3, served.dtype) | {
        "hidden_states": torch.ones(20_000, 192, dtype=served.dtype),
        "exact": False,
        "reply_dtype": None,
    }
    num_bytes = 20_000 * 192 * served.dtype.itemsize
    for _ in range(20):  # past the turns that the interpreter takes after an opening
        served.ask()
    assert served.num_native
    for _ in range(3 * wire.MAX_MESSAGE_BYTES // (4 * num_bytes) + 2):
        reply = served.ask(**frame)
        served.client._stream.consume(num_bytes)  # pyright: ignore[reportPrivateUsage]
        assert reply.status is ComputeStatus.OK and reply.tensor is not None and reply.tensor.shape[0] == 20_000


def test_experts_are_exchanged_between_frames(fp8_checkpoint: Checkpoint, served: Served) -> None:
    """A client that asks all the time gets an answer to every frame, and the new experts' from the change on."""
    before = load_expert_weights(fp8_checkpoint, split_experts(fp8_checkpoint.config, 2)[0], served.dtype)
    group = ExpertGroup(before)
    changing = Served(group, native=True)
    wanted = {"pair_experts": torch.tensor([4, 6, 6], dtype=torch.int32), "pair_rows": torch.tensor([0, 0, 1])}
    wanted["pair_rows"] = wanted["pair_rows"].to(torch.int32)
    try:
        for _ in range(20):
            assert changing.ask().status is ComputeStatus.OK
        assert changing.ask(**wanted).status is ComputeStatus.NOT_HOSTED
        for _ in range(20):
            changing.ask()
        changing.server.use_weights(change_hosted(before, fp8_checkpoint, (ExpertRange(1, 4, 3, 8),)))
        statuses = {changing.ask(**wanted).status for _ in range(20)}
        assert statuses == {ComputeStatus.OK}
        assert changing.num_native
        assert changing.ask(pair_experts=torch.tensor([0, 1, 2], dtype=torch.int32)).status is ComputeStatus.NOT_HOSTED
        expected = ExpertGroup(load_expert_weights(fp8_checkpoint, (ExpertRange(1, 4, 3, 8),), served.dtype))
        fresh = Served(expected, native=True)
        try:
            found, wanted_reply = changing.ask(**wanted).tensor, fresh.ask(**wanted).tensor
            assert found is not None and wanted_reply is not None and torch.equal(found, wanted_reply)
        finally:
            fresh.close()
    finally:
        changing.close()


def test_after_a_drain_frames_are_turned_away(served: Served) -> None:
    for _ in range(20):
        assert served.ask().status is ComputeStatus.OK
    served.server.drain(grace_s=0)
    assert served.ask().status is ComputeStatus.DRAINING


def test_a_router_that_goes_away_is_noticed(served: Served) -> None:
    served.ask()
    served.client.close()
    deadline = time.monotonic() + TIMEOUT_S
    while served.server.num_streams:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_bytes_that_were_tampered_with_harm_nobody_else(served: Served) -> None:
    """Any byte of frame header, prefix, message header and pairs may be wrong: other streams are served on."""
    chosen = random.Random(11)
    message = make_request(hidden_states=torch.ones(2, 192, dtype=served.dtype))
    data = make_frame(0, 0, 1, b"\0" + len(message).to_bytes(4, "big") + message)
    for _ in range(120):
        tampered = bytearray(data)
        for _ in range(chosen.choice([1, 1, 3])):
            tampered[chosen.randrange(120)] = chosen.choice([0, 1, 0x7F, 0x80, 0xFF, chosen.randrange(256)])
        other = RouterClient(served.server.endpoint)
        other.send(message)
        assert other.receive().status is ComputeStatus.OK
        other._stream.socket.send(tampered)  # pyright: ignore[reportPrivateUsage]
        other.close()
        assert served.ask().status is ComputeStatus.OK
