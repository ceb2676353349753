"""`shoal check`: validate a whole checkpoint folder without ever holding more than one piece of it in memory.

Everything the loaders would trip over is found, and what they would not notice: NaN and infinite values, zero
scales, tensors nobody reads, an index that contradicts its files. All problems are collected, each one line that names
file, tensor and remedy. torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experts.checkpoint import FLOAT_DTYPES, INDEX_FILE, Checkpoint, TensorInfo
from experts.errors import CheckpointError, ConfigError, ExpertsError
from experts.expert_range import split_experts
from experts.load_progress import LoadProgress
from experts.model_config import ModelConfig, load_json_object
from experts.tensor_names import ExpectedTensor, TensorOwner, list_all_tensors

# Values are examined in pieces of this size: the memory that a check takes, times about three.
_PIECE_BYTES = 32 * 1024 * 1024
_SCALE_SUFFIX = "_scale_inv"
_DOWNLOAD_AGAIN = "download this file again"

# Bits that are all set in a NaN or infinity (in a NaN, for e4m3fn, which has no infinity).
_NOT_FINITE_BITS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F8_E4M3": (np.uint8, 0x7F),
    "F8_E8M0": (np.uint8, 0xFF),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
}


@dataclass(frozen=True, slots=True)
class PartSize:
    """What one process loads. stored_bytes: read from disk; bf16_bytes: in memory when kept in bfloat16."""

    name: str
    stored_bytes: int
    bf16_bytes: int


@dataclass(slots=True)
class CheckReport:
    """What a check found. problems: one line each, empty for a sound checkpoint; notes: harmless oddities."""

    folder: str
    model_type: str | None = None
    num_files: int = 0
    num_tensors: int = 0
    num_parameters: int = 0
    trunk: PartSize | None = None
    groups: list[PartSize] = field(default_factory=list[PartSize])
    problems: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> str:
        """One JSON object: "ok" and every field of this report."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)

    def to_text(self) -> str:
        """Lines for a terminal, without a trailing newline."""
        lines = [f"checkpoint {self.folder}"]
        if self.model_type is not None:
            lines.append(
                f"{self.model_type}: {self.num_parameters / 1e6:,.1f} M parameters in {self.num_tensors:,} tensors, "
                f"{self.num_files} file{'' if self.num_files == 1 else 's'}"
            )
        parts = [*([self.trunk] if self.trunk is not None else []), *self.groups]
        if parts:
            lines.append(f"{'part':<34} {'on disk':>12} {'in bf16':>12}")
            lines += [
                f"{part.name:<34} {_format_bytes(part.stored_bytes):>12} {_format_bytes(part.bf16_bytes):>12}"
                for part in parts
            ]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"problem: {problem}" for problem in self.problems]
        count = len(self.problems)
        lines.append("no problem found" if self.ok else f"{count} problem{'' if count == 1 else 's'} found")
        return "\n".join(lines)


def check_checkpoint(
    folder: str | Path,
    num_groups: int = 4,
    *,
    read_values: bool = True,
    on_fraction: Callable[[float], None] | None = None,
) -> CheckReport:
    """Validate the folder and size it for num_groups expert groups. Never raises for what is wrong with the folder.

    read_values False: only headers, sizes and the small files, which takes well under a second at any size of
    checkpoint. on_fraction: see LoadProgress.
    """
    report = CheckReport(str(folder))
    try:
        checkpoint = Checkpoint(folder)
    except ExpertsError as error:
        report.problems.append(str(error))
        return report
    with checkpoint:
        check = _Check(checkpoint, report)
        check.check_files()
        check.check_presence()
        check.find_read_tensors()
        if read_values:
            check.check_values(on_fraction)
        check.check_tokenizer()
        check.measure_parts(num_groups)
    return report


