"""The byte layout of one frame: the only code that knows how experts.proto looks on the wire.

A message is a small protobuf header (field 1) followed by one bytes field (field 2) with raw little-endian
tensors. Senders append the tensors to the serialised header in one copy; receivers slice them without a copy.
Whatever arrives is input: sizes, order and values are checked and refused as BadFrame.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import numpy as np
import torch
from google.protobuf.message import DecodeError, Message

from experts.activation_quantization import QuantizedRows, count_blocks, dequantize_rows, quantize_rows
from experts.errors import BadFrame
from experts.expert_range import ExpertRange
from experts.v1 import experts_pb2

# Explicit cap of both sides (gRPC's default is 4 MiB to receive and no limit to send).
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
SERVICE_NAME = "experts.v1.ExpertService"
DESCRIBE_METHOD = f"/{SERVICE_NAME}/Describe"
COMPUTE_METHOD = f"/{SERVICE_NAME}/Compute"

# What a message or a part of one may come or go as: contiguous bytes.
Buffer = bytes | bytearray | memoryview

_Header = TypeVar("_Header", bound=Message)

_HEADER_TAG = 0x0A  # field 1, length-delimited
_TENSORS_TAG = 0x12  # field 2, length-delimited
# A header is a few dozen bytes plus at most one line of text.
_MAX_HEADER_BYTES = 16 * 1024
# Up to so many pairs plain Python checks them faster than numpy.
_FEW_PAIRS = 32
_INT32, _FLOAT32 = np.dtype("<i4"), np.dtype("<f4")
_PAIR_BYTES = 12  # int32 row, int32 expert, float32 weight

_PROTO_OF_DTYPE = {
    torch.bfloat16: experts_pb2.TENSOR_DTYPE_BFLOAT16,
    torch.float32: experts_pb2.TENSOR_DTYPE_FLOAT32,
    # Always with scales: experts/activation_quantization.py.
    torch.float8_e4m3fn: experts_pb2.TENSOR_DTYPE_FP8_E4M3_BLOCK128,
}
_DTYPE_OF_PROTO = {value: dtype for dtype, value in _PROTO_OF_DTYPE.items()}

# Decoded tensors share the memory of immutable bytes on purpose, and nobody writes to them. torch warns of that once
# in the life of a process: let it do so here, unheard.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


class WireFormat(Enum):
    """What activations travel as, out to the experts and back; the value is the setting's name."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FP8 = "fp8"
    FP8_BOTH = "fp8-both"

    @property
    def request_dtype(self) -> torch.dtype:
        return _DTYPES_OF_FORMAT[self][0]

    @property
    def reply_dtype(self) -> torch.dtype:
        return _DTYPES_OF_FORMAT[self][1]


_DTYPES_OF_FORMAT = {
    WireFormat.BFLOAT16: (torch.bfloat16, torch.bfloat16),
    WireFormat.FLOAT32: (torch.float32, torch.float32),
    WireFormat.FP8: (torch.float8_e4m3fn, torch.bfloat16),
    WireFormat.FP8_BOTH: (torch.float8_e4m3fn, torch.float8_e4m3fn),
}


class ComputeStatus(Enum):
    """ComputeStatus of experts.proto; see there for what a router does about each."""

    OK = experts_pb2.COMPUTE_STATUS_OK
    STALE_INCARNATION = experts_pb2.COMPUTE_STATUS_STALE_INCARNATION
    NOT_HOSTED = experts_pb2.COMPUTE_STATUS_NOT_HOSTED
    OVERLOADED = experts_pb2.COMPUTE_STATUS_OVERLOADED
    BAD_REQUEST = experts_pb2.COMPUTE_STATUS_BAD_REQUEST
    INTERNAL = experts_pb2.COMPUTE_STATUS_INTERNAL
    DRAINING = experts_pb2.COMPUTE_STATUS_DRAINING


