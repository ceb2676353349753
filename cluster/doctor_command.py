"""`shoal doctor`: what is missing or misconfigured on this machine, or with --kubernetes in a cluster to install in.

Each check gives one finding with its remedy; only a finding that keeps Shoal from serving makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from cluster.errors import ClusterError
from cluster.findings import Finding, render
from cluster.preflight import check_headers, check_port, measure_memory, resolve_checkpoint
from cluster.settings import ServeSettings, load_settings
from experts.kernels.cpu_build import SOURCE_FOLDER, find_compiler, library_name

MIN_PYTHON = (3, 11)
# One channel per router and replica, Ray's own sockets, and a connection per client.
MIN_OPEN_FILES = 4096
MIN_SHARED_MEMORY = 128 * 2**20
MIN_TEMP_BYTES = 2 * 2**30
# From slow to fast; the first that /proc/cpuinfo has decides how fast bfloat16 is here.
_FAST_CPU_FLAGS = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 with bfloat16"), ("avx512f", "AVX-512"))
_MIN_CPU_FLAG = "avx2"
_PACKAGES = (
    "torch", "ray", "grpcio", "grpcio-health-checking", "protobuf", "fastapi", "uvicorn", "uvloop", "tokenizers",
    "jinja2", "pydantic", "httpx", "numpy", "psutil", "pyyaml",
)  # fmt: skip


def run(options: argparse.Namespace) -> int:
    if options.kubernetes:
        findings, ready = _examine_kubernetes(options), "ready to install"
    else:
        findings, ready = examine(options.checkpoint, options.groups, options.port), "ready to serve"
    ok = all(finding.level != "failure" for finding in findings)
    if options.json:
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(render(findings, ready))
    return 0 if ok else 1


def _examine_kubernetes(options: argparse.Namespace) -> list[Finding]:
    from cluster.kubernetes_api import make_client
    from cluster.kubernetes_doctor import examine_kubernetes, load_values
    from cluster.kubernetes_facts import fetch_facts

    values = None if options.values is None else load_values(options.values)
    return examine_kubernetes(fetch_facts(make_client(), options.namespace), values)


def examine(checkpoint: Path | None, num_groups: int, port: int) -> list[Finding]:
    findings: list[Finding] = []
    for check in (_check_python, _check_packages, _check_stubs, _check_cpu, _check_accelerator, _check_compiler):
        findings.extend(check())
    for check in (_check_open_files, _check_shared_memory, _check_temp_folder, _check_environment):
        findings.extend(check())
    try:
        settings = load_settings(
            {"groups": num_groups, "port": port} | ({"checkpoint": checkpoint} if checkpoint else {})
        )
    except ClusterError as error:
        return [*findings, Finding("settings", "failure", str(error), "correct the value named")]
    findings.extend(_check_ports(settings))
    findings.extend(_check_checkpoint(settings))
    return findings


def _check_python() -> Iterator[Finding]:
    found = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        yield Finding("python", "failure", f"{found} is too old", "make setup with PYTHON=python3.11 or newer")
    else:
        yield Finding("python", "ok", f"{found} in {sys.prefix}")


def _check_packages() -> Iterator[Finding]:
    found: list[str] = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            yield Finding("packages", "failure", f"{package} is not installed", "make setup")
    yield Finding("packages", "ok", ", ".join(found))


def _check_stubs() -> Iterator[Finding]:
    """Generated stubs refuse to load with an older protobuf or gRPC than they were made for."""
    try:
        from experts.v1 import experts_pb2
        from router.v1 import router_pb2_grpc
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        yield Finding("stubs", "failure", f"the generated protobuf code does not load: {reason}", "make setup")
        return
    yield Finding("stubs", "ok", f"{experts_pb2.DESCRIPTOR.package}, {router_pb2_grpc.__name__.rpartition('.')[0]}")


def _check_cpu() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    flags = _read_cpu_flags()
    if flags is None:
        yield Finding("cpu", "ok", f"{cores} cores, {platform.machine()}")
        return
    fast = [name for flag, name in _FAST_CPU_FLAGS if flag in flags]
    if fast:
        yield Finding("cpu", "ok", f"{cores} cores with {fast[0]}")
    elif _MIN_CPU_FLAG in flags:
        yield Finding("cpu", "warning", f"{cores} cores with AVX2 only", "bfloat16 is emulated: try --dtype float32")
    else:
        yield Finding("cpu", "warning", f"{cores} cores without AVX2", "it works, slowly: use --dtype float32")
    if cores < 2:
        yield Finding("cpu", "warning", "a single core", "router and expert groups take turns: give it at least 2")


def _read_cpu_flags() -> frozenset[str] | None:
    """None where this system does not tell, or is no x86."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)


