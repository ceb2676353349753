"""A whole serving stack as plain processes: expert groups, a router, the HTTP front. No Ray.

Tests drive what users run (`python -m experts`, `python -m router`, `python -m router.api`), so nothing here reaches
into the product. Every process starts at once on a port reserved beforehand, every wait has a deadline, and every
process is ended by its own handle whatever happened in between.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import httpx

from router.v1 import router_pb2, router_pb2_grpc
from tests.tcp_proxy import TcpProxy, tcp_proxy

REPOSITORY = Path(__file__).resolve().parent.parent
# Importing torch takes seconds on a busy machine; this only bounds a hang.
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
HOST = "127.0.0.1"


class ProcessFailed(AssertionError):
    """A process ended or stayed silent before it was ready; the message carries the tail of its stderr."""


class ManagedProcess:
    """One child process: its ready line, its stderr in a file, and its end."""

    def __init__(self, name: str, arguments: Sequence[str], log_folder: Path) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.stderr_path = log_folder / f"{name}-{time.monotonic_ns()}.stderr"
        self._stdout_lines: queue.Queue[str | None] = queue.Queue()
        self._process = _spawn(self.arguments, self.stderr_path)
        self._reader = threading.Thread(target=self._read_stdout, name=f"stdout of {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, deadline: float) -> dict[str, Any]:
        """The one JSON line on stdout. Raises ProcessFailed if the process ends or `deadline` (monotonic) passes."""
        try:
            line = self._stdout_lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise ProcessFailed(f"{self.name} was not ready in time\n{self.stderr_tail()}") from None
        if line is None:
            raise ProcessFailed(f"{self.name} ended with {self.wait(STOP_TIMEOUT_S)}\n{self.stderr_tail()}")
        return json.loads(line)

    def wait(self, timeout_s: float) -> int:
        """The exit code; killed by a signal: its negative number."""
        return self._process.wait(timeout_s)

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM; SIGKILL if that does not end it in time. Returns the exit code."""
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGABRT)  # faulthandler writes where its threads are
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_TIMEOUT_S)
                warnings.warn(f"a process did not end on SIGTERM: {self.stderr_tail(200)}", stacklevel=2)
                self.kill()
        self._reader.join(STOP_TIMEOUT_S)
        return self._process.wait(STOP_TIMEOUT_S)

    def stderr_tail(self, num_lines: int = 30) -> str:
        lines = self.stderr_path.read_text(errors="replace").splitlines()
        return "\n".join(f"  {self.name}: {line}" for line in lines[-num_lines:])

    def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._stdout_lines.put(line)
        self._stdout_lines.put(None)


@dataclass(frozen=True)
class StackOptions:
    """What a test may choose; the defaults are the exact mode used to compare numbers."""

    num_groups: int = 2
    num_replicas: int = 1
    # The process that the router reaches through a proxy; None: none.
    proxied_expert: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    wire_dtype: Literal["float32", "bfloat16", "fp8", "fp8-both"] = "float32"
    combine: Literal["reduced", "exact"] = "reduced"
    # None leaves the router's own default.
    deterministic: bool | None = None
    max_model_len: int | None = None
    expert_wait_s: float = 30.0
    expert_threads: int = 1
    router_threads: int = 1
    # False leaves the HTTP front out, for tests that call the router over gRPC.
    api: bool = True
    # Folder of the certificates that everything uses; None: unencrypted.
    tls_dir: Path | None = None
    extra_router_arguments: tuple[str, ...] = ()
    extra_api_arguments: tuple[str, ...] = ()


@dataclass
class LocalStack:
    """A running stack. `experts[i]` is replica i % num_replicas of group i // num_replicas and can be restarted on its
    own port."""

    checkpoint: Path
    options: StackOptions
    log_folder: Path
    experts: list[ManagedProcess]
    router: ManagedProcess
    api: ManagedProcess | None
    expert_ports: list[int]
    router_endpoint: str
    base_url: str
    expert_proxy: TcpProxy | None = None
    _ready_lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def client(self, timeout_s: float = 60.0) -> httpx.Client:
        """An HTTP client of this stack; close it."""
        return httpx.Client(base_url=self.base_url, timeout=timeout_s)

    def status(self, timeout_s: float = 5.0) -> router_pb2.StatusResponse:
        with self.router_channel() as channel:
            return router_pb2_grpc.RouterServiceStub(channel).Status(router_pb2.StatusRequest(), timeout=timeout_s)

    def router_channel(self) -> grpc.Channel:
        if self.options.tls_dir is not None:
            return secure_channel(self.router_endpoint, self.options.tls_dir)
        return grpc.insecure_channel(self.router_endpoint, options=[("grpc.use_local_subchannel_pool", 1)])

    def restart_expert(self, index: int) -> ManagedProcess:
        """Start experts[index] again on its old port, as a supervisor would. Does not wait until it is ready."""
        if self.experts[index].is_running:
            raise ValueError(f"expert {index} is still running")
        process = ManagedProcess(
            f"expert-{index}",
            expert_arguments(self.checkpoint, self.options, index, self.expert_ports[index]),
            self.log_folder,
        )
        self.experts[index] = process
        return process

    def processes(self) -> list[ManagedProcess]:
        return [process for process in (self.api, self.router, *self.experts) if process is not None]

    def pids(self) -> dict[str, int]:
        return {process.name: process.pid for process in self.processes()}

    def describe_failure(self) -> str:
        return "\n".join(process.stderr_tail() for process in self.processes())