@dataclass(frozen=True, slots=True)
class ComputeFrame:
    """A decoded request.

    hidden_states: [num_rows, hidden_size] in the wire dtype, sharing the message's memory (possibly unaligned).
    scales: float32 [num_rows, ceil(hidden_size / 128)] of FP8 rows, finite and positive; None for other dtypes.
    reply_dtype: what the answer is wanted in.
    pair_rows, pair_experts: int32 [num_pairs], sorted by row, then by expert, without repetition.
    pair_weights: float32 [num_pairs], finite. exact: one result row per pair instead of one per row.
    """

    frame_id: int
    incarnation: int
    table_version: int
    layer_id: int
    hidden_states: torch.Tensor
    pair_rows: np.ndarray
    pair_experts: np.ndarray
    pair_weights: np.ndarray
    exact: bool
    deadline_ms: int
    reply_dtype: torch.dtype
    scales: torch.Tensor | None = None

    @property
    def num_result_rows(self) -> int:
        return len(self.pair_rows) if self.exact else self.hidden_states.shape[0]

    def load_hidden_states(self, dtype: torch.dtype) -> torch.Tensor:
        """The rows in dtype, [num_rows, hidden_size], in memory of their own."""
        if self.scales is None:
            return self.hidden_states.to(dtype, copy=True)
        return dequantize_rows(QuantizedRows(self.hidden_states, self.scales)).to(dtype)


@dataclass(frozen=True, slots=True)
class ComputeReply:
    """A decoded response. tensor: [rows, hidden_size], float32 if it travelled as FP8, else in the wire dtype; None
    unless status is OK, as is dtype, that of the wire."""

    frame_id: int
    incarnation: int
    status: ComputeStatus
    message: str
    tensor: torch.Tensor | None
    queue_us: int
    compute_us: int
    dtype: torch.dtype | None = None