def _check_accelerator() -> Iterator[Finding]:
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        yield Finding("gpu", "warning", "an NVIDIA driver is here, but Shoal computes on the CPU so far")
    else:
        yield Finding("gpu", "ok", "none needed: Shoal computes on the CPU")


def _check_compiler() -> Iterator[Finding]:
    """The CPU kernel comes prebuilt or is compiled when it is first needed."""
    compiler = find_compiler()
    if compiler is not None:
        yield Finding("compiler", "ok", compiler)
    elif (SOURCE_FOLDER / library_name()).is_file():
        yield Finding("compiler", "ok", "none needed: the CPU kernel is prebuilt")
    else:
        yield Finding(
            "compiler",
            "warning",
            "no g++: weights will be expanded to bf16, slower and in twice the memory, and not deterministic",
            "install g++ 11 or newer",
        )


def _check_open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        yield Finding("open files", "warning", f"limit {soft} (hard limit {hard})", f"ulimit -n {MIN_OPEN_FILES}")
    else:
        yield Finding("open files", "ok", f"limit {soft}")


def _check_shared_memory() -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("shared memory", "ok", "no /dev/shm here; Ray uses files")
        return
    free = shutil.disk_usage(folder).free
    if free < MIN_SHARED_MEMORY:
        remedy = "docker run --shm-size=256m, or an emptyDir with medium: Memory at /dev/shm"
        yield Finding("shared memory", "warning", f"only {free / 2**20:.0f} MiB free in /dev/shm", remedy)
    else:
        yield Finding("shared memory", "ok", f"{free / 2**30:.1f} GiB free in /dev/shm")


def _check_temp_folder() -> Iterator[Finding]:
    folder = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding("temporary files", "failure", f"{folder}: {error.strerror}", "create it, or set RAY_TMPDIR")
        return
    if not os.access(folder, os.W_OK):
        yield Finding("temporary files", "failure", f"{folder} is not writable", "set RAY_TMPDIR to a folder that is")
    elif free < MIN_TEMP_BYTES:
        message = f"{free / 2**30:.1f} GiB free in {folder}, where Ray keeps its logs"
        yield Finding("temporary files", "warning", message, "free some space, or set RAY_TMPDIR")
    else:
        yield Finding("temporary files", "ok", f"{free / 2**30:.0f} GiB free in {folder}")


def _check_environment() -> Iterator[Finding]:
    proxies = [name for name in ("http_proxy", "HTTP_PROXY", "grpc_proxy") if os.environ.get(name)]
    excluded = os.environ.get("no_proxy", "") + os.environ.get("NO_PROXY", "")
    if proxies and "127.0.0.1" not in excluded:
        message = f"{proxies[0]} is set and no_proxy does not name 127.0.0.1"
        yield Finding(
            "proxy", "warning", message, "export no_proxy=127.0.0.1,localhost: clients and gRPC may go astray"
        )


def _check_ports(settings: ServeSettings) -> Iterator[Finding]:
    for host, port, flag in (
        (settings.host, settings.port, "--port"),
        (settings.admin_host, settings.resolved_admin_port, "--admin-port"),
    ):
        try:
            check_port(host, port, flag)
        except ClusterError as error:
            yield Finding("ports", "failure", str(error), f"shoal serve {flag} N")
        else:
            yield Finding("ports", "ok", f"{host}:{port} is free")


def _check_checkpoint(settings: ServeSettings) -> Iterator[Finding]:
    try:
        folder, model_name = resolve_checkpoint(settings)
        report = check_headers(folder, settings.groups)
    except ClusterError as error:
        yield Finding("checkpoint", "failure", str(error), "shoal check CHECKPOINT says all that is wrong with it")
        return
    size = sum(part.stored_bytes for part in report.groups) + (report.trunk.stored_bytes if report.trunk else 0)
    message = (
        f"{model_name}: {report.model_type}, {report.num_parameters / 1e6:,.1f} M parameters, {size / 1e6:,.1f} MB"
    )
    yield Finding("checkpoint", "ok", message)
    need = measure_memory(settings, report)
    if need.is_met:
        yield Finding("memory", "ok", str(need))
    else:
        free = psutil.virtual_memory().total / 1e9
        remedy = f"this machine has {free:.0f} GB: end other programs, or join more machines with --address"
        yield Finding("memory", "failure", str(need), remedy)