@contextlib.contextmanager
def local_stack(
    checkpoint: Path, log_folder: Path, options: StackOptions | None = None, *, timeout_s: float = START_TIMEOUT_S
) -> Iterator[LocalStack]:
    """Start everything concurrently, wait until it answers, end everything by handle."""
    options = options or StackOptions()
    log_folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    started: list[ManagedProcess] = []

    def start(name: str, arguments: Sequence[str]) -> ManagedProcess:
        process = ManagedProcess(name, arguments, log_folder)
        started.append(process)
        return process

    with contextlib.ExitStack() as reservations:
        num_experts = options.num_groups * options.num_replicas
        expert_ports = [reservations.enter_context(_reserved_port()) for _ in range(num_experts)]
        router_expert_ports, proxy = list(expert_ports), None
        if options.proxied_expert is not None:
            proxied = options.proxied_expert
            proxy = reservations.enter_context(tcp_proxy([f"{HOST}:{expert_ports[proxied]}"]))
            router_expert_ports[proxied] = int(proxy.endpoints[0].rpartition(":")[2])
        router_port = reservations.enter_context(_reserved_port())
        api_port = reservations.enter_context(_reserved_port())
        stack: LocalStack | None = None
        try:
            experts = [
                start(f"expert-{index}", expert_arguments(checkpoint, options, index, port))
                for index, port in enumerate(expert_ports)
            ]
            router = start("router", router_arguments(checkpoint, options, router_expert_ports, router_port))
            front_arguments = [*api_arguments(checkpoint, [router_port], api_port), *_tls_arguments(options)]
            front_arguments += options.extra_api_arguments
            api = start("api", front_arguments) if options.api else None
            stack = LocalStack(
                checkpoint=checkpoint,
                options=options,
                log_folder=log_folder,
                experts=experts,
                router=router,
                api=api,
                expert_ports=expert_ports,
                router_endpoint=f"{HOST}:{router_port}",
                base_url=f"http://{HOST}:{api_port}",
                expert_proxy=proxy,
            )
            for process in stack.processes():
                process.wait_ready(deadline)
            with stack.router_channel() as channel:
                wait_until_ready(channel, deadline, stack.describe_failure)
            if api is not None:
                with stack.client(timeout_s=5.0) as client:
                    wait_until(
                        lambda: client.get("/health/ready").status_code == 200,
                        deadline,
                        lambda: f"HTTP front not ready\n{stack.describe_failure()}",
                    )
            yield stack
        finally:
            # A test may have restarted an expert: end what the stack holds now, and everything that was started.
            remaining = {id(process): process for process in (*started, *(stack.processes() if stack else ()))}
            stop_all(remaining.values())


def stop_all(processes: Iterable[ManagedProcess]) -> None:
    """SIGTERM to all of them at once, then wait for each."""
    waiting = list(processes)
    for process in waiting:
        process.send_signal(signal.SIGTERM)
    for process in waiting:
        process.stop()


def expert_arguments(checkpoint: Path, options: StackOptions, index: int, port: int) -> list[str]:
    num_experts: int = json.loads((checkpoint / "config.json").read_text())["n_routed_experts"]
    group, replica = divmod(index, options.num_replicas)
    start = group * num_experts // options.num_groups
    end = (group + 1) * num_experts // options.num_groups
    return [
        "experts",
        *("--checkpoint", str(checkpoint), "--experts", f"{start}:{end}"),
        *("--group-name", f"g{group}", "--replica-id", f"g{group}-{replica}"),
        *("--host", HOST, "--port", str(port), "--dtype", options.dtype),
        *("--threads", str(options.expert_threads)),
        *_tls_arguments(options),
    ]