def compute_row_bytes(hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of one row of activations on the wire, scales included."""
    scale_bytes = 4 * count_blocks(hidden_size) if dtype == torch.float8_e4m3fn else 0
    return hidden_size * dtype.itemsize + scale_bytes


def compute_max_rows(hidden_size: int, num_experts_per_tok: int, wire_format: WireFormat, *, exact: bool) -> int:
    """Largest number of rows whose request and reply both fit in one message, every row choosing all its experts."""
    request_bytes = compute_row_bytes(hidden_size, wire_format.request_dtype) + num_experts_per_tok * _PAIR_BYTES
    reply_bytes = compute_row_bytes(hidden_size, wire_format.reply_dtype) * (num_experts_per_tok if exact else 1)
    return (MAX_MESSAGE_BYTES - _MAX_HEADER_BYTES) // max(request_bytes, reply_bytes)


def encode_request_parts(
    *,
    frame_id: int,
    incarnation: int,
    table_version: int,
    layer_id: int,
    hidden_states: torch.Tensor | QuantizedRows,
    pair_rows: np.ndarray | torch.Tensor,
    pair_experts: np.ndarray | torch.Tensor,
    pair_weights: np.ndarray | torch.Tensor,
    exact: bool,
    deadline_ms: int,
    reply_dtype: torch.dtype | None = None,
) -> list[Buffer]:
    """Encode one frame without a copy of its tensors: the parts are the message, one after the other.

    hidden_states: [num_rows, hidden_size] bfloat16 or float32, or FP8 rows, on the CPU. pair_rows, pair_experts: int32
    [num_pairs], sorted by row, then expert. pair_weights: float32 [num_pairs]. reply_dtype: None: as the request's.
    """
    pairs = [np.ascontiguousarray(values) for values in (pair_rows, pair_experts, pair_weights)]
    assert [values.dtype for values in pairs] == [np.int32, np.int32, np.float32]
    values, row_parts = _split_rows(hidden_states)
    num_rows, hidden_size = values.shape
    header = experts_pb2.ComputeRequestHeader(
        frame_id=frame_id,
        incarnation=incarnation,
        table_version=table_version,
        layer_id=layer_id,
        num_rows=num_rows,
        num_pairs=len(pairs[0]),
        hidden_size=hidden_size,
        dtype=_PROTO_OF_DTYPE[values.dtype],
        reply_dtype=_PROTO_OF_DTYPE[reply_dtype or values.dtype],
        combine=experts_pb2.COMBINE_MODE_EXACT if exact else experts_pb2.COMBINE_MODE_REDUCED,
        deadline_ms=deadline_ms,
    )
    parts = [values.view(np.uint8).data for values in pairs]
    return _assemble(header, [*parts, *(view_bytes(tensor) for tensor in row_parts)])


def encode_request(**request: Any) -> bytes:
    """The message of encode_request_parts() in one piece."""
    return b"".join(encode_request_parts(**request))


def decode_request(data: Buffer) -> ComputeFrame:
    """Decode and check one frame without copying its tensors.

    Raises BadFrame, with the frame_id where the header could be read.
    """
    header, view = _split(data, experts_pb2.ComputeRequestHeader, experts_pb2.ComputeRequest)
    frame_id, num_rows, num_pairs, hidden_size = header.frame_id, header.num_rows, header.num_pairs, header.hidden_size
    dtype = _DTYPE_OF_PROTO.get(header.dtype)
    if dtype is None:
        raise BadFrame(f"unknown tensor dtype {header.dtype}", frame_id=frame_id)
    # Routers older than the field leave it UNSPECIFIED.
    reply_dtype = _DTYPE_OF_PROTO.get(header.reply_dtype or header.dtype)
    if reply_dtype is None:
        raise BadFrame(f"unknown reply dtype {header.reply_dtype}", frame_id=frame_id)
    if header.combine == experts_pb2.COMBINE_MODE_EXACT:
        exact = True
    elif header.combine == experts_pb2.COMBINE_MODE_REDUCED:
        exact = False
    else:
        raise BadFrame(f"unknown combine mode {header.combine}", frame_id=frame_id)
    if num_rows == 0 or num_pairs == 0 or hidden_size == 0:
        raise BadFrame(f"empty frame: {num_rows} rows, {num_pairs} pairs, hidden size {hidden_size}", frame_id=frame_id)
    expected_bytes = num_pairs * _PAIR_BYTES + num_rows * compute_row_bytes(hidden_size, dtype)
    if len(view) != expected_bytes:
        raise BadFrame(f"tensors take {len(view)} bytes, the header demands {expected_bytes}", frame_id=frame_id)
    pairs = np.frombuffer(view, _INT32, 3 * num_pairs)
    pair_rows, pair_experts = pairs[:num_pairs], pairs[num_pairs : 2 * num_pairs]
    pair_weights = pairs[2 * num_pairs :].view(_FLOAT32)
    _check_pairs(frame_id, num_rows, pair_rows, pair_experts, pair_weights)
    hidden_states, scales = _read_rows(frame_id, view[num_pairs * _PAIR_BYTES :], num_rows, hidden_size, dtype)
    return ComputeFrame(
        frame_id=frame_id,
        incarnation=header.incarnation,
        table_version=header.table_version,
        layer_id=header.layer_id,
        hidden_states=hidden_states,
        pair_rows=pair_rows,
        pair_experts=pair_experts,
        pair_weights=pair_weights,
        exact=exact,
        deadline_ms=header.deadline_ms,
        reply_dtype=reply_dtype,
        scales=scales,
    )


def encode_response_parts(
    *,
    frame_id: int,
    incarnation: int,
    tensor: torch.Tensor,
    queue_us: int,
    compute_us: int,
    dtype: torch.dtype | None = None,
) -> list[Buffer]:
    """Encode a result, without a copy unless it changes its dtype: the parts are the message, one after the other.

    tensor: [rows, hidden_size], bfloat16 or float32, on the CPU. It travels as dtype or its own.
    """
    dtype = dtype or tensor.dtype
    rows: torch.Tensor | QuantizedRows = tensor
    if dtype != tensor.dtype:
        rows = quantize_rows(tensor) if dtype == torch.float8_e4m3fn else tensor.to(dtype)
    header = experts_pb2.ComputeResponseHeader(
        frame_id=frame_id,
        incarnation=incarnation,
        status=experts_pb2.COMPUTE_STATUS_OK,
        num_rows=tensor.shape[0],
        hidden_size=tensor.shape[1],
        dtype=_PROTO_OF_DTYPE[dtype],
        queue_us=queue_us,
        compute_us=compute_us,
    )
    return _assemble(header, [view_bytes(part) for part in _split_rows(rows)[1]])


def encode_response(**response: Any) -> bytes:
    """The message of encode_response_parts() in one piece."""
    return b"".join(encode_response_parts(**response))


def encode_refusal(*, frame_id: int, incarnation: int, status: ComputeStatus, message: str) -> bytes:
    """Encode an answer without a result; message is one line for the router's log."""
    header = experts_pb2.ComputeResponseHeader(
        frame_id=frame_id, incarnation=incarnation, status=status.value, message=message[:1000]
    )
    return b"".join(_assemble(header, []))


def decode_response(
    data: Buffer,
    *,
    expected_rows: int | None = None,
    expected_hidden_size: int | None = None,
    expected_dtype: torch.dtype | None = None,
) -> ComputeReply:
    """Decode an answer without copying its tensor (but for FP8), which therefore must not be written to.

    What is expected, where given, is compared with an OK answer. Whether its values are finite is the caller's to
    judge. Raises BadFrame, with the frame_id where the header could be read.
    """
    header, view = _split(data, experts_pb2.ComputeResponseHeader, experts_pb2.ComputeResponse)
    frame_id = header.frame_id
    try:
        status = ComputeStatus(header.status)
    except ValueError as error:
        raise BadFrame(f"unknown compute status {header.status}", frame_id=frame_id) from error
    tensor = dtype = None
    if status is ComputeStatus.OK:
        dtype = _DTYPE_OF_PROTO.get(header.dtype)
        num_rows, hidden_size = header.num_rows, header.hidden_size
        if dtype is None:
            raise BadFrame(f"unknown tensor dtype {header.dtype}", frame_id=frame_id)
        if num_rows == 0 or hidden_size == 0 or len(view) != num_rows * compute_row_bytes(hidden_size, dtype):
            raise BadFrame(
                f"tensor takes {len(view)} bytes, the header says [{num_rows}, {hidden_size}] of {dtype}",
                frame_id=frame_id,
            )
        for name, found, expected in (
            ("rows", num_rows, expected_rows),
            ("hidden size", hidden_size, expected_hidden_size),
            ("dtype", dtype, expected_dtype),
        ):
            if expected is not None and found != expected:
                raise BadFrame(f"{name} of the answer: expected {expected}, got {found}", frame_id=frame_id)
        tensor, scales = _read_rows(frame_id, view, num_rows, hidden_size, dtype)
        if scales is not None:
            tensor = dequantize_rows(QuantizedRows(tensor, scales))
    elif len(view):
        raise BadFrame(f"an answer with status {status.name} carries {len(view)} bytes of tensors", frame_id=frame_id)
    return ComputeReply(
        frame_id=frame_id,
        incarnation=header.incarnation,
        status=status,
        message=header.message,
        tensor=tensor,
        queue_us=header.queue_us,
        compute_us=header.compute_us,
        dtype=dtype,
    )


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """View a CPU tensor's elements as bytes; copies only if they are not contiguous."""
    # As few calls of torch as will do: between processes that share a core each costs tens of microseconds.
    if tensor.requires_grad or not tensor.is_contiguous():
        tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint8).numpy().data.cast("B")


