"""Frames answered without the interpreter: the loop of an expert server in the native library (cpu/serve.h).

It waits for the streams, reads a frame, checks it, computes and answers for as long as frames are usual ones: whole,
sound, in the dtype of the weights, for this incarnation and with nothing else to be joined with. Everything else it
leaves to the thread that called it. With the interpreter a frame of one row took 170 us beside its experts, most of it
for calls whose code and data other processes had driven out of the caches.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from experts.kernels.cpu_ffn import CpuKernel, PackedLayer, load_library
from experts.load_meter import SLOT_S, LoadMeter, LoadSlot, LoadSums
from experts.model_config import ModelConfig
from experts.native_link import NativeLink
from experts.v1 import experts_pb2

_WIRE_DTYPES: Final = {
    torch.bfloat16: experts_pb2.TENSOR_DTYPE_BFLOAT16,
    torch.float32: experts_pb2.TENSOR_DTYPE_FLOAT32,
}
_MOST_SLOTS = 32


@dataclass(frozen=True)
class FrameFunction:
    """A ComputeFrame of cpu/serve.h. address, context: of the C function and its first argument. dtype: of the rows
    that it takes. Layers and experts are below num_layers and num_experts."""

    address: int
    context: int
    dtype: torch.dtype
    hidden_size: int
    num_layers: int
    num_experts: int
    kept_alive: object


class _HostedLayer(ctypes.Structure):
    _fields_ = (
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("num_experts", ctypes.c_int32),
        ("num_slots", ctypes.c_int32),
    )


class _HostedLayers(ctypes.Structure):
    _fields_ = (
        ("family", ctypes.c_int32),
        ("arithmetic", ctypes.c_int32),
        ("num_layers", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("layers", ctypes.c_void_p),
    )


class _ServeOptions(ctypes.Structure):
    _fields_ = (
        ("incarnation", ctypes.c_uint64),
        ("hidden_size", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("num_layers", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("slot_s", ctypes.c_double),
        ("compute", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


class _LoadSlot(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_int64),
        ("busy_s", ctypes.c_double),
        ("queue_s", ctypes.c_double),
        ("max_queue_s", ctypes.c_double),
        ("num_frames", ctypes.c_int64),
        ("num_pairs", ctypes.c_int64),
    )


class NativeServing:
    """serve() is called by one thread; disable() and take_load() by any."""

    def __init__(self, library: ctypes.CDLL, function: FrameFunction, incarnation: int) -> None:
        """Raises MemoryError."""
        self._library = library
        self._function = function
        options = _ServeOptions(
            incarnation,
            function.hidden_size,
            _WIRE_DTYPES[function.dtype],
            function.num_layers,
            function.num_experts,
            SLOT_S,
            function.address,
            function.context,
        )
        self._server: int = library.shoal_server_new(ctypes.byref(options)) or 0
        if not self._server:
            raise MemoryError("no memory for a server")
        weakref.finalize(self, library.shoal_server_free, self._server)

    def make_link(self) -> NativeLink:
        return NativeLink(self._library)

    def serve(self, epoll_descriptor: int, links: Sequence[NativeLink]) -> None:
        """Serve until something happens that is not usual, be it on another descriptor of the epoll."""
        addresses = (ctypes.c_void_p * len(links))(*(link.address for link in links))
        self._library.shoal_serve(self._server, epoll_descriptor, addresses, len(links))

    def use(self, function: FrameFunction) -> None:
        """Go on with other experts. By the thread that serves; of the same sizes and dtype as the function before."""
        self._library.shoal_server_use(self._server, function.context)
        self._function = function

    def disable(self) -> None:
        """Answer no frame any more."""
        self._library.shoal_server_enable(self._server, 0)

    def take_load(self) -> LoadSums:
        """What was served since the last call."""
        slots = (_LoadSlot * _MOST_SLOTS)()
        pairs = np.zeros((self._function.num_layers, self._function.num_experts), dtype=np.int64)
        count = self._library.shoal_take_load(self._server, slots, _MOST_SLOTS, pairs.ctypes.data)
        return LoadSums(
            [
                LoadSlot(slot.index, slot.busy_s, slot.queue_s, slot.max_queue_s, slot.num_frames, slot.num_pairs)
                for slot in slots[:count]
            ],
            pairs,
        )


def make_native_serving(function: FrameFunction | None, incarnation: int, meter: LoadMeter) -> NativeServing | None:
    """None without a function or the library. What is served is counted by the meter."""
    library = load_library()
    if function is None or library is None:
        return None
    native = NativeServing(library, function, incarnation)
    meter.add_source(native.take_load)
    return native


def make_frame_function(
    kernel: CpuKernel, layers: Mapping[int, Mapping[int, Any]], dtype: torch.dtype, config: ModelConfig
) -> FrameFunction | None:
    """Of packed layers by id; None if there is none. dtype: of the kernel's rows. Its sizes are the model's, so that
    it can be followed by one of other experts."""
    library = load_library()
    packed = {layer_id: layer for layer_id, layer in layers.items() if isinstance(layer, PackedLayer)}
    if library is None or not packed or dtype not in _WIRE_DTYPES:
        return None
    table = (_HostedLayer * config.num_layers_total)()
    for layer_id, layer in packed.items():
        table[layer_id] = _HostedLayer(
            ctypes.addressof(layer.gate_up),
            ctypes.addressof(layer.down),
            layer.slots.ctypes.data,
            len(layer.slots),
            len(layer),
        )
    hosted = _HostedLayers(kernel.family_number, kernel.arithmetic_number, len(table), 0, ctypes.addressof(table))
    return FrameFunction(
        address=ctypes.cast(library.shoal_compute_frame, ctypes.c_void_p).value or 0,
        context=ctypes.addressof(hosted),
        dtype=dtype,
        hidden_size=next(iter(packed.values())).hidden_size,
        num_layers=len(table),
        num_experts=config.n_routed_experts,
        kept_alive=(hosted, table, packed),
    )