def router_arguments(checkpoint: Path, options: StackOptions, expert_ports: Sequence[int], port: int) -> list[str]:
    arguments = ["router", "--checkpoint", str(checkpoint)]
    for expert_port in expert_ports:
        arguments += ["--expert", f"{HOST}:{expert_port}"]
    arguments += ["--router-id", "r0", "--host", HOST, "--port", str(port)]
    arguments += ["--threads", str(options.router_threads)]
    arguments += ["--dtype", options.dtype, "--wire-dtype", options.wire_dtype, "--combine", options.combine]
    arguments += ["--expert-wait-s", str(options.expert_wait_s)]
    if options.deterministic is not None:
        arguments.append("--deterministic" if options.deterministic else "--no-deterministic")
    if options.max_model_len is not None:
        arguments += ["--max-model-len", str(options.max_model_len)]
    return [*arguments, *_tls_arguments(options), *options.extra_router_arguments]


def api_arguments(checkpoint: Path, router_ports: Sequence[int], port: int) -> list[str]:
    arguments = ["router.api", "--checkpoint", str(checkpoint), "--host", HOST, "--port", str(port)]
    for router_port in router_ports:
        arguments += ["--router", f"{HOST}:{router_port}"]
    return arguments


def _tls_arguments(options: StackOptions) -> list[str]:
    return [] if options.tls_dir is None else ["--tls-dir", str(options.tls_dir)]


def secure_channel(endpoint: str, tls_dir: Path) -> grpc.Channel:
    """A client with the certificate of a folder."""
    ca, key, certificate = ((tls_dir / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt"))
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", "shoal")]
    return grpc.secure_channel(endpoint, grpc.ssl_channel_credentials(ca, key, certificate), options=options)


@dataclass(frozen=True)
class ExtraRouter:
    """A router beside a stack's own, on the same expert groups."""

    process: ManagedProcess
    endpoint: str

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.endpoint, options=[("grpc.use_local_subchannel_pool", 1)])


@contextlib.contextmanager
def extra_router(stack: LocalStack, options: StackOptions | None = None) -> Iterator[ExtraRouter]:
    """A second router, ready. options: None for the stack's own."""
    arguments = router_arguments(stack.checkpoint, options or stack.options, stack.expert_ports, port=0)
    process = ManagedProcess("extra-router", arguments, stack.log_folder)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        router = ExtraRouter(process, process.wait_ready(deadline)["endpoint"])
        with router.channel() as channel:
            wait_until_ready(channel, deadline, process.stderr_tail)
        yield router
    finally:
        process.stop()


@contextlib.contextmanager
def extra_api(stack: LocalStack, router_ports: Sequence[int], arguments: Sequence[str] = ()) -> Iterator[str]:
    """An HTTP front for these routers, ready. arguments: for it, further ones. Yields its URL."""
    arguments = [*api_arguments(stack.checkpoint, router_ports, port=0), *arguments]
    process = ManagedProcess("extra-api", arguments, stack.log_folder)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        url: str = process.wait_ready(deadline)["url"]
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200, deadline, process.stderr_tail)
        yield url
    finally:
        process.stop()


def run_to_end(arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """`python -m ARGUMENTS` until it ends, for commands that are expected to refuse their input."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env=_child_environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def wait_until_ready(channel: grpc.Channel, deadline: float, describe: Callable[[], str] = str) -> None:
    """Until the router at the other end has its weights and a replica of every group."""
    stub = router_pb2_grpc.RouterServiceStub(channel)
    last = router_pb2.StatusResponse()

    def is_ready() -> bool:
        last.CopyFrom(stub.Status(router_pb2.StatusRequest(), timeout=5.0))
        return last.ready

    wait_until(is_ready, deadline, lambda: f"router not ready: {last.message}\n{describe()}")


def wait_until(condition: Callable[[], bool], deadline: float, describe: Callable[[], str]) -> None:
    """Poll `condition()` until it holds; transport errors count as not yet. Raises ProcessFailed at `deadline`."""
    pause = threading.Event()
    while True:
        with contextlib.suppress(httpx.TransportError, grpc.RpcError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise ProcessFailed(describe())
        pause.wait(0.02)


def _spawn(arguments: Sequence[str], stderr_path: Path) -> subprocess.Popen[str]:
    with stderr_path.open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=REPOSITORY,
            env=_child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )


def _child_environment() -> Mapping[str, str]:
    """One compute thread per process: a stack has more processes than the machine has cores."""
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **own, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port kept from other programs for as long as the stack lives.

    A bound socket that never listens gets no connection, and a server that sets SO_REUSEADDR (grpc, uvicorn) may
    bind beside it; so the port survives the death and restart of its server too.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reservation.bind((HOST, 0))
        yield reservation.getsockname()[1]
