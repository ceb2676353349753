"""The routed experts of one group, loaded from the checkpoint by byte range and packed for a kernel."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from experts.checkpoint import Checkpoint, TensorInfo, decode_tensor
from experts.device import CPU, check_device_memory
from experts.expert_range import ExpertRange, list_hosted_pairs
from experts.kernels.cpu_ffn import ScaledWeight
from experts.kernels.expert_kernel import ExpertKernel, choose_expert_kernel
from experts.load_progress import LoadProgress
from experts.model_config import ModelConfig
from experts.staging import Staging, compute_offsets
from experts.tensor_names import list_expert_tensors

logger = logging.getLogger(__name__)

_STORED_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """layers: layer id -> expert id -> packed expert, in kernel's own form. digest: see load_expert_weights."""

    config: ModelConfig
    hosted: tuple[ExpertRange, ...]
    dtype: torch.dtype
    kernel: ExpertKernel
    layers: Mapping[int, Mapping[int, Any]]
    digest: str
    stored_bytes: int
    resident_bytes: int


def load_expert_weights(
    checkpoint: Checkpoint,
    hosted: Sequence[ExpertRange],
    dtype: torch.dtype,
    *,
    device: torch.device = CPU,
    kernel: ExpertKernel | None = None,
    on_fraction: Callable[[float], None] | None = None,
) -> ExpertWeights:
    """Load every hosted expert, reading each byte once, expert by expert, and packing it where it will be used.

    All headers are checked before the first weight is read. dtype: to compute in. device: where; host memory then
    holds two experts at most. kernel: None chooses the device's best; one that is given knows its own device.
    The digest is the SHA-256 (hex) of all bytes as stored, in (layer, expert, tensor name) order, so two replicas
    have the same digest exactly if they hold the same experts of the same checkpoint. on_fraction: see LoadProgress.
    Raises ConfigError for a range outside the model, CheckpointError for what is wrong with the files and
    NotEnoughMemory, all of them before the first weight is read where they can be.
    """
    ranges = tuple(hosted)
    plan = [
        (layer_id, expert_id, _plan_expert(checkpoint, layer_id, expert_id))
        for layer_id, expert_id in list_hosted_pairs(checkpoint.config, ranges)
    ]
    stored_bytes = sum(info.size_bytes for _, _, tensors in plan for info in tensors)
    config = checkpoint.config
    weight_dtypes = {_STORED_DTYPES[info.dtype] for _, _, tensors in plan for info in tensors if not _is_scale(info)}
    block = config.quantization.weight_block_size if config.quantization is not None else (1, 1)
    if kernel is None:
        kernel = choose_expert_kernel(dtype, weight_dtypes, block, device)
    shape = (len(plan), config.hidden_size, config.moe_intermediate_size, next(iter(weight_dtypes)))
    resident_bytes = kernel.count_bytes(*shape)
    working_bytes = kernel.count_working_bytes(config.hidden_size, config.moe_intermediate_size)
    check_device_memory(
        kernel.device,
        resident_bytes + working_bytes,
        f"{len(plan)} experts",
        "serve them with more expert groups, or in bfloat16",
    )
    progress = LoadProgress(stored_bytes, "expert weights", on_fraction=on_fraction)
    digest = hashlib.sha256()
    room = kernel.reserve(*shape)
    staging = Staging(
        kernel.device, max(compute_offsets([info.size_bytes for info in tensors])[-1] for _, _, tensors in plan)
    )
    layers: dict[int, dict[int, Any]] = {}
    for layer_id, expert_id, tensors in plan:
        stored: dict[str, torch.Tensor] = {}
        buffer = staging.take()
        for info, start in zip(tensors, compute_offsets([info.size_bytes for info in tensors]), strict=False):
            raw = buffer[start : start + info.size_bytes]
            checkpoint.read_into(info, raw)
            digest.update(raw.data)
            stored[info.name] = decode_tensor(info, raw)
            progress.advance(info.size_bytes)
        down, gate, up = (
            ScaledWeight(stored[expected.name], stored.get(expected.scale_name), block)
            for expected in list_expert_tensors(config, layer_id, expert_id)
        )
        layers.setdefault(layer_id, {})[expert_id] = kernel.pack_expert(gate, up, down, room)
        staging.release()
    progress.finish()
    built = {layer_id: kernel.build_layer(experts) for layer_id, experts in layers.items()}
    return ExpertWeights(config, ranges, dtype, kernel, built, digest.hexdigest(), stored_bytes, resident_bytes)


def _is_scale(info: TensorInfo) -> bool:
    return info.name.endswith("_scale_inv")


def _plan_expert(checkpoint: Checkpoint, layer_id: int, expert_id: int) -> tuple[TensorInfo, ...]:
    """Find an expert's tensors, scales included, sorted by name; checks their headers."""
    found: list[TensorInfo] = []
    for expected in list_expert_tensors(checkpoint.config, layer_id, expert_id):
        info = checkpoint.check_stored_weight(expected.name, expected.shape)
        found.append(info)
        if info.dtype == "F8_E4M3":
            found.append(checkpoint.info(expected.scale_name))
    return tuple(sorted(found, key=lambda info: info.name))
