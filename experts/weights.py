"""The routed experts of one group, loaded from the checkpoint by byte range and packed for a kernel.

A few threads read and hash while one packs, so that a start takes as long as the disk does. Experts can be added to a
group and taken from it while it serves: what is there already is packed already, and stays where it is.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from experts.checkpoint import Checkpoint, TensorInfo, decode_tensor
from experts.device import CPU, check_device_memory
from experts.expert_range import ExpertRange, list_hosted_pairs
from experts.kernels.cpu_ffn import ScaledWeight
from experts.kernels.expert_kernel import ExpertKernel, choose_expert_kernel
from experts.load_progress import LoadProgress
from experts.model_config import ModelConfig
from experts.staging import NUM_BUFFERS, Staging, compute_offsets
from experts.tensor_names import list_expert_tensors

logger = logging.getLogger(__name__)

_STORED_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
_MORE_GROUPS = "serve them with more expert groups, or in bfloat16"

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """layers: layer id -> expert id -> packed expert, in kernel's own form. expert_digests: SHA-256 of an expert's
    bytes as stored, by tensor name, for each (layer, expert). resident_bytes: in the device's memory."""

    config: ModelConfig
    hosted: tuple[ExpertRange, ...]
    dtype: torch.dtype
    kernel: ExpertKernel
    layers: Mapping[int, Mapping[int, Any]]
    expert_digests: Mapping[Pair, bytes]
    digest: str
    resident_bytes: int


class ExpertCopies(Protocol):
    """Where experts' bytes may come from instead of the disk: experts/peer_copy.py."""

    def read_into(self, pair: Pair, tensors: Sequence[TensorInfo], places: Sequence[np.ndarray]) -> bool:
        """Fill the places, uint8 and as long as the tensors; False: the disk has to do. Called by several threads."""
        ...


class _Planned(NamedTuple):
    """An expert to be read. tensors: sorted by name."""

    pair: Pair
    tensors: tuple[TensorInfo, ...]

    @property
    def offsets(self) -> list[int]:
        return compute_offsets([info.size_bytes for info in self.tensors])


def load_expert_weights(
    checkpoint: Checkpoint,
    hosted: Sequence[ExpertRange],
    dtype: torch.dtype,
    *,
    device: torch.device = CPU,
    kernel: ExpertKernel | None = None,
    on_fraction: Callable[[float], None] | None = None,
    copies: ExpertCopies | None = None,
) -> ExpertWeights:
    """Load every hosted expert, reading each byte once, expert by expert, and packing it where it will be used.

    All headers are checked before the first weight is read. dtype: to compute in. device: where; host memory then
    holds a few experts at most. kernel: None chooses the device's best; one that is given knows its own device.
    The digest is the SHA-256 (hex) of the experts' digests in (layer, expert) order, so two replicas have the same
    digest exactly if they hold the same experts of the same checkpoint. on_fraction: see LoadProgress. copies: asked
    for each expert's bytes before the disk is; headers are the checkpoint's own in any case.
    Raises ConfigError for a range outside the model, CheckpointError for what is wrong with the files and
    NotEnoughMemory, all of them before the first weight is read where they can be.
    """
    config = checkpoint.config
    plan = _plan_experts(checkpoint, list_hosted_pairs(config, tuple(hosted)))
    weight_dtypes = {_STORED_DTYPES[info.dtype] for item in plan for info in item.tensors if not _is_scale(info)}
    block = config.quantization.weight_block_size if config.quantization is not None else (1, 1)
    if kernel is None:
        kernel = choose_expert_kernel(dtype, weight_dtypes, block, device)
    shape = (config.hidden_size, config.moe_intermediate_size, next(iter(weight_dtypes)))
    resident_bytes = kernel.count_bytes(len(plan), *shape)
    working_bytes = kernel.count_working_bytes(config.hidden_size, config.moe_intermediate_size)
    check_device_memory(kernel.device, resident_bytes + working_bytes, f"{len(plan)} experts", _MORE_GROUPS)
    room = kernel.reserve(len(plan), *shape)
    packed: dict[int, dict[int, Any]] = {}
    digests: dict[Pair, bytes] = {}
    for (layer_id, expert_id), digest, (gate, up, down) in _read_experts(
        checkpoint, plan, kernel.device, on_fraction, copies
    ):
        packed.setdefault(layer_id, {})[expert_id] = kernel.pack_expert(gate, up, down, room)
        digests[layer_id, expert_id] = digest
    layers = {layer_id: kernel.build_layer(experts) for layer_id, experts in packed.items()}
    return ExpertWeights(config, tuple(hosted), dtype, kernel, layers, digests, _join_digests(digests), resident_bytes)


