"""The CPU kernel from Python: weights packed at load, and calls that release the interpreter.

Weights stay as the checkpoint has them (FP8 with block scales, bf16 or fp32), reordered into one memory order that
every instruction family reads (cpu/matrix.h). A row's result depends on that row and the weights alone: not on the
other rows of the call, the number of threads or the split of work. It does depend on the instruction family, which is
chosen once per process and published in numerics_id.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import torch

from experts.kernels.cpu_build import CompilerMissing, find_or_build_library

logger = logging.getLogger(__name__)

Family = Literal["amx", "avx512_bf16", "avx2", "portable"]
# Best first; the position is the library's number for it.
FAMILIES: Final[tuple[Family, ...]] = ("amx", "avx512_bf16", "avx2", "portable")

# Counts changes of arithmetic: two versions may differ in the last bits.
ARITHMETIC_VERSION = 4

# Rows of a packed panel and inputs of a packed block (cpu/matrix.h).
PANEL_ROWS = 32
HALF_PANEL_ROWS = 16
BLOCK_COLUMNS = 128

_KINDS: Final = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float32: 2}
_DTYPES: Final = {torch.bfloat16: 0, torch.float32: 1}
_HUGE_PAGE_BYTES = 2 << 20
_STATUS: Final = {
    1: "an expert is not in this layer",
    2: "a pair's row is out of range",
    3: "unsupported",
    4: "out of memory",
}


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("paired", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("cells", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("uncovered", ctypes.c_void_p),
    )


class _PackSource(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p * 2),
        ("scales", ctypes.c_void_p * 2),
        ("block_rows", ctypes.c_int32),
        ("block_columns", ctypes.c_int32),
    )


class ScaledWeight(NamedTuple):
    """A weight as a checkpoint has it: [rows, columns] FP8 with its block scales, or bf16 or fp32 without."""

    weight: torch.Tensor
    scale_inv: torch.Tensor | None = None
    block: tuple[int, int] = (128, 128)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class PackedMatrix:
    """A weight in the kernel's memory order. rows: outputs; of gate alone if gate and up are paired."""

    rows: int
    columns: int
    paired: bool
    dtype: torch.dtype
    memory: torch.Tensor
    cell_bytes: int
    num_cells: int

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def describe(self) -> _Matrix:
        """The C view of it, valid while this object lives."""
        cells = self.memory.data_ptr()
        scales = cells + self.cell_bytes * self.num_cells
        quantized = self.dtype == torch.float8_e4m3fn
        return _Matrix(
            _KINDS[self.dtype],
            self.paired,
            self.rows,
            self.columns,
            cells,
            scales if quantized else None,
            scales + 8 * self.num_cells if quantized else None,
        )


def describe_matrices(matrices: Sequence[PackedMatrix]) -> ctypes.Array[_Matrix]:
    """The C views of several, side by side, valid while the matrices live."""
    return (_Matrix * len(matrices))(*(matrix.describe() for matrix in matrices))


class PackedExpert(NamedTuple):
    """gate_up: paired, [2 * inner, hidden]; down: [hidden, inner]."""

    gate_up: PackedMatrix
    down: PackedMatrix

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes


class PackedLayer(Mapping[int, PackedExpert]):
    """The hosted experts of one layer, by expert id, all of one shape and dtype; ready to be computed with."""

    def __init__(self, experts: Mapping[int, PackedExpert]) -> None:
        """Raises ValueError if the experts differ in shape or dtype, or there is none."""
        shapes = {(matrix.rows, matrix.columns, matrix.dtype, matrix.paired) for e in experts.values() for matrix in e}
        if len(shapes) != 2:
            raise ValueError(f"the experts of a layer have one shape and dtype, got {shapes}")
        self._experts = dict(sorted(experts.items()))
        self.hidden_size = next(iter(self._experts.values())).down.rows
        self.gate_up = describe_matrices([expert.gate_up for expert in self._experts.values()])
        self.down = describe_matrices([expert.down for expert in self._experts.values()])
        self.slots = np.full(max(self._experts) + 1, -1, dtype=np.int32)
        self.slots[list(self._experts)] = np.arange(len(self._experts), dtype=np.int32)
        self.slots_address: int = self.slots.ctypes.data

    def __getitem__(self, expert_id: int) -> PackedExpert:
        return self._experts[expert_id]

    def __iter__(self):
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)


class _Pairs(NamedTuple):
    """Pairs of a call as the library takes them. addresses: of rows, experts and weights, valid while this lives."""

    count: int
    addresses: tuple[int, int, int]
    kept_alive: object


