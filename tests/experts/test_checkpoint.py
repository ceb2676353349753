"""Reading tensors by byte range, judged by the safetensors library."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experts.checkpoint import Checkpoint
from experts.errors import CheckpointError
from experts.tensor_names import list_all_tensors
from tests.random_checkpoint import dequantized_twin, read_tensors, write_random_checkpoint


@pytest.mark.parametrize("folder_name", ["fp8_folder", "bf16_folder"])
def test_reads_every_tensor_as_the_safetensors_library_does(folder_name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(folder_name)
    with Checkpoint(folder) as checkpoint:
        expected = read_tensors(folder)
        assert set(checkpoint.tensors) == set(expected)
        for name, tensor in expected.items():
            found = checkpoint.read(name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_list_of_expected_tensors_is_exactly_what_a_checkpoint_holds(fp8_checkpoint: Checkpoint) -> None:
    expected = {tensor.name for tensor in list_all_tensors(fp8_checkpoint.config)}
    stored = {name for name in fp8_checkpoint.tensors if not name.endswith("_scale_inv")}
    assert expected == stored


@pytest.mark.parametrize("overrides", [{}, {"ue8m0": True}, {"ue8m0": True, "scale_dtype": torch.float8_e8m0fnu}])
def test_dequantises_to_exactly_the_values_that_the_bytes_stand_for(
    tmp_path: Path, overrides: dict[str, object]
) -> None:
    write_random_checkpoint(tmp_path / "fp8", fp8=True, hidden_size=192, **overrides)  # type: ignore[arg-type]
    twin = read_tensors(dequantized_twin(tmp_path / "fp8", tmp_path / "twin"))
    with Checkpoint(tmp_path / "fp8") as checkpoint:
        for name, tensor in twin.items():
            assert torch.equal(checkpoint.read_weight(name, tuple(tensor.shape), torch.float32), tensor), name


def test_e8m0_covers_the_ends_of_its_range(tmp_path: Path) -> None:
    scales = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    write_random_checkpoint(tmp_path, shards=1)
    save_file({"scales": scales.view(torch.float8_e8m0fnu)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        found = checkpoint.read("scales")
    assert found[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert bool(found[4].isnan())


def test_opens_only_the_shards_that_are_asked_for(broken_folder: Path) -> None:
    (broken_folder / "model-00002-of-00002.safetensors").unlink()
    with Checkpoint(broken_folder) as checkpoint:
        assert checkpoint.read("model.embed_tokens.weight").numel() > 0
        with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: missing from"):
            checkpoint.read("lm_head.weight")


def test_a_file_truncated_while_open_is_an_error_and_not_the_end_of_the_process(broken_folder: Path) -> None:
    with Checkpoint(broken_folder) as checkpoint:
        info = checkpoint.info("lm_head.weight")
        os.truncate(broken_folder / info.file, info.offset + 10)
        with pytest.raises(CheckpointError, match=r"tensor lm_head.weight: file ends at byte .* bytes early"):
            checkpoint.read("lm_head.weight")


def test_threads_may_read_at_the_same_time(fp8_folder: Path) -> None:
    expected = read_tensors(fp8_folder)
    wrong: list[str] = []
    with Checkpoint(fp8_folder) as checkpoint:

        def read_all() -> None:
            wrong.extend(
                n for n, t in expected.items() if checkpoint.read_raw(n).tobytes() != bytes(t.view(torch.uint8).numpy())
            )

        threads = [threading.Thread(target=read_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def _write_file(folder: Path, header: bytes, data: bytes = b"", *, header_size: int | None = None) -> None:
    folder.mkdir(exist_ok=True)
    size = len(header) if header_size is None else header_size
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + header + data)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "is no safetensors file"),
        (b"{", b"", "is no safetensors file: its header would have 1 bytes"),
        (b"{]", b"", "header that is no valid JSON"),
        (b"[]", b"", "header that is no JSON object"),
        (b'{"a":3}', b"", "tensor a: has a header entry that is no object"),
        (b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"1234", 'tensor a: has dtype "F99"'),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234", "tensor a: has shape"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"1234", "tensor a: has data_offsets"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"1234", "tensor a: takes 4 bytes"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', b"123", "tensor a: begins at byte"),
        (b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', b"123", "tensor a: is truncated"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"123", "its header accounts for"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{}}', b"12", "same key twice"),
        (b'{"a":{"dtype":"U8","shape":[99999999999],"data_offsets":[0,99999999999]}}', b"", "tensor a: is truncated"),
    ],
)
def test_refuses_a_malformed_file(tmp_path: Path, header: bytes, data: bytes, message: str) -> None:
    write_random_checkpoint(tmp_path, shards=1)
    _write_file(tmp_path, header, data)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert message in str(caught.value) and str(caught.value).startswith("model.safetensors: ")
    assert "\n" not in str(caught.value)


def test_allocates_nothing_by_a_claimed_header_size(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, shards=1)
    _write_file(tmp_path, b"{}", header_size=2**62)
    with pytest.raises(CheckpointError, match="is no safetensors file: its header would have"):
        Checkpoint(tmp_path)


def test_a_path_in_the_index_cannot_leave_the_folder(broken_folder: Path) -> None:
    index = broken_folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match="tensor a: is placed in"):
        Checkpoint(broken_folder)