def change_hosted(
    weights: ExpertWeights,
    checkpoint: Checkpoint,
    hosted: Sequence[ExpertRange],
    on_fraction: Callable[[float], None] | None = None,
) -> ExpertWeights:
    """The weights of other experts: those that are there already are taken over, the rest is read.

    weights stay as they are, for frames that are being computed; memory that only they use is given back once nobody
    has them any more. Raises what load_expert_weights raises.
    """
    config, kernel = weights.config, weights.kernel
    wanted = list(list_hosted_pairs(config, tuple(hosted)))
    plan = _plan_experts(checkpoint, (pair for pair in wanted if pair not in weights.expert_digests))
    wanted_layers = {
        layer_id: [expert_id for _, expert_id in pairs]
        for layer_id, pairs in itertools.groupby(wanted, key=lambda pair: pair[0])
    }
    is_new = {item.pair for item in plan}
    changed = {
        layer_id: ids for layer_id, ids in wanted_layers.items() if ids != list(weights.layers.get(layer_id, ()))
    }
    num_packed = sum(map(len, changed.values())) if kernel.needs_whole_layers else len(plan)
    stored_dtype = _find_stored_dtype(checkpoint, wanted[0])
    shape = (config.hidden_size, config.moe_intermediate_size, stored_dtype)
    check_device_memory(
        kernel.device, kernel.count_bytes(num_packed, *shape), f"{num_packed} experts beside those there", _MORE_GROUPS
    )
    room = kernel.reserve(num_packed, *shape) if num_packed else None
    arriving = _read_experts(checkpoint, plan, kernel.device, on_fraction)
    digests = {pair: weights.expert_digests[pair] for pair in wanted if pair not in is_new}
    layers = {layer_id: weights.layers[layer_id] for layer_id in wanted_layers if layer_id not in changed}
    # In the order in which they are read, which is that of the layers and experts.
    for layer_id, expert_ids in changed.items():
        experts: dict[int, Any] = {}
        for expert_id in expert_ids:
            if (layer_id, expert_id) in is_new:
                pair, digests[layer_id, expert_id], (gate, up, down) = next(arriving)
                assert pair == (layer_id, expert_id)
                experts[expert_id] = kernel.pack_expert(gate, up, down, room)
            else:
                experts[expert_id] = kernel.adopt_expert(weights.layers[layer_id][expert_id], room)
        layers[layer_id] = kernel.build_layer(experts, is_serving=True)
    # Runs to its end.
    assert next(arriving, None) is None
    resident_bytes = kernel.count_bytes(len(wanted), *shape)
    return ExpertWeights(
        config,
        tuple(hosted),
        weights.dtype,
        kernel,
        dict(sorted(layers.items())),
        dict(sorted(digests.items())),
        _join_digests(digests),
        resident_bytes,
    )


def _read_experts(
    checkpoint: Checkpoint,
    plan: Sequence[_Planned],
    device: torch.device,
    on_fraction: Callable[[float], None] | None,
    copies: ExpertCopies | None = None,
) -> Iterator[tuple[Pair, bytes, tuple[ScaledWeight, ScaledWeight, ScaledWeight]]]:
    """Pair, digest and (gate, up, down) of each expert, in the plan's order, valid until the next is asked for."""
    config = checkpoint.config
    block = config.quantization.weight_block_size if config.quantization is not None else (1, 1)
    total_bytes = sum(info.size_bytes for item in plan for info in item.tensors)
    progress = LoadProgress(total_bytes, "expert weights", on_fraction=on_fraction)
    if not plan:
        return
    staging = Staging(device, max(item.offsets[-1] for item in plan))
    ahead: deque[tuple[_Planned, np.ndarray, Future[bytes]]] = deque()
    remaining = iter(plan)
    # One buffer is with the caller.
    with ThreadPoolExecutor(NUM_BUFFERS - 1, thread_name_prefix="read-experts") as readers:
        try:
            while True:
                for item in itertools.islice(remaining, NUM_BUFFERS - 1 - len(ahead)):
                    buffer = staging.take()
                    ahead.append((item, buffer, readers.submit(_read_expert, checkpoint, copies, item, buffer)))
                if not ahead:
                    break
                item, buffer, reading = ahead.popleft()
                digest = reading.result()
                stored = {
                    info.name: decode_tensor(info, buffer[start : start + info.size_bytes])
                    for info, start in zip(item.tensors, item.offsets, strict=False)
                }
                down, gate, up = (
                    ScaledWeight(stored[expected.name], stored.get(expected.scale_name), block)
                    for expected in list_expert_tensors(config, *item.pair)
                )
                yield item.pair, digest, (gate, up, down)
                staging.release()
                for info in item.tensors:
                    progress.advance(info.size_bytes)
        finally:
            for _, _, reading in ahead:
                reading.cancel()
    progress.finish()


def _read_expert(checkpoint: Checkpoint, copies: ExpertCopies | None, item: _Planned, buffer: np.ndarray) -> bytes:
    """Fill the buffer. Returns the expert's digest."""
    places = [buffer[start : start + info.size_bytes] for info, start in zip(item.tensors, item.offsets, strict=False)]
    if copies is None or not copies.read_into(item.pair, item.tensors, places):
        for info, place in zip(item.tensors, places, strict=True):
            checkpoint.read_into(info, place)
    digest = hashlib.sha256()
    for place in places:
        digest.update(place.data)
    return digest.digest()


def _join_digests(digests: Mapping[Pair, bytes]) -> str:
    return hashlib.sha256(b"".join(digest for _, digest in sorted(digests.items()))).hexdigest()


def _is_scale(info: TensorInfo) -> bool:
    return info.name.endswith("_scale_inv")


def _find_stored_dtype(checkpoint: Checkpoint, pair: Pair) -> torch.dtype:
    return next(_STORED_DTYPES[info.dtype] for info in list_stored_tensors(checkpoint, *pair) if not _is_scale(info))


def _plan_experts(checkpoint: Checkpoint, pairs: Iterator[Pair]) -> list[_Planned]:
    return [_Planned(pair, list_stored_tensors(checkpoint, *pair)) for pair in pairs]


def list_stored_tensors(checkpoint: Checkpoint, layer_id: int, expert_id: int) -> tuple[TensorInfo, ...]:
    """An expert's tensors, scales included, sorted by name; checks their headers. Raises CheckpointError."""
    found: list[TensorInfo] = []
    for expected in list_expert_tensors(checkpoint.config, layer_id, expert_id):
        info = checkpoint.check_stored_weight(expected.name, expected.shape)
        found.append(info)
        if info.dtype == "F8_E4M3":
            found.append(checkpoint.info(expected.scale_name))
    return tuple(sorted(found, key=lambda info: info.name))