class WeightArena:
    """One anonymous mapping that packed matrices are cut from, in 2 MB pages where the kernel gives them.

    With 4 KB pages the products of one row take a third longer (tests/benchmarks/expert_kernel.py --small-pages).
    Memory is committed when it is written, so an arena that is too large costs nothing.
    """

    ALIGNMENT = 4096

    def __init__(self, size_bytes: int, *, huge_pages: bool = True) -> None:
        self._mapping = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
            except OSError as error:
                logger.info("no 2 MB pages for weights: %s", error)
        memory = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._base: int = memory.data_ptr()
        start = -memory.data_ptr() % _HUGE_PAGE_BYTES
        self._memory = memory[start : start + size_bytes]
        self._used = 0

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Return uint8 [size_bytes], aligned to a page. Raises MemoryError when the arena is full."""
        end = self._used + size_bytes
        if end > len(self._memory):
            raise MemoryError(f"the arena holds {len(self._memory)} bytes, {self._used} used, {size_bytes} asked")
        part = self._memory[self._used : end]
        self._used = -(-end // self.ALIGNMENT) * self.ALIGNMENT
        return part

    def discard_with(self, matrix: PackedMatrix) -> None:
        """Give a matrix's pages back to the system once nobody has it any more; the arena does not use them again."""
        start = matrix.memory.data_ptr() - self._base
        end = start + -(-matrix.nbytes // self.ALIGNMENT) * self.ALIGNMENT
        weakref.finalize(matrix, _discard, self._mapping, start, end).atexit = False

    @property
    def used_bytes(self) -> int:
        return self._used

    @property
    def allocated(self) -> torch.Tensor:
        """All that was allocated so far, uint8 [used_bytes]."""
        return self._memory[: self._used]


def _discard(mapping: mmap.mmap, start: int, end: int) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, start, end - start)


