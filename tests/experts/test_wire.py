"""The byte layout: what is sent arrives, what is malformed is refused as BadFrame and as nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts import wire
from experts.activation_quantization import dequantize_rows, quantize_rows
from experts.errors import BadFrame
from experts.expert_range import ExpertRange
from experts.v1 import experts_pb2


def make_request(**overrides: Any) -> dict[str, Any]:
    """Arguments of encode_request: 3 rows of 8, the middle one chosen by nobody."""
    return {
        "frame_id": 7,
        "incarnation": 2**63 + 5,
        "table_version": 9,
        "layer_id": 4,
        "hidden_states": torch.arange(24, dtype=torch.float32).reshape(3, 8),
        "pair_rows": torch.tensor([0, 0, 2], dtype=torch.int32),
        "pair_experts": torch.tensor([1, 5, 0], dtype=torch.int32),
        "pair_weights": torch.tensor([0.5, 0.25, 1.0]),
        "exact": False,
        "deadline_ms": 1500,
        **overrides,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_a_request_arrives_as_sent(dtype: torch.dtype, exact: bool) -> None:
    sent = make_request(exact=exact)
    sent["hidden_states"] = sent["hidden_states"].to(dtype)
    frame = wire.decode_request(wire.encode_request(**sent))
    for name in ("frame_id", "incarnation", "table_version", "layer_id", "exact", "deadline_ms"):
        assert getattr(frame, name) == sent[name]
    assert torch.equal(frame.hidden_states, sent["hidden_states"]) and frame.hidden_states.dtype == dtype
    for name in ("pair_rows", "pair_experts", "pair_weights"):
        assert np.array_equal(getattr(frame, name), sent[name].numpy())
    assert frame.num_result_rows == 3


@pytest.mark.parametrize("hidden_size", [8, 300])
def test_fp8_rows_arrive_as_sent(hidden_size: int) -> None:
    rows = quantize_rows(torch.randn(3, hidden_size, generator=torch.Generator().manual_seed(0)))
    frame = wire.decode_request(wire.encode_request(**make_request(hidden_states=rows, reply_dtype=torch.bfloat16)))
    assert frame.hidden_states.dtype == torch.float8_e4m3fn and frame.reply_dtype == torch.bfloat16
    assert frame.scales is not None and torch.equal(frame.scales, rows.scales)
    assert torch.equal(frame.load_hidden_states(torch.float32), dequantize_rows(rows))
    assert torch.equal(frame.load_hidden_states(torch.bfloat16), dequantize_rows(rows).to(torch.bfloat16))


def test_the_published_width_takes_at_most_052_of_the_bytes_of_bfloat16() -> None:
    row_bytes = [wire.compute_row_bytes(7168, dtype) for dtype in (torch.float8_e4m3fn, torch.bfloat16)]
    assert row_bytes == [7168 + 4 * 56, 2 * 7168] and row_bytes[0] <= 0.52 * row_bytes[1]


def test_an_older_router_that_names_no_reply_dtype_is_answered_in_its_own() -> None:
    assert wire.decode_request(_edit("reply_dtype", 0)).reply_dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_and_positive_is_refused(scale: float) -> None:
    rows = quantize_rows(torch.ones(3, 300))
    rows.scales[1, 2] = scale
    with pytest.raises(BadFrame, match="scale") as caught:
        wire.decode_request(wire.encode_request(**make_request(hidden_states=rows)))
    assert caught.value.frame_id == 7
    answer = bytearray(encode_ok(torch.ones(3, 300), dtype=torch.float8_e4m3fn))
    start = len(answer) - 3 * wire.compute_row_bytes(300, torch.float8_e4m3fn)
    answer[start : start + 4] = np.float32(scale).tobytes()
    with pytest.raises(BadFrame, match="scale"):
        wire.decode_response(bytes(answer))


def test_a_request_is_an_ordinary_protobuf_message() -> None:
    message = experts_pb2.ComputeRequest.FromString(wire.encode_request(**make_request()))
    assert message.header.num_pairs == 3 and message.header.combine == experts_pb2.COMBINE_MODE_REDUCED
    assert message.tensors[:12] == np.array([0, 0, 2], dtype="<i4").tobytes()


def test_fields_in_another_order_are_read_all_the_same() -> None:
    message = experts_pb2.ComputeRequest.FromString(wire.encode_request(**make_request()))
    tensors_first = (
        experts_pb2.ComputeRequest(tensors=message.tensors).SerializeToString()
        + experts_pb2.ComputeRequest(header=message.header).SerializeToString()
    )
    assert torch.equal(wire.decode_request(tensors_first).hidden_states, make_request()["hidden_states"])


def test_tensors_that_are_no_whole_tensors_in_memory_are_sent_right() -> None:
    hidden_states = torch.arange(48, dtype=torch.float32).reshape(3, 16)[:, ::2]
    frame = wire.decode_request(wire.encode_request(**make_request(hidden_states=hidden_states)))
    assert torch.equal(frame.hidden_states, hidden_states)


def _edit(field: str, value: int) -> bytes:
    """A request whose header says something else."""
    message = experts_pb2.ComputeRequest.FromString(wire.encode_request(**make_request()))
    setattr(message.header, field, value)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_edit("num_rows", 4), "tensors take"),
        (_edit("num_rows", 2**32 - 1), "tensors take"),
        (_edit("num_pairs", 2), "tensors take"),
        (_edit("num_rows", 0), "empty frame"),
        (_edit("num_pairs", 0), "empty frame"),
        (_edit("dtype", 0), "unknown tensor dtype 0"),
        (_edit("dtype", 77), "unknown tensor dtype 77"),
        (_edit("dtype", 3), "tensors take"),
        (_edit("reply_dtype", 77), "unknown reply dtype 77"),
        (_edit("combine", 0), "unknown combine mode 0"),
        (wire.encode_request(**make_request(pair_rows=torch.tensor([0, 0, 3], dtype=torch.int32))), "outside 0..2"),
        (wire.encode_request(**make_request(pair_rows=torch.tensor([-1, 0, 2], dtype=torch.int32))), "outside 0..2"),
        (wire.encode_request(**make_request(pair_rows=torch.tensor([2, 0, 0], dtype=torch.int32))), "not sorted"),
        (wire.encode_request(**make_request(pair_experts=torch.tensor([5, 5, 0], dtype=torch.int32))), "or repeat"),
        (wire.encode_request(**make_request(pair_experts=torch.tensor([-1, 5, 0], dtype=torch.int32))), "negative"),
        (wire.encode_request(**make_request(pair_weights=torch.tensor([1.0, float("nan"), 1.0]))), "not finite"),
        (wire.encode_request(**make_request(pair_weights=torch.tensor([1.0, float("inf"), 1.0]))), "not finite"),
    ],
)
def test_a_contradictory_request_is_refused_with_its_number(data: bytes, message: str) -> None:
    with pytest.raises(BadFrame, match=message) as caught:
        wire.decode_request(data)
    assert caught.value.frame_id == 7


@pytest.mark.parametrize("data", [b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05\xff\xff\xff\xff\xff"])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(BadFrame):
        wire.decode_request(data)
    with pytest.raises(BadFrame):
        wire.decode_response(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_decoded(data: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_response):
        try:
            decode(data)
        except BadFrame as error:
            assert "\n" not in str(error)


@given(st.integers(0, 10_000), st.integers(1, 255), st.integers(0, 10_000))
def test_a_flipped_or_cut_message_is_refused_or_decoded(position: int, flip: int, length: int) -> None:
    request = bytearray(wire.encode_request(**make_request()))
    response = bytearray(encode_ok())
    for data, decode in ((request, wire.decode_request), (response, wire.decode_response)):
        data[position % len(data)] ^= flip
        for damaged in (bytes(data), bytes(data[: length % len(data)])):
            try:
                decode(damaged)
            except BadFrame as error:
                assert "\n" not in str(error)


def encode_ok(tensor: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> bytes:
    if tensor is None:
        tensor = torch.ones(2, 4)
    return wire.encode_response(frame_id=7, incarnation=3, tensor=tensor, queue_us=11, compute_us=12, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_arrives_as_sent(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    reply = wire.decode_response(encode_ok(tensor), expected_rows=5, expected_hidden_size=8, expected_dtype=dtype)
    assert reply.tensor is not None and torch.equal(reply.tensor, tensor)
    assert (reply.frame_id, reply.incarnation, reply.status) == (7, 3, wire.ComputeStatus.OK)
    assert (reply.queue_us, reply.compute_us) == (11, 12)


def test_an_fp8_answer_arrives_as_float32() -> None:
    tensor = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    reply = wire.decode_response(encode_ok(tensor, torch.float8_e4m3fn), expected_dtype=torch.float8_e4m3fn)
    assert reply.tensor is not None and torch.equal(reply.tensor, dequantize_rows(quantize_rows(tensor)))
    assert reply.dtype == torch.float8_e4m3fn


def test_a_refusal_arrives_as_sent() -> None:
    data = wire.encode_refusal(frame_id=7, incarnation=3, status=wire.ComputeStatus.NOT_HOSTED, message="not here")
    reply = wire.decode_response(data)
    assert (reply.frame_id, reply.status, reply.message, reply.tensor) == (
        7,
        wire.ComputeStatus.NOT_HOSTED,
        "not here",
        None,
    )


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"expected_rows": 3}, "rows of the answer: expected 3, got 2"),
        ({"expected_hidden_size": 8}, "hidden size of the answer: expected 8, got 4"),
        ({"expected_dtype": torch.bfloat16}, "dtype of the answer"),
    ],
)
def test_an_answer_of_another_shape_than_asked_for_is_refused(expected: dict[str, Any], message: str) -> None:
    with pytest.raises(BadFrame, match=message) as caught:
        wire.decode_response(encode_ok(), **expected)
    assert caught.value.frame_id == 7


def test_an_answer_with_a_status_nobody_knows_is_refused() -> None:
    data = experts_pb2.ComputeResponse(header=experts_pb2.ComputeResponseHeader(frame_id=7)).SerializeToString()
    with pytest.raises(BadFrame, match="unknown compute status 0"):
        wire.decode_response(data)


@pytest.mark.parametrize("wire_format", [wire.WireFormat.FP8, wire.WireFormat.FP8_BOTH])
def test_the_largest_fp8_frame_fits(wire_format: wire.WireFormat) -> None:
    rows = wire.compute_max_rows(4096, 1, wire_format, exact=False)
    request = wire.encode_request(
        **make_request(
            hidden_states=quantize_rows(torch.zeros(rows, 4096)),
            pair_rows=torch.arange(rows, dtype=torch.int32),
            pair_experts=torch.zeros(rows, dtype=torch.int32),
            pair_weights=torch.ones(rows),
        )
    )
    answer = encode_ok(torch.zeros(rows, 4096), wire_format.reply_dtype)
    assert wire.MAX_MESSAGE_BYTES - 64 * 1024 < max(len(request), len(answer)) <= wire.MAX_MESSAGE_BYTES


@pytest.mark.parametrize("exact", [False, True])
def test_the_largest_frame_fits_and_a_larger_one_is_refused(exact: bool) -> None:
    hidden_size, num_chosen = 4096, 2
    rows = wire.compute_max_rows(hidden_size, num_chosen, wire.WireFormat.BFLOAT16, exact=exact)
    pairs = rows * num_chosen
    request = wire.encode_request(
        **make_request(
            hidden_states=torch.zeros(rows, hidden_size, dtype=torch.bfloat16),
            pair_rows=torch.arange(rows, dtype=torch.int32).repeat_interleave(num_chosen),
            pair_experts=torch.arange(num_chosen, dtype=torch.int32).repeat(rows),
            pair_weights=torch.ones(pairs),
        )
    )
    answer = encode_ok(torch.zeros(pairs if exact else rows, hidden_size, dtype=torch.bfloat16))
    assert max(len(request), len(answer)) <= wire.MAX_MESSAGE_BYTES
    with pytest.raises(BadFrame, match="exceeds the cap"):
        encode_ok(torch.zeros(wire.MAX_MESSAGE_BYTES // (2 * hidden_size) + 1, hidden_size, dtype=torch.bfloat16))


def test_expert_ranges_survive_the_wire() -> None:
    ranges = (ExpertRange(1, 3, 0, 8), ExpertRange(4, 5, 2, 3))
    assert wire.expert_ranges_from_proto([wire.expert_range_to_proto(block) for block in ranges]) == ranges
