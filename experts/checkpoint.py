"""A checkpoint folder as published: config.json and safetensors files, read by byte range.

Headers are parsed here, strictly, and each tensor is fetched by `preadv` into memory of its own. Nothing is
mapped: a file truncated under a mapping kills the process that reads it, a short read is an error like any
other. A shard is opened when its first tensor is asked for, so a process needs only the shards with its tensors.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from experts.errors import CheckpointError, ConfigError
from experts.model_config import ModelConfig, load_json_object

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Bytes per element of every dtype that the safetensors format names and a checkpoint of ours may hold.
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F32", "BF16", "F16")

# The limit of the safetensors library itself.
_MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER_START = b"version https://git-lfs.github.com/spec/"
# Linux reads at most 2 GiB at a time.
_MAX_READ_BYTES = 1 << 30
_DOWNLOAD_AGAIN = "download this file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: file within the folder, offset and size_bytes in it; dtype as safetensors spells it."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class Checkpoint:
    """An open checkpoint folder. Reading is thread-safe.

    Raises ConfigError for config.json and CheckpointError for everything else, here and in each method, with the
    file, the tensor and the remedy in one line.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = ModelConfig.from_folder(self.folder)
        self._shards: dict[str, _Shard] = {}
        self._lock = threading.Lock()
        self._file_of: dict[str, str] = {}
        self._file_of = self._load_file_of()
        self.tensors: Mapping[str, TensorInfo] = _TensorTable(self)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for shard in self._shards.values():
                shard.close()
            self._shards.clear()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the safetensors files, sorted."""
        return tuple(sorted(set(self._file_of.values())))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the index."""
        return tuple(self._file_of)

    def has(self, name: str) -> bool:
        return name in self._file_of

    def placed_file(self, name: str) -> str | None:
        """The file in which the index places a tensor; None for an unknown name. Opens nothing."""
        return self._file_of.get(name)

    def info(self, name: str) -> TensorInfo:
        """Find a tensor in its shard's header; opens the shard if need be."""
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(
                "is in no file of the checkpoint",
                file=self.index_name,
                tensor=name,
                remedy="the checkpoint is incomplete or its config.json belongs to another model",
            )
        info = self._open(file).tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"missing from this file, although {INDEX_FILE} places it here",
                file=file,
                tensor=name,
                remedy=f"download this file and {INDEX_FILE} again",
            )
        return info

    def stored_tensors(self, file: str) -> Mapping[str, TensorInfo]:
        """Every tensor that the file itself lists, whatever the index says."""
        return self._open(file).tensors

    def read_raw(self, name: str) -> np.ndarray:
        """Read the bytes of a tensor as stored. Returns uint8 [size_bytes] in memory of its own."""
        info = self.info(name)
        buffer = np.empty(info.size_bytes, dtype=np.uint8)
        self.read_into(info, buffer)
        return buffer

    def read_into(self, info: TensorInfo, buffer: np.ndarray, start: int = 0) -> None:
        """Fill buffer (uint8, contiguous) with the tensor's bytes from `start` on."""
        self._open(info.file).read_into(buffer, info.offset + start, info.name)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor in the dtype it is stored in; F8_E8M0 scales become float32 powers of two."""
        return decode_tensor(self.info(name), self.read_raw(name))

    def read_weight(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Read a weight in the dtype to compute with; an FP8 one is multiplied by its scales in fp32 first.

        shape: what the config demands. Returns dtype, shape. Raises CheckpointError if the stored shape or dtype is
        another, or an FP8 weight has no scales.
        """
        from experts.quantization import dequantize_block

        info = self.check_stored_weight(name, shape)
        if info.dtype == "F8_E4M3":
            assert self.config.quantization is not None
            weight = dequantize_block(
                self.read(name), self.read(f"{name}_scale_inv"), self.config.quantization.weight_block_size
            )
        else:
            weight = self.read(name)
        return weight.to(dtype)

    def check_stored_weight(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Compare the headers of a weight, and of its scales if it is FP8, with what the config demands.

        Reads no weight. Raises CheckpointError.
        """
        info = self.info(name)
        if info.shape != shape:
            raise CheckpointError(
                f"has shape {list(info.shape)}, config.json demands {list(shape)}",
                file=info.file,
                tensor=name,
                remedy="config.json and weights belong to different models",
            )
        if info.dtype == "F8_E4M3":
            self._check_stored_scale(info)
        elif info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"has dtype {info.dtype}; supported: {', '.join((*FLOAT_DTYPES, 'F8_E4M3'))}",
                file=info.file,
                tensor=name,
                remedy="use the checkpoint as published in FP8 or bf16",
            )
        return info

    def _check_stored_scale(self, weight: TensorInfo) -> None:
        quantization = self.config.quantization
        if quantization is None:
            raise CheckpointError(
                "is FP8, but config.json has no quantization_config",
                file=weight.file,
                tensor=weight.name,
                remedy="take config.json from the published checkpoint",
            )
        if len(weight.shape) != 2:
            raise CheckpointError(
                f"is FP8 with shape {list(weight.shape)}; only matrices can be",
                file=weight.file,
                tensor=weight.name,
                remedy=_DOWNLOAD_AGAIN,
            )
        name = f"{weight.name}_scale_inv"
        if not self.has(name):
            raise CheckpointError(
                f"is in no file of the checkpoint, but {weight.name} in {weight.file} is FP8 and needs its scales",
                file=self.index_name,
                tensor=name,
                remedy="the checkpoint is incomplete: download it again",
            )
        scale = self.info(name)
        rows, columns = quantization.weight_block_size
        wanted = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        if scale.shape != wanted:
            raise CheckpointError(
                f"has shape {list(scale.shape)}, expected {list(wanted)} for a weight {list(weight.shape)} "
                f"in blocks of {rows}x{columns}",
                file=scale.file,
                tensor=name,
                remedy="weight_block_size in config.json and the weights do not belong together",
            )
        if scale.dtype not in (*FLOAT_DTYPES, "F8_E8M0"):
            raise CheckpointError(
                f"has dtype {scale.dtype}; supported for scales: {', '.join((*FLOAT_DTYPES, 'F8_E8M0'))}",
                file=scale.file,
                tensor=name,
                remedy="use the checkpoint as published",
            )

    @property
    def index_name(self) -> str:
        """The file that says which tensors there are."""
        return INDEX_FILE if (self.folder / INDEX_FILE).exists() else SINGLE_FILE

    def _load_file_of(self) -> dict[str, str]:
        """Map tensor names to file names, from the index or from the one file there is."""
        if (self.folder / INDEX_FILE).exists():
            return self._load_index()
        if (self.folder / SINGLE_FILE).exists():
            return dict.fromkeys(self._open(SINGLE_FILE).tensors, SINGLE_FILE)
        raise CheckpointError(
            f"neither {INDEX_FILE} nor {SINGLE_FILE} is in {self.folder}",
            remedy="give the folder of a Hugging Face checkpoint with safetensors weights",
        )

    def _load_index(self) -> dict[str, str]:
        try:
            weight_map = load_json_object(self.folder / INDEX_FILE).get("weight_map")
        except ConfigError as error:
            raise CheckpointError(str(error), remedy=f"{INDEX_FILE} is needed to find the tensors") from error
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                "weight_map is missing, empty or no object", file=INDEX_FILE, remedy="download this file again"
            )
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"is placed in {json.dumps(file)[:80]}, which is no name of a safetensors file",
                    file=INDEX_FILE,
                    tensor=name,
                    remedy=_DOWNLOAD_AGAIN,
                )
        return weight_map

    def _open(self, file: str) -> _Shard:
        with self._lock:
            shard = self._shards.get(file)
            if shard is None:
                try:
                    shard = _Shard(self.folder / file)
                except CheckpointError as error:
                    raise self._say_what_is_lost(error, file) from error
                self._shards[file] = shard
            return shard

    def _say_what_is_lost(self, error: CheckpointError, file: str) -> CheckpointError:
        """The same error with a tensor that cannot be read for it: a file's name alone tells a user little."""
        lost = [name for name, place in self._file_of.items() if place == file]
        if error.tensor is not None or not lost:
            return error
        others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return CheckpointError(
            f"{error.reason}; {lost[0]}{others} should be in it", file=error.file, remedy=error.remedy
        )


class _TensorTable(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint by name; a shard's header is read when one of its tensors is looked up."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> TensorInfo:
        if not self._checkpoint.has(name):
            raise KeyError(name)
        return self._checkpoint.info(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.names)

    def __len__(self) -> int:
        return len(self._checkpoint.names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._checkpoint.has(name)


class _Shard:
    """One open safetensors file and its parsed header."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"missing from {path.parent}", file=path.name, remedy="download the missing file"
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"cannot be opened: {error.strerror}", file=path.name, remedy="check its permissions"
            ) from error
        try:
            self.tensors = self._load_header()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        os.close(self._fd)

    def read_into(self, buffer: np.ndarray, offset: int, tensor: str | None) -> None:
        """Fill buffer (uint8) from the file; a short file is an error."""
        target = buffer.data
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._fd, [target[done : done + _MAX_READ_BYTES]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"cannot be read: {error.strerror}", file=self._name, tensor=tensor, remedy="check the disk"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"file ends at byte {offset + done}, {len(target) - done} bytes early",
                    file=self._name,
                    tensor=tensor,
                    remedy=_DOWNLOAD_AGAIN,
                )
            done += count

    def _load_header(self) -> dict[str, TensorInfo]:
        size_bytes = os.fstat(self._fd).st_size
        start = np.empty(min(size_bytes, 64), dtype=np.uint8)
        self.read_into(start, 0, None)
        if start.tobytes().startswith(_LFS_POINTER_START):
            raise CheckpointError(
                "is a Git LFS pointer, not the file itself",
                file=self._name,
                remedy="run `git lfs pull` in the folder",
            )
        header_bytes = int.from_bytes(start[:8].tobytes(), "little") if size_bytes >= 8 else 0
        if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            raise self._damaged(f"is no safetensors file: its header would have {header_bytes} bytes")
        if 8 + header_bytes > size_bytes:
            raise self._damaged(f"is truncated: {size_bytes} bytes, its header alone takes {8 + header_bytes}")
        text = np.empty(header_bytes, dtype=np.uint8)
        self.read_into(text, 8, None)
        try:
            header = json.loads(text.tobytes().decode("utf-8"), object_pairs_hook=_object_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"has a header that is no valid JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._damaged("has a header that is no JSON object")
        header.pop("__metadata__", None)
        tensors = {name: self._parse_entry(name, entry, 8 + header_bytes) for name, entry in header.items()}
        self._check_layout(tensors, 8 + header_bytes, size_bytes)
        return tensors

    def _parse_entry(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        if not isinstance(entry, dict):
            raise self._damaged("has a header entry that is no object", name)
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise self._damaged(f"has dtype {json.dumps(dtype)[:40]}; known: {', '.join(DTYPE_BYTES)}", name)
        if not _is_list_of_counts(shape):
            raise self._damaged(f"has shape {json.dumps(shape)[:80]}; expected a list of sizes", name)
        if not _is_list_of_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._damaged(f"has data_offsets {json.dumps(offsets)[:80]}; expected [begin, end]", name)
        size_bytes = offsets[1] - offsets[0]
        if size_bytes != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise self._damaged(f"takes {size_bytes} bytes, which is not {shape} of {dtype}", name)
        return TensorInfo(name, self._name, dtype, tuple(shape), data_start + offsets[0], size_bytes)

    def _check_layout(self, tensors: Mapping[str, TensorInfo], data_start: int, size_bytes: int) -> None:
        """Tensors must follow each other without gap or overlap and end where the file ends."""
        position = data_start
        for info in sorted(tensors.values(), key=lambda info: (info.offset, info.size_bytes)):
            if info.offset != position:
                raise self._damaged(f"begins at byte {info.offset}, expected {position}", info.name)
            position += info.size_bytes
            if position > size_bytes:
                raise self._damaged(
                    f"is truncated: the file has {size_bytes} bytes, this tensor ends at byte {position}", info.name
                )
        if position != size_bytes:
            raise self._damaged(f"has {size_bytes} bytes, its header accounts for {position}")

    def _damaged(self, reason: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(reason, file=self._name, tensor=tensor, remedy=_DOWNLOAD_AGAIN)


def decode_tensor(info: TensorInfo, raw: np.ndarray) -> torch.Tensor:
    """View stored bytes (uint8 [size_bytes]) as the tensor they are, sharing memory; F8_E8M0 becomes float32."""
    import torch

    if info.dtype == "F8_E8M0":
        # Value 2^(e - 127); 255 is NaN. The float32 exponent field is the same, but 0 is subnormal there.
        exponent = raw.astype(np.int32)
        bits = np.where(exponent == 0, 0x00400000, exponent << 23)
        bits = np.where(exponent == 255, 0x7FC00000, bits).astype(np.int32)
        return torch.from_numpy(bits).view(torch.float32).reshape(info.shape)
    torch_dtypes = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool,
    }  # fmt: skip
    return torch.from_numpy(raw).view(torch_dtypes[info.dtype]).reshape(info.shape)


def _is_list_of_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result
