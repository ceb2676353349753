"""One scatter/gather round through the router's own code against raw TCP sockets that carry the same bytes.

    python tests/benchmarks/dispatch.py [--json] [--full] [--wire-dtype fp8-both] [--tls-dir FOLDER]

Every row goes to every one of 4 expert processes, which answer with the rows they got: what is left is planning,
encoding, transport and adding up. Both sides run in turns within one run, so that a change of the machine's speed hits
both. Medians. --full: 7168 columns, as DeepSeek-V3 has; the default is tiny and only shows that it works.
Processes get the environment that the cluster gives them (cluster/data_plane_env.py). --tls-dir: the dispatched rounds,
not the raw ones, are encrypted with the certificates of `shoal certs`; bars are for what is not.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experts.expert_range import ExpertRange
from experts.group import ExpertGroup
from experts.kernels.cpu_build import FLAGS, SOURCE_FOLDER, CompilerMissing, compile_library
from experts.model_config import ModelConfig
from experts.native_serving import FrameFunction
from experts.server import ExpertServer, ReplicaIdentity
from experts.tls import load_cluster_tls
from experts.wire import ComputeFrame, WireFormat, encode_request, encode_response
from router.dispatch import Dispatcher, DispatchOptions, to_wire
from router.expert_pool import ExpertPool, PoolOptions
from router.expert_table import ExpertTable, GroupEntry, ReplicaEntry
from tests.benchmarks.report import Bar, Figure, add_json_option, print_report, summarize
from tests.benchmarks.worker_processes import restart_with_data_plane_env, run_workers
from tests.random_checkpoint import build_config

HOST = "127.0.0.1"
LAYER_ID = 1
NUM_EXPERTS, TOP_K = 256, 8
# What was asked for, at 4 groups: times the raw round.
MOST_TIMES = {1: 9.0, 64: 3.2}
ROUND_TIMEOUT_S = 30.0
NUM_WARM_UP = 20
# Raw and dispatched rounds take turns in blocks of so many.
ROUNDS_PER_TURN = 20
DIGEST, NUMERICS_ID = "0" * 64, "echo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--full", action="store_true", help="7168 columns and enough rounds to rely on")
    parser.add_argument("--groups", type=int, default=4, help="expert processes")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="rows of a round")
    parser.add_argument("--rounds", type=int, help="rounds of each kind; default: 10, with --full 600")
    parser.add_argument("--wire-dtype", choices=[choice.value for choice in WireFormat], default="bfloat16")
    parser.add_argument("--tls-dir", metavar="FOLDER", help="tls.crt, tls.key and ca.crt: encrypt what is dispatched")
    parser.add_argument("--serve", choices=["experts", "raw"], help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--hidden", type=int, help="columns; default: 256, with --full 7168")
    arguments = parser.parse_args()
    restart_with_data_plane_env()
    torch.set_num_threads(1)
    hidden_size = arguments.hidden or (7168 if arguments.full else 256)
    if arguments.serve == "experts":
        serve_experts(hidden_size, arguments.name, arguments.tls_dir)
    elif arguments.serve == "raw":
        serve_raw()
    else:
        measure(arguments, hidden_size, arguments.rounds or (600 if arguments.full else 10))


def measure(arguments: argparse.Namespace, hidden_size: int, num_rounds: int) -> None:
    wire_format = WireFormat(arguments.wire_dtype)
    num_groups: int = arguments.groups
    limits: list[Figure] = []
    figures: list[Figure] = []
    bars: list[Bar] = []
    tls_dir: str | None = arguments.tls_dir
    secret = () if tls_dir is None else ("--tls-dir", tls_dir)
    with (
        serving("experts", num_groups, hidden_size, *secret) as experts,
        serving("raw", num_groups, hidden_size) as raw,
    ):
        sizes = [Rounds(rows, hidden_size, num_groups, wire_format, experts, raw, tls_dir) for rows in arguments.rows]
        for rounds, (raw_us, dispatch_us) in zip(sizes, uvloop.run(run_all(sizes, num_rounds)), strict=True):
            details = {"rows": rounds.num_rows, "bytes_out": rounds.bytes_out, "bytes_back": rounds.bytes_back}
            limits.append(summarize("raw TCP round", raw_us, "us", **details))
            figures.append(summarize("scatter/gather round", dispatch_us, "us", **details))
            ratio = figures[-1].value / limits[-1].value
            figures.append(Figure("times the raw round", ratio, "x", {"rows": rounds.num_rows}))
            if rounds.num_rows in MOST_TIMES:
                comparable = num_groups == 4 and hidden_size == 7168 and wire_format is WireFormat.BFLOAT16
                comparable = comparable and tls_dir is None
                bars.append(
                    Bar(
                        f"scatter/gather over 4 groups, {rounds.num_rows} row(s), against the raw socket round",
                        MOST_TIMES[rounds.num_rows],
                        ratio if comparable else None,
                        "x",
                        "low",
                        "" if comparable else "measured only with --full, 4 groups and bfloat16, unencrypted",
                    )
                )
    share = fp8_share(7168)
    bars.append(Bar("bytes of FP8 both ways, against bfloat16 (64 rows of 7168)", 0.52, share, "x", "low"))
    print_report(
        "dispatch",
        sizes={
            "hidden": hidden_size,
            "groups": num_groups,
            "rounds": num_rounds,
            "wire_dtype": wire_format.value,
            "encrypted": tls_dir is not None,
        },
        limit=limits,
        figures=figures,
        bars=bars,
        as_line=arguments.json,
    )


class Rounds:
    """Rounds of one size, raw and through the dispatcher, in turns."""

    def __init__(
        self,
        num_rows: int,
        hidden_size: int,
        num_groups: int,
        wire_format: WireFormat,
        experts: Sequence[str],
        raw: Sequence[str],
        tls_dir: str | None,
    ) -> None:
        self.num_rows = num_rows
        self._pool_options = PoolOptions(tls=load_cluster_tls(tls_dir))
        self._config = ModelConfig.from_dict(
            build_config(hidden_size=hidden_size, n_routed_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
        )
        self._options = DispatchOptions(wire_format, "reduced", ROUND_TIMEOUT_S, ROUND_TIMEOUT_S)
        generator = torch.Generator().manual_seed(num_rows)
        self._hidden_states = torch.randn(num_rows, hidden_size, generator=generator).to(torch.bfloat16)
        # Every row asks every group for TOP_K / num_groups experts.
        per_group, chosen = NUM_EXPERTS // num_groups, TOP_K // num_groups
        self._topk_ids = torch.cat(
            [torch.randint(0, per_group - chosen, (num_rows, 1), generator=generator) + group * per_group + offset
             for group in range(num_groups) for offset in range(chosen)], dim=1,
        )  # fmt: skip
        self._topk_ids = self._topk_ids.view(num_rows, num_groups, chosen)
        self._topk_ids[:, :, 1:] = self._topk_ids[:, :, :1] + torch.arange(1, chosen)  # distinct
        self._topk_ids = self._topk_ids.view(num_rows, -1)
        self._topk_weights = torch.rand(self._topk_ids.shape, generator=generator)
        self._table = ExpertTable(
            1,
            tuple(
                GroupEntry(
                    f"g{index}",
                    (ExpertRange(0, 99, index * per_group, (index + 1) * per_group),),
                    (ReplicaEntry(f"g{index}-0", endpoint, 1, DIGEST, NUMERICS_ID),),
                )
                for index, endpoint in enumerate(experts)
            ),
        )
        self.bytes_out, self.bytes_back = count_frame_bytes(num_rows, hidden_size, chosen, wire_format)
        self._raw = [RawConnection(endpoint, self.bytes_out, self.bytes_back) for endpoint in raw]

    async def run(self, num_rounds: int) -> tuple[list[float], list[float]]:
        """Microseconds of every raw and of every dispatched round."""
        pool = ExpertPool(self._config, self._pool_options)
        pool.apply(self._table)
        dispatcher = Dispatcher(pool, self._options)
        raw_us: list[float] = []
        dispatch_us: list[float] = []
        try:
            for turn in (-1, *range(0, num_rounds, ROUNDS_PER_TURN)):
                count = NUM_WARM_UP if turn < 0 else min(ROUNDS_PER_TURN, num_rounds - turn)
                found_raw = [self._run_raw() for _ in range(count)]
                found_dispatch = [await self._run_dispatch(dispatcher) for _ in range(count)]
                if turn >= 0:
                    raw_us += found_raw
                    dispatch_us += found_dispatch
        finally:
            await pool.close()
            for connection in self._raw:
                connection.close()
        return raw_us, dispatch_us

    async def _run_dispatch(self, dispatcher: Dispatcher) -> float:
        started_s = time.perf_counter()
        pending = await dispatcher.scatter(LAYER_ID, self._hidden_states, self._topk_ids, self._topk_weights)
        await pending.gather()
        return (time.perf_counter() - started_s) * 1e6

    def _run_raw(self) -> float:
        started_s = time.perf_counter()
        for connection in self._raw:
            connection.send()
        for connection in self._raw:
            connection.receive()
        return (time.perf_counter() - started_s) * 1e6


async def run_all(sizes: Sequence[Rounds], num_rounds: int) -> list[tuple[list[float], list[float]]]:
    """Fewer rounds of many rows: each takes longer."""
    return [await rounds.run(max(5, num_rounds if rounds.num_rows < 16 else num_rounds // 3)) for rounds in sizes]


class RawConnection:
    """A blocking socket to a process that answers every frame with as many bytes as agreed on."""

    def __init__(self, endpoint: str, bytes_out: int, bytes_back: int) -> None:
        host, _, port = endpoint.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=ROUND_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(np.array([bytes_out, bytes_back], dtype="<i8").tobytes())
        self._frame = bytes(bytes_out)
        self._answer = memoryview(bytearray(bytes_back))

    def send(self) -> None:
        self._socket.sendall(self._frame)

    def receive(self) -> None:
        receive_exactly(self._socket, self._answer)

    def close(self) -> None:
        self._socket.close()


class EchoGroup:
    """What an ExpertServer asks of an ExpertGroup, with the rows themselves as result."""

    weight_digest, numerics_id = DIGEST, NUMERICS_ID
    hosted = (ExpertRange(0, 99, 0, NUM_EXPERTS),)
    config = ModelConfig.from_dict(build_config(n_routed_experts=NUM_EXPERTS))
    max_rows = 1

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size

    @functools.cached_property
    def frame_function(self) -> FrameFunction | None:
        """As of a group with the native kernel, if a library can be built here."""
        try:
            library = build_echo()
        except CompilerMissing:
            return None
        address = ctypes.cast(library.echo_frame, ctypes.c_void_p).value or 0
        return FrameFunction(address, 0, torch.bfloat16, self.hidden_size, LAYER_ID + 1, NUM_EXPERTS, library)

    def check_frame(self, frame: ComputeFrame) -> None:
        pass

    def compute(self, frame: ComputeFrame) -> torch.Tensor:
        return frame.hidden_states if frame.scales is None else frame.load_hidden_states(torch.bfloat16)


def build_echo() -> ctypes.CDLL:
    """Raises CompilerMissing."""
    source = Path(__file__).with_name("echo_frames.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "echo.so"
        compile_library(source, (*FLAGS, f"-I{SOURCE_FOLDER / 'cpu'}"), library)
        return ctypes.CDLL(str(library))


def serve_experts(hidden_size: int, replica_id: str, tls_dir: str | None) -> None:
    """One expert server on any port, until standard input ends."""
    group = cast(ExpertGroup, EchoGroup(hidden_size))
    identity = ReplicaIdentity("g", replica_id, incarnation=1)
    server = ExpertServer(group, identity, tls=load_cluster_tls(tls_dir))
    print(json.dumps({"endpoint": server.start()}), flush=True)
    sys.stdin.read()
    server.stop(0.1)


def serve_raw() -> None:
    """One raw connection after the other, until standard input ends."""
    listener = socket.create_server((HOST, 0))
    print(json.dumps({"endpoint": f"{HOST}:{listener.getsockname()[1]}"}), flush=True)

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sizes = memoryview(bytearray(16))
            receive_exactly(connection, sizes)
            bytes_in, bytes_back = np.frombuffer(sizes, dtype="<i8").tolist()
            frame, answer = memoryview(bytearray(bytes_in)), bytes(bytes_back)
            with contextlib.suppress(OSError, EOFError):
                while True:
                    receive_exactly(connection, frame)
                    connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    sys.stdin.read()


def receive_exactly(connection: socket.socket, target: memoryview) -> None:
    received = 0
    while received < len(target):
        count = connection.recv_into(target[received:])
        if not count:
            raise EOFError("the connection ended")
        received += count


@contextlib.contextmanager
def serving(kind: str, count: int, hidden_size: int, *secret: str) -> Iterator[list[str]]:
    """Endpoints of that many processes of this script; they end with the block."""
    options = ("--serve", kind, "--hidden", str(hidden_size), *secret)
    with run_workers([(__file__, *options, "--name", f"g{index}-0") for index in range(count)]) as workers:
        yield [worker.ready["endpoint"] for worker in workers]


def count_frame_bytes(num_rows: int, hidden_size: int, num_chosen: int, wire_format: WireFormat) -> tuple[int, int]:
    """Bytes of one group's frame and of its answer."""
    rows = torch.zeros(num_rows, hidden_size, dtype=torch.bfloat16)
    request = encode_request(
        frame_id=1_000,
        incarnation=1,
        table_version=1,
        layer_id=LAYER_ID,
        hidden_states=to_wire(rows, wire_format),
        pair_rows=torch.zeros(num_rows * num_chosen, dtype=torch.int32),
        pair_experts=torch.zeros(num_rows * num_chosen, dtype=torch.int32),
        pair_weights=torch.zeros(num_rows * num_chosen),
        exact=False,
        deadline_ms=30_000,
        reply_dtype=wire_format.reply_dtype,
    )
    answer = encode_response(
        frame_id=1_000, incarnation=1, tensor=rows, queue_us=50, compute_us=50, dtype=wire_format.reply_dtype
    )
    return len(request), len(answer)


def fp8_share(hidden_size: int) -> float:
    """All bytes of a round both ways in FP8, as a share of bfloat16's; 2 of a row's experts in a group."""
    fp8, bfloat16 = (
        sum(count_frame_bytes(64, hidden_size, 2, wire_format))
        for wire_format in (WireFormat.FP8_BOTH, WireFormat.BFLOAT16)
    )
    return fp8 / bfloat16


if __name__ == "__main__":
    main()