def packed_size(shape: tuple[int, int], dtype: torch.dtype, *, paired: bool = False) -> int:
    """Bytes that a weight of this shape takes in an arena, alignment included; shape: of gate alone if paired."""
    num_cells, cell_bytes = _count_cells(shape, dtype, paired)
    size = num_cells * (cell_bytes + (16 if dtype == torch.float8_e4m3fn else 0))
    return -(-size // WeightArena.ALIGNMENT) * WeightArena.ALIGNMENT


def can_pack(dtype: torch.dtype, block: tuple[int, int]) -> bool:
    """Whether the kernel takes weights of this dtype and, for FP8, this block of scales."""
    if dtype == torch.float8_e4m3fn:
        return block[0] % HALF_PANEL_ROWS == 0 and block[1] % BLOCK_COLUMNS == 0
    return dtype in _KINDS


class CpuKernel:
    """Products with packed weights in one instruction family and one arithmetic. Calls of several threads take turns.

    dtype bfloat16: what comes in is rounded to bf16, products are accumulated in fp32 and inner activations kept to 16
    bits (cpu/engine.h); fp32 weights: all in fp32.
    dtype float32: everything in fp32, FP8 and bf16 weights being exact in it.
    """

    def __init__(self, library: ctypes.CDLL, family: Family, dtype: torch.dtype) -> None:
        self._library = library
        self.family_number: Final = FAMILIES.index(family)
        self.arithmetic_number: Final = _DTYPES[dtype]
        self.family: Final = family
        self.dtype: Final = dtype

    @property
    def numerics_id(self) -> str:
        """What decides the last bits of a result; the weights' dtype is the checkpoint's."""
        return (
            f"cpu-{self.family}/{str(self.dtype).removeprefix('torch.')}/blocks-{BLOCK_COLUMNS}/v{ARITHMETIC_VERSION}"
        )

    @property
    def num_threads(self) -> int:
        return self._library.shoal_threads()

    def set_num_threads_(self, count: int) -> None:
        """Set the threads of this process's one pool, the calling one included. Never changes a result."""
        if not 1 <= count <= 1024:
            raise ValueError(f"threads: expected 1 to 1024, got {count}")
        if count != self.num_threads:
            self._library.shoal_set_threads(count)

    def pack_linear(self, weight: ScaledWeight, arena: WeightArena | None = None) -> PackedMatrix:
        """Pack [rows, columns] for linear. arena: None makes one of the right size. Raises ValueError, see can_pack."""
        return self._pack((weight,), arena, paired=False)

    def pack_side_by_side(self, weights: Sequence[ScaledWeight]) -> list[PackedMatrix]:
        """Pack many small matrices into one arena: each alone would take whole 2 MB pages."""
        sizes = (packed_size((w.weight.shape[0], w.weight.shape[1]), w.weight.dtype) for w in weights)
        arena = WeightArena(sum(sizes))
        return [self.pack_linear(weight, arena) for weight in weights]

    def pack_expert(
        self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight, arena: WeightArena | None = None
    ) -> PackedExpert:
        """Pack one expert, shared expert or dense MLP: gate and up [inner, hidden], down [hidden, inner]."""
        return PackedExpert(self._pack((gate, up), arena, paired=True), self._pack((down,), arena, paired=False))

    def expert_ffn(
        self,
        hidden_states: torch.Tensor,
        pair_rows: np.ndarray,
        pair_experts: np.ndarray,
        pair_weights: np.ndarray,
        layer: PackedLayer,
        *,
        exact: bool,
    ) -> torch.Tensor:
        """Compute down(silu(gate(x)) * up(x)) for every (row, expert) pair and weight it in fp32.

        hidden_states: [num_rows, hidden] bf16 or fp32, rows contiguous. pair_rows, pair_experts: int32 [num_pairs],
        sorted by row, then expert. pair_weights: float32 [num_pairs].
        Returns float32: [num_pairs, hidden] in pair order if exact, else each row's sum in ascending expert order
        [num_rows, hidden]. Raises ValueError for arguments that do not fit.
        """
        return self._expert_ffn(hidden_states, _make_pairs(pair_rows, pair_experts, pair_weights), layer, exact)

    def mlp(self, hidden_states: torch.Tensor, layer: PackedLayer) -> torch.Tensor:
        """expert_ffn with the layer's expert 0 for every row, weighted with 1. Returns float32 [num_rows, hidden]."""
        return self._expert_ffn(hidden_states, _make_dense_pairs(hidden_states.shape[0]), layer, False)

    def _expert_ffn(self, hidden_states: torch.Tensor, pairs: _Pairs, layer: PackedLayer, exact: bool) -> torch.Tensor:
        num_rows, hidden_size = hidden_states.shape
        if hidden_size != layer.hidden_size:
            raise ValueError(f"hidden size: expected {layer.hidden_size}, got {hidden_size}")
        hidden_states = hidden_states.contiguous()
        result = torch.empty(pairs.count if exact else num_rows, hidden_size, dtype=torch.float32)
        if not result.numel():
            return result
        self._check(
            self._library.shoal_expert_ffn(
                self.family_number,
                self.arithmetic_number,
                layer.gate_up,
                layer.down,
                layer.slots_address,
                len(layer.slots),
                len(layer),
                hidden_states.data_ptr(),
                _DTYPES[hidden_states.dtype],
                num_rows,
                *pairs.addresses,
                pairs.count,
                exact,
                result.data_ptr(),
            )
        )
        return result

    def linear(self, x: torch.Tensor, matrix: PackedMatrix, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """x [..., columns] @ matrix^T -> [..., rows] in out_dtype (None: x's), rounded once from fp32.

        x: bf16 or fp32. Raises ValueError for shapes that do not fit.
        """
        if x.shape[-1] != matrix.columns or matrix.paired:
            raise ValueError(f"linear: x {tuple(x.shape)} does not fit a matrix of {matrix.columns} columns")
        flat = x.reshape(-1, matrix.columns)
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        result = torch.empty(flat.shape[0], matrix.rows, dtype=out_dtype or x.dtype)
        if result.numel():
            self._check(
                self._library.shoal_linear(
                    self.family_number,
                    self.arithmetic_number,
                    ctypes.byref(matrix.describe()),
                    flat.data_ptr(),
                    _DTYPES[flat.dtype],
                    flat.stride(0),
                    flat.shape[0],
                    result.data_ptr(),
                    _DTYPES[result.dtype],
                    result.stride(0),
                )
            )
        return result.view(*x.shape[:-1], matrix.rows)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [num_rows, d] contiguous, bf16 or fp32; weight: [d] float32. Returns x's dtype."""
        result = torch.empty_like(x)
        self._check(
            self._library.shoal_rms_norm(
                self.family_number,
                x.data_ptr(),
                _DTYPES[x.dtype],
                x.shape[0],
                x.shape[1],
                weight.data_ptr(),
                eps,
                result.data_ptr(),
            )
        )
        return result

    def join(
        self,
        matrix: PackedMatrix,
        table: torch.Tensor,
        ids: torch.Tensor,
        x: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        eps: float,
    ) -> torch.Tensor:
        """linear(cat([rms_norm(table[ids]), rms_norm(x)], dim=-1)), in one call.

        x: [num_rows, d], table: [num, d], both contiguous and of the kernel's dtype; ids: [num_rows] int64, contiguous,
        of rows that the table has. weights: of the norms, [d] float32. Raises ValueError for what does not fit.
        """
        if matrix.columns != 2 * x.shape[1] or x.shape[1] != table.shape[1] or not x.dtype == table.dtype == self.dtype:
            raise ValueError(f"join: x {tuple(x.shape)} does not fit a matrix of {matrix.columns} columns")
        result = torch.empty(x.shape[0], matrix.rows, dtype=x.dtype)
        self._check(
            self._library.shoal_join(
                self.family_number,
                self.arithmetic_number,
                ctypes.byref(matrix.describe()),
                table.data_ptr(),
                ids.data_ptr(),
                x.data_ptr(),
                x.shape[0],
                weights[0].data_ptr(),
                weights[1].data_ptr(),
                eps,
                result.data_ptr(),
            )
        )
        return result

    def add_(self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None) -> None:
        """x += first + second, summed in fp32 and rounded once. All contiguous; first and second: float32."""
        self._check(
            self._library.shoal_add(
                self.family_number,
                x.data_ptr(),
                _DTYPES[x.dtype],
                first.data_ptr(),
                None if second is None else second.data_ptr(),
                x.numel(),
            )
        )

    def attend(self, layer: int, step: int) -> None:
        """Addresses of a layer and a step (cpu_layer.py)."""
        self._check(self._library.shoal_attend(layer, step))

    def _pack(self, parts: Sequence[ScaledWeight], arena: WeightArena | None, *, paired: bool) -> PackedMatrix:
        shape, dtype = tuple(parts[0].weight.shape), parts[0].weight.dtype
        if any(tuple(part.weight.shape) != shape or part.weight.dtype != dtype for part in parts):
            raise ValueError(f"gate and up differ: {[(part.weight.shape, part.weight.dtype) for part in parts]}")
        if not can_pack(dtype, parts[0].block):
            raise ValueError(f"the CPU kernel has no weights of {dtype} with blocks of {parts[0].block}")
        rows, columns = shape
        if arena is None:
            arena = WeightArena(packed_size((rows, columns), dtype, paired=paired))
        num_cells, cell_bytes = _count_cells((rows, columns), dtype, paired)
        quantized = dtype == torch.float8_e4m3fn
        memory = arena.allocate(num_cells * (cell_bytes + (16 if quantized else 0)))
        matrix = PackedMatrix(rows, columns, paired, dtype, memory, cell_bytes, num_cells)
        weights = [part.weight.contiguous() for part in parts]
        scales: list[torch.Tensor] = []
        block_rows, block_columns = parts[0].block
        if quantized:
            expected = (-(-rows // block_rows), -(-columns // block_columns))
            for part in parts:
                found = None if part.scale_inv is None else tuple(part.scale_inv.shape)
                if part.scale_inv is None or found != expected:
                    raise ValueError(f"scales: expected {expected}, got {found}")
                scales.append(part.scale_inv.to(torch.float32).contiguous())
        source = _PackSource(
            (ctypes.c_void_p * 2)(*(weight.data_ptr() for weight in weights)),
            (ctypes.c_void_p * 2)(*(scale.data_ptr() for scale in scales)),
            block_rows,
            block_columns,
        )
        self._library.shoal_pack(ctypes.byref(matrix.describe()), ctypes.byref(source))
        return matrix

    def _check(self, status: int) -> None:
        if status != 0:
            raise ValueError(f"CPU kernel ({self.family}): {_STATUS[status]}")


def load_cpu_kernel(dtype: torch.dtype, *, family: Family | None = None) -> CpuKernel | None:
    """Return the kernel in the best instruction family of this CPU, or in the one named.

    Returns None, said once in the log, where there is neither a library nor a compiler: the caller then computes with
    torch. Raises ValueError if this CPU lacks the family named.
    """
    library = load_library()
    if library is None:
        return None
    supported: list[Family] = [name for number, name in enumerate(FAMILIES) if library.shoal_is_supported(number)]
    if family is not None and family not in supported:
        raise ValueError(f"instruction family {family}: this CPU has {', '.join(supported)}")
    chosen: Family = family or supported[0]
    return CpuKernel(library, chosen, dtype)


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The shared library; None, said once in the log, where there is neither one nor a compiler."""
    try:
        return _declare(ctypes.CDLL(str(find_or_build_library())))
    except (CompilerMissing, OSError) as error:
        logger.warning("no CPU kernel, torch computes with weights expanded to bf16 instead: %s", error)
        return None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    integer, address = ctypes.c_int32, ctypes.c_void_p
    library.shoal_is_supported.argtypes = (integer,)
    library.shoal_set_threads.argtypes = (integer,)
    library.shoal_set_threads.restype = None
    library.shoal_threads.argtypes = ()
    library.shoal_pack.argtypes = (address, address)
    library.shoal_pack.restype = None
    library.shoal_expert_ffn.argtypes = (
        *(integer, integer, address, address, address, integer, integer, address, integer, integer),
        *(address, address, address, integer, integer, address),
    )
    library.shoal_linear.argtypes = (
        *(integer, integer, address, address, integer, ctypes.c_int64),
        *(integer, address, integer, ctypes.c_int64),
    )
    library.shoal_rms_norm.argtypes = (
        *(integer, address, integer, integer, integer, address, ctypes.c_float, address),
    )
    library.shoal_join.argtypes = (
        *(integer, integer, address, address, address, address, integer, address, address, ctypes.c_float, address),
    )
    library.shoal_add.argtypes = (integer, address, integer, address, address, ctypes.c_int64)
    library.shoal_attend.argtypes = (address, address)
    library.shoal_add_rows.argtypes = (
        *(integer, integer, address, address, address, ctypes.c_int64, ctypes.c_int64, address),
    )
    library.shoal_add_rows.restype = None
    library.shoal_sample.argtypes = (address, ctypes.c_int64, integer, integer, address, address)
    for name in ("shoal_link_new", "shoal_server_new", "shoal_scatter_new"):
        getattr(library, name).restype = address
    for name in (
        *("shoal_link_free", "shoal_link_open", "shoal_link_close", "shoal_server_free", "shoal_server_enable"),
        *("shoal_server_use", "shoal_serve", "shoal_scatter_free", "shoal_scatter_look", "shoal_scatter_times"),
        "shoal_scatter_take_traffic",
    ):
        getattr(library, name).restype = None
    library.shoal_link_new.argtypes = library.shoal_scatter_new.argtypes = ()
    library.shoal_link_free.argtypes = library.shoal_server_free.argtypes = (address,)
    library.shoal_scatter_free.argtypes = library.shoal_server_new.argtypes = (address,)
    library.shoal_link_open.argtypes = (address, integer, address)
    library.shoal_link_close.argtypes = (address, address, address, address)
    library.shoal_server_enable.argtypes = (address, integer)
    library.shoal_server_use.argtypes = (address, address)
    library.shoal_serve.argtypes = (address, integer, address, integer)
    library.shoal_take_load.argtypes = (address, address, integer, address)
    library.shoal_scatter.argtypes = (address, address)
    library.shoal_gather.argtypes = (address, integer, address)
    library.shoal_scatter_take_traffic.argtypes = (address, integer, address)
    library.shoal_scatter_look.argtypes = library.shoal_scatter_times.argtypes = (address, integer, address, address)
    return library


def _count_cells(shape: tuple[int, int], dtype: torch.dtype, paired: bool) -> tuple[int, int]:
    """Number of cells, and bytes of one."""
    rows_per_panel = HALF_PANEL_ROWS if paired else PANEL_ROWS
    return -(-shape[0] // rows_per_panel) * -(-shape[1] // BLOCK_COLUMNS), PANEL_ROWS * BLOCK_COLUMNS << _KINDS[dtype]


def _make_pairs(pair_rows: np.ndarray, pair_experts: np.ndarray, pair_weights: np.ndarray) -> _Pairs:
    """Raises ValueError if their lengths differ."""
    rows, experts = _as_vector(pair_rows, np.int32), _as_vector(pair_experts, np.int32)
    weights = _as_vector(pair_weights, np.float32)
    if not len(rows) == len(experts) == len(weights):
        raise ValueError(f"pairs: {len(rows)} rows, {len(experts)} experts, {len(weights)} weights")
    addresses = (rows.ctypes.data, experts.ctypes.data, weights.ctypes.data)
    return _Pairs(len(rows), addresses, (rows, experts, weights))


@functools.lru_cache(maxsize=128)
def _make_dense_pairs(num_rows: int) -> _Pairs:
    """Every row with expert 0 and weight 1. Kept for the sizes in use: each layer of each step asks for them."""
    return _make_pairs(
        np.arange(num_rows, dtype=np.int32), np.zeros(num_rows, dtype=np.int32), np.ones(num_rows, dtype=np.float32)
    )


def _as_vector(values: np.ndarray, dtype: type) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=dtype)