def expert_range_to_proto(value: ExpertRange) -> experts_pb2.ExpertRange:
    return experts_pb2.ExpertRange(
        layer_start=value.layer_start,
        layer_end=value.layer_end,
        expert_start=value.expert_start,
        expert_end=value.expert_end,
    )


def expert_range_from_proto(value: experts_pb2.ExpertRange) -> ExpertRange:
    """Raises ConfigError if the range is empty."""
    return ExpertRange(value.layer_start, value.layer_end, value.expert_start, value.expert_end)


def expert_ranges_from_proto(values: Sequence[experts_pb2.ExpertRange]) -> tuple[ExpertRange, ...]:
    return tuple(expert_range_from_proto(value) for value in values)


def _split_rows(rows: torch.Tensor | QuantizedRows) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The tensor that has the rows' shape and dtype, and the tensors as they follow each other on the wire."""
    return (rows.values, (rows.scales, rows.values)) if isinstance(rows, QuantizedRows) else (rows, (rows,))


def _read_rows(
    frame_id: int, view: memoryview, num_rows: int, hidden_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read rows, and scales if FP8, without a copy. The view has the right length. Raises BadFrame for bad scales."""
    scales = None
    offset = 0
    if dtype == torch.float8_e4m3fn:
        num_blocks = count_blocks(hidden_size)
        offset = 4 * num_rows * num_blocks
        scales = torch.frombuffer(view, dtype=torch.float32, count=num_rows * num_blocks).view(num_rows, num_blocks)
        found = scales.numpy()
        # NaN compares false too.
        if not ((found > 0) & (found < np.inf)).all():
            raise BadFrame("a scale of FP8 rows is not finite and positive", frame_id=frame_id)
    return torch.frombuffer(view, dtype=dtype, offset=offset).view(num_rows, hidden_size), scales


def _check_pairs(
    frame_id: int, num_rows: int, pair_rows: np.ndarray, pair_experts: np.ndarray, pair_weights: np.ndarray
) -> None:
    if len(pair_rows) <= _FEW_PAIRS and _are_few_pairs_sound(num_rows, pair_rows, pair_experts, pair_weights):
        return
    if pair_rows.min() < 0 or pair_rows.max() >= num_rows:
        raise BadFrame(f"a pair names a row outside 0..{num_rows - 1}", frame_id=frame_id)
    if pair_experts.min() < 0:
        raise BadFrame("a pair names a negative expert", frame_id=frame_id)
    order = (pair_rows.astype(np.int64) << 32) | pair_experts
    if (order[1:] <= order[:-1]).any():
        raise BadFrame("pairs are not sorted by row and expert, or repeat", frame_id=frame_id)
    if not np.isfinite(pair_weights).all():
        raise BadFrame("a pair weight is not finite", frame_id=frame_id)


def _are_few_pairs_sound(
    num_rows: int, pair_rows: np.ndarray, pair_experts: np.ndarray, pair_weights: np.ndarray
) -> bool:
    """The same checks in plain Python: on a few pairs a tenth of the time of ten numpy calls."""
    last_row, last_expert = 0, -1
    for row, expert, weight in zip(pair_rows.tolist(), pair_experts.tolist(), pair_weights.tolist(), strict=True):
        if row > last_row:
            last_expert = -1
        if not (last_row <= row < num_rows and expert > last_expert and math.isfinite(weight)):
            return False
        last_row, last_expert = row, expert
    return True


def _assemble(header: Message, parts: Sequence[memoryview]) -> list[Buffer]:
    """Put a message together: header as field 1, the parts as field 2 (left out when empty, as proto3 does)."""
    head = header.SerializeToString()
    start = bytearray((_HEADER_TAG,))
    _append_varint(start, len(head))
    start += head
    size = sum(map(len, parts))
    if parts:
        start.append(_TENSORS_TAG)
        _append_varint(start, size)
    size += len(start)
    if size > MAX_MESSAGE_BYTES:
        raise BadFrame(f"a frame of {size} bytes exceeds the cap of {MAX_MESSAGE_BYTES}: send fewer rows")
    return [start, *parts]


def _split(data: Buffer, header_type: type[_Header], message_type: type[Message]) -> tuple[_Header, memoryview]:
    """Find header and tensor bytes: by hand where the fields lie as we write them, else with the protobuf parser."""
    view = memoryview(data)
    located = _locate(view)
    try:
        if located is not None:
            header_start, header_end, tensors_start = located
            return header_type.FromString(bytes(view[header_start:header_end])), view[tensors_start:]
        message: Any = message_type.FromString(bytes(data))
    except DecodeError as error:
        raise BadFrame(f"{len(data)} bytes that are no {message_type.DESCRIPTOR.name}: {error}") from error
    return message.header, memoryview(message.tensors)


def _locate(view: memoryview) -> tuple[int, int, int] | None:
    """Find (header start, header end, tensors start) if the message is field 1, then field 2 or nothing."""
    if len(view) < 2 or view[0] != _HEADER_TAG:
        return None
    header = _read_varint(view, 1)
    if header is None:
        return None
    header_size, header_start = header
    header_end = header_start + header_size
    if header_end == len(view):
        return header_start, header_end, header_end
    if header_end > len(view) or view[header_end] != _TENSORS_TAG:
        return None
    tensors = _read_varint(view, header_end + 1)
    if tensors is None:
        return None
    tensors_size, tensors_start = tensors
    if tensors_start + tensors_size != len(view):
        return None
    return header_start, header_end, tensors_start


def _read_varint(view: memoryview, position: int) -> tuple[int, int] | None:
    """Read a length: (value, position behind it), or None if it is no varint below 2^35."""
    value = 0
    for index in range(5):
        if position + index >= len(view):
            return None
        byte = view[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    return None


def _append_varint(target: bytearray, value: int) -> None:
    while value >= 0x80:
        target.append(value & 0x7F | 0x80)
        value >>= 7
    target.append(value)
