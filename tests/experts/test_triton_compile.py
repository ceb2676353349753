"""Every Triton kernel compiled, ptxas included, for each supported compute capability; needs no GPU.

Also reads from the generated code what tile_table.py promises: one family of matrix instruction for all tiles of a
card, shared memory that the card has, nothing spilled from registers, weights copied 16 bytes at a time.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from experts.kernels.tile_table import FIRST_FP8_CAPABILITY, KernelChoice, Tile, TileLine, WeightPath, choose_kernels

triton = pytest.importorskip("triton", reason="triton has no build for this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from experts.kernels.triton_gemm import down_kernel, gate_up_kernel, linear_kernel  # noqa: E402
from experts.kernels.triton_rows import combine_pairs_kernel, quantize_rows_kernel  # noqa: E402

# Most shared memory of one block, bytes (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_BYTES = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024, (12, 0): 99 * 1024}
# What changes from launch to launch is compiled without assuming that 16 divides it.
NOT_SPECIALISED = {"num_rows", "first_row"}
FP8_POINTER, BYTE_POINTER, HALF_POINTER = "*fp8e4nv", "*u8", "*fp16"


class Compiled(NamedTuple):
    """shared_bytes per block; instructions: matrix instructions with their operand types, without their shape's N."""

    shared_bytes: int
    spilled_bytes: int
    instructions: frozenset[str]
    wide_copies: int


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile here and now: a result cached by another run would test nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


def compile_kernel(kernel, types: dict[str, str], constants: dict, capability: tuple[int, int], tile: Tile) -> Compiled:
    """types: by argument name, where not float32 (names ending in scale_ptr), int32 pointers or int32."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        default = "*fp32" if name.endswith("scale_ptr") else "*i32" if name.endswith("_ptr") else "i32"
        signature[name] = types.get(name, default)
        if name not in NOT_SPECIALISED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, places, attributes),
        target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )
    ptx = compiled.asm["ptx"]
    found = re.findall(r"(wgmma\.mma_async|mma)\.sync\.aligned\.(m\d+)n\d+(k\d+)\S*?(e4m3|f16)", ptx)
    return Compiled(
        compiled.metadata.shared,
        read_stack_bytes(compiled.asm["cubin"], capability),
        frozenset(".".join(parts) for parts in found),
        len(re.findall(r"cp\.async\.cg\.shared\.global [^\n]*, 0x10,", ptx)),
    )


def read_stack_bytes(cubin: bytes, capability: tuple[int, int]) -> int:
    """Bytes of a kernel's stack, where spilled registers go, as cuobjdump of the triton wheel reads them."""
    path = Path(triton.knobs.nvidia.cuobjdump.path)
    file = Path(triton.knobs.cache.dir) / f"kernel{capability[0]}{capability[1]}.cubin"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(cubin)
    report = subprocess.run([path, "-res-usage", file], capture_output=True, text=True, timeout=60, check=True).stdout
    return max(int(stack) for stack in re.findall(r"STACK:(\d+)", report))


def operand_types(path: WeightPath) -> dict[str, str]:
    if path is WeightPath.W8A8:
        return {"x_ptr": FP8_POINTER, "weight_ptr": FP8_POINTER}
    return {"x_ptr": HALF_POINTER, "weight_ptr": BYTE_POINTER}


def gemm_constants(path: WeightPath, tile: Tile) -> dict:
    return {
        "BY_BITS": path is WeightPath.W8A16,
        "GROUP_N": 128,
        "BLOCK_M": tile.block_rows,
        "BLOCK_N": tile.block_outputs,
        "BLOCK_K": 128,
    }


def compile_ffn(choice: KernelChoice, line: TileLine) -> list[Compiled]:
    types = {**operand_types(choice.path), "out_ptr": "*fp32", "pair_weight_ptr": "*fp32"}
    return [
        compile_kernel(kernel, types, gemm_constants(choice.path, tile), choice.capability, tile)
        for kernel, tile in ((gate_up_kernel, line.gate_up), (down_kernel, line.down))
    ]


def compile_linear(choice: KernelChoice, tile: Tile, *, transposed: bool) -> Compiled:
    constants = {"TRANSPOSED": transposed, "STARTS_INSIDE": False, **gemm_constants(choice.path, tile)}
    types = {**operand_types(choice.path), "out_ptr": "*bf16"}
    return compile_kernel(linear_kernel, types, constants, choice.capability, tile)


@pytest.mark.parametrize("capability", SHARED_BYTES, ids=lambda capability: f"sm{capability[0]}{capability[1]}")
def test_products_compile_and_keep_what_the_tile_table_promises(capability: tuple[int, int]) -> None:
    choice = choose_kernels(capability)
    compiled = [kernel for line in choice.lines for kernel in compile_ffn(choice, line)]
    compiled.append(compile_linear(choice, choice.lines[0].down, transposed=False))
    assert max(kernel.shared_bytes for kernel in compiled) <= SHARED_BYTES[capability]
    assert [kernel.spilled_bytes for kernel in compiled] == [0] * len(compiled)
    assert all(kernel.wide_copies > 0 for kernel in compiled)
    expected = "wgmma.mma_async.m64.k" if capability == (9, 0) else "mma.m16.k"
    expected += "16.f16" if choice.path is WeightPath.W8A16 else "32.e4m3"
    assert {kernel.instructions for kernel in compiled} == {frozenset([expected])}


@pytest.mark.parametrize("capability", SHARED_BYTES, ids=lambda capability: f"sm{capability[0]}{capability[1]}")
def test_heads_compile_by_decoding_on_every_card(capability: tuple[int, int]) -> None:
    choice = KernelChoice(capability, WeightPath.W8A16)
    tile = choice.lines[0].down
    for transposed in (True, False):
        compiled = compile_linear(choice, tile, transposed=transposed)
        assert compiled.shared_bytes <= SHARED_BYTES[capability] and compiled.spilled_bytes == 0


@pytest.mark.parametrize(
    "capability", [(8, 9), (9, 0), (12, 0)], ids=lambda capability: f"sm{capability[0]}{capability[1]}"
)
def test_the_other_weight_path_compiles_too(capability: tuple[int, int]) -> None:
    choice = KernelChoice(capability, WeightPath.W8A16)
    for kernel in compile_ffn(choice, choice.lines[-1]):
        assert kernel.shared_bytes <= SHARED_BYTES[capability] and kernel.spilled_bytes == 0


@pytest.mark.parametrize("capability", SHARED_BYTES, ids=lambda capability: f"sm{capability[0]}{capability[1]}")
def test_row_kernels_compile(capability: tuple[int, int]) -> None:
    tile = Tile(1, 1, num_warps=4, num_stages=3)
    to_fp8 = capability >= FIRST_FP8_CAPABILITY
    compile_kernel(
        quantize_rows_kernel,
        {"x_ptr": "*bf16", "quantized_ptr": BYTE_POINTER if to_fp8 else HALF_POINTER},
        {"TO_FP8": to_fp8, "BLOCK": 128, "NUM_BLOCKS": 8},
        capability,
        tile,
    )
    compile_kernel(combine_pairs_kernel, {"pairs_ptr": "*fp32", "out_ptr": "*fp32"}, {"BLOCK": 1024}, capability, tile)