class _Check:
    """One run over one checkpoint; each step adds to the report."""

    def __init__(self, checkpoint: Checkpoint, report: CheckReport) -> None:
        self._checkpoint = checkpoint
        self._config: ModelConfig = checkpoint.config
        self._report = report
        self._expected: dict[str, ExpectedTensor] = {
            tensor.name: tensor for tensor in list_all_tensors(checkpoint.config)
        }
        self._sound_files: set[str] = set()
        self._read_infos: list[TensorInfo] = []
        report.model_type = checkpoint.config.model_type

    def check_files(self) -> None:
        """Open every file; compare its header with the index in both directions."""
        for file in self._checkpoint.files:
            try:
                stored = self._checkpoint.stored_tensors(file)
            except CheckpointError as error:
                self._problem(error)
                continue
            self._sound_files.add(file)
            for name in stored:
                if not self._checkpoint.has(name):
                    self._report.notes.append(f"{file}: tensor {name}: {INDEX_FILE} does not list it, nobody reads it")
                elif self._checkpoint.placed_file(name) != file:
                    self._report.notes.append(
                        f"{file}: tensor {name}: {INDEX_FILE} places it in {self._checkpoint.placed_file(name)}, "
                        "this copy is not read"
                    )
        self._report.num_files = len(self._checkpoint.files)

    def check_presence(self) -> None:
        """Find every tensor that the config demands, with its shape and dtype; name those that nobody reads."""
        used: set[str] = set()
        absent_mtp = self._find_absent_mtp_layers()
        for tensor in self._expected.values():
            if tensor.layer_id in absent_mtp:
                continue
            used.add(tensor.name)
            if tensor.substitute is not None and not self._checkpoint.has(tensor.name):
                continue
            if self._checkpoint.placed_file(tensor.name) not in self._sound_files | {None}:
                continue  # the file itself was reported
            self._check_header(tensor)
        for name in self._checkpoint.names:
            if self._checkpoint.placed_file(name) not in self._sound_files:
                continue
            if name.endswith(_SCALE_SUFFIX):
                self._check_scale_has_weight(name)
            elif name not in used:
                self._report.notes.append(f"{self._checkpoint.placed_file(name)}: tensor {name}: nobody reads it")

    def find_read_tensors(self) -> None:
        """List what the programs will read, file by file, in the order of the disk; counts it for the report."""
        self._read_infos = [
            info
            for file in sorted(self._sound_files)
            for info in sorted(self._checkpoint.stored_tensors(file).values(), key=lambda info: info.offset)
            if self._is_read(info)
        ]
        self._report.num_tensors = len(self._read_infos)
        self._report.num_parameters = sum(
            _count_elements(info) for info in self._read_infos if not info.name.endswith(_SCALE_SUFFIX)
        )

    def check_values(self, on_fraction: Callable[[float], None] | None) -> None:
        """Look at every number of every tensor that is read."""
        total_bytes = sum(info.size_bytes for info in self._read_infos)
        progress = LoadProgress(total_bytes, "check", on_fraction=on_fraction)
        for info in self._read_infos:
            try:
                self._check_values_of(info, progress)
            except CheckpointError as error:
                self._problem(error)
        progress.finish()

    def check_tokenizer(self) -> None:
        folder = self._checkpoint.folder
        for file, needed in (
            ("tokenizer.json", True),
            ("tokenizer_config.json", True),
            ("generation_config.json", False),
        ):
            if not needed and not (folder / file).exists():
                continue
            try:
                content = load_json_object(folder / file)
            except ConfigError as error:
                self._report.problems.append(str(error))
                continue
            if file == "tokenizer.json":
                self._check_tokenizer_json(folder / file)
            has_template = "chat_template" in content or (folder / "chat_template.jinja").exists()
            if file == "tokenizer_config.json" and not has_template:
                self._report.notes.append(f"{file}: has no chat_template, so /v1/chat/completions cannot be served")

    def measure_parts(self, num_groups: int) -> None:
        """Add up what the trunk and each of num_groups expert groups would load."""
        info_of = {info.name: info for info in self._read_infos}
        self._report.trunk = _measure(
            "trunk (each router)", (t for t in self._expected.values() if t.owner is TensorOwner.TRUNK), info_of
        )
        try:
            groups = split_experts(self._config, num_groups)
        except ConfigError as error:
            self._report.problems.append(str(error))
            return
        by_expert: dict[int, list[ExpectedTensor]] = {}
        for tensor in self._expected.values():
            if tensor.expert_id is not None:
                by_expert.setdefault(tensor.expert_id, []).append(tensor)
        for index, (block,) in enumerate(groups):
            tensors = (tensor for expert_id in block.expert_ids for tensor in by_expert[expert_id])
            name = f"group {index} (experts {block.expert_start}:{block.expert_end})"
            self._report.groups.append(_measure(name, tensors, info_of))

    def _find_absent_mtp_layers(self) -> set[int]:
        """MTP layers of which the checkpoint holds nothing: one problem instead of hundreds."""
        config = self._config
        absent: set[int] = set()
        for layer_id in range(config.num_hidden_layers, config.num_layers_total):
            prefix = f"model.layers.{layer_id}."
            if not any(name.startswith(prefix) for name in self._checkpoint.names):
                absent.add(layer_id)
                error = CheckpointError(
                    f"holds nothing of layer {layer_id}, the MTP layer that config.json announces",
                    file=self._checkpoint.index_name,
                    remedy="set num_nextn_predict_layers to 0 in config.json, or download the checkpoint again",
                )
                self._problem(error)
        return absent

    def _check_header(self, tensor: ExpectedTensor) -> None:
        try:
            info = self._checkpoint.check_stored_weight(tensor.name, tensor.shape)
        except CheckpointError as error:
            # A scale may lie in a file that was reported already.
            if error.file not in self._checkpoint.files or error.file in self._sound_files:
                self._problem(error)
            return
        if not tensor.quantizable and info.dtype not in FLOAT_DTYPES:
            self._problem_at(
                tensor.name,
                f"has dtype {info.dtype}; supported here: {', '.join(FLOAT_DTYPES)}",
                "use the checkpoint as published",
            )

    def _check_scale_has_weight(self, name: str) -> None:
        weight = name.removesuffix(_SCALE_SUFFIX)
        file = self._checkpoint.placed_file(weight)
        if file is None:
            remedy = "the checkpoint is incomplete: download it again"
            self._problem_at(name, f"is a scale without a weight: {weight} is in no file", remedy)
        elif file in self._sound_files:
            info = self._checkpoint.stored_tensors(file).get(weight)
            if info is not None and info.dtype != "F8_E4M3":
                self._problem_at(
                    name, f"is a scale, but {weight} is {info.dtype}, not FP8", "download both files again"
                )

    def _is_read(self, info: TensorInfo) -> bool:
        known = info.name in self._expected or info.name.removesuffix(_SCALE_SUFFIX) in self._expected
        return known and self._checkpoint.placed_file(info.name) == info.file and info.dtype in _NOT_FINITE_BITS

    def _check_values_of(self, info: TensorInfo, progress: LoadProgress) -> None:
        element_type, bits = _NOT_FINITE_BITS[info.dtype]
        mask = element_type(bits)
        is_scale = info.name.endswith(_SCALE_SUFFIX)
        num_not_finite = num_not_positive = 0
        for start in range(0, info.size_bytes, _PIECE_BYTES):
            raw = np.empty(min(_PIECE_BYTES, info.size_bytes - start), dtype=np.uint8)
            self._checkpoint.read_into(info, raw, start)
            values = raw.view(element_type)
            num_not_finite += int(np.count_nonzero((values & mask) == mask))
            if is_scale and info.dtype != "F8_E8M0":
                # A sign bit, or nothing but zeros.
                sign = element_type(1 << (8 * values.itemsize - 1))
                num_not_positive += int(np.count_nonzero((values >= sign) | (values == 0)))
            progress.advance(len(raw))
        total = _count_elements(info)
        if num_not_finite:
            self._problem_at(info.name, f"{num_not_finite} of {total} values are NaN or infinite", _DOWNLOAD_AGAIN)
        if num_not_positive:
            self._problem_at(info.name, f"{num_not_positive} of {total} scales are zero or negative", _DOWNLOAD_AGAIN)

    def _check_tokenizer_json(self, path: Path) -> None:
        """Load it with the library that serves it, and compare its ids with the embedding."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every malformed file
            self._report.problems.append(
                f"{path.name}: is no tokenizer: {str(error).splitlines()[0]} ({_DOWNLOAD_AGAIN})"
            )
            return
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if highest >= self._config.vocab_size:
            self._report.problems.append(
                f"{path.name}: token id {highest} is not below vocab_size = {self._config.vocab_size} of config.json "
                "(tokenizer and weights belong to different models)"
            )

    def _problem(self, error: CheckpointError) -> None:
        if str(error) not in self._report.problems:
            self._report.problems.append(str(error))

    def _problem_at(self, tensor: str, reason: str, remedy: str) -> None:
        self._problem(CheckpointError(reason, file=self._checkpoint.placed_file(tensor), tensor=tensor, remedy=remedy))


def _measure(name: str, tensors: Iterable[ExpectedTensor], info_of: Mapping[str, TensorInfo]) -> PartSize:
    stored_bytes = num_elements = 0
    for tensor in tensors:
        info, scale = info_of.get(tensor.name), info_of.get(tensor.scale_name)
        stored_bytes += (info.size_bytes if info is not None else 0) + (scale.size_bytes if scale is not None else 0)
        num_elements += _count_elements(info) if info is not None else 0
    return PartSize(name, stored_bytes, 2 * num_elements)


def _count_elements(info: TensorInfo) -> int:
    return int(np.prod(info.shape, dtype=np.int64))


def _format_bytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:,.2f} MB"
