"""A stack whose processes have certificates: who may come in, and renewal while it serves."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography import x509

from cluster.certificates import issue_certificate
from experts.__main__ import main as experts_main
from experts.http2_stream import make_client_opening
from experts.v1 import experts_pb2, experts_pb2_grpc
from experts.wire import COMPUTE_METHOD
from router.__main__ import main as router_main
from router.v1 import router_pb2, router_pb2_grpc
from tests.certificate_folders import CertificateFolders, make_folders
from tests.integration.router_client import generate
from tests.local_stack import (
    HOST,
    START_TIMEOUT_S,
    LocalStack,
    ManagedProcess,
    StackOptions,
    local_stack,
    secure_channel,
    wait_until,
)

TIMEOUT_S = 20.0
PROMPT = list(range(20, 60))
NUM_TOKENS = 24
NUM_RENEWALS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> CertificateFolders:
    return make_folders(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def encrypted(
    checkpoint: Path, folders: CertificateFolders, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalStack]:
    options = StackOptions(num_groups=2, tls_dir=folders.good, expert_wait_s=START_TIMEOUT_S)
    with local_stack(checkpoint, tmp_path_factory.mktemp("encrypted"), options) as running:
        yield running


def test_encryption_changes_no_bit_of_an_answer(stack: LocalStack, encrypted: LocalStack) -> None:
    with stack.router_channel() as plain, encrypted.router_channel() as secret:
        assert generate(secret, PROMPT, NUM_TOKENS) == generate(plain, PROMPT, NUM_TOKENS)


@pytest.mark.parametrize("kind", ["none", "expired", "other"])
def test_a_client_without_a_good_certificate_is_refused(
    encrypted: LocalStack, folders: CertificateFolders, kind: str
) -> None:
    for endpoint in (encrypted.router_endpoint, f"{HOST}:{encrypted.expert_ports[0]}"):
        if kind == "none":
            credentials = grpc.ssl_channel_credentials((folders.good / "ca.crt").read_bytes())
            options = [("grpc.ssl_target_name_override", "shoal"), ("grpc.use_local_subchannel_pool", 1)]
            channel = grpc.secure_channel(endpoint, credentials, options=options)
        else:
            channel = secure_channel(endpoint, getattr(folders, kind))
        with channel, pytest.raises(grpc.RpcError) as refused:
            _call(endpoint, channel, encrypted)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    # And nobody else is any worse off.
    assert encrypted.status().ready


def _call(endpoint: str, channel: grpc.Channel, stack: LocalStack) -> None:
    if endpoint == stack.router_endpoint:
        router_pb2_grpc.RouterServiceStub(channel).Status(router_pb2.StatusRequest(), timeout=TIMEOUT_S)
    else:
        experts_pb2_grpc.ExpertServiceStub(channel).Describe(experts_pb2.DescribeRequest(), timeout=TIMEOUT_S)


@pytest.mark.parametrize("kind", ["none", "expired", "other"])
def test_a_stream_of_activations_without_a_good_certificate_is_refused(
    encrypted: LocalStack, folders: CertificateFolders, kind: str
) -> None:
    context = ssl.create_default_context(cafile=folders.good / "ca.crt")
    if kind != "none":
        folder: Path = getattr(folders, kind)
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    with socket.create_connection((HOST, encrypted.expert_ports[0]), timeout=TIMEOUT_S) as connection:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            with context.wrap_socket(connection, server_hostname="shoal") as stream:
                stream.sendall(make_client_opening(COMPUTE_METHOD))
                while stream.recv(1024):
                    pass


def test_plain_text_gets_no_answer(encrypted: LocalStack) -> None:
    for port in (encrypted.expert_ports[0], int(encrypted.router_endpoint.rpartition(":")[2])):
        with grpc.insecure_channel(f"{HOST}:{port}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            for call in (
                lambda: router_pb2_grpc.RouterServiceStub(channel).Status(
                    router_pb2.StatusRequest(), timeout=TIMEOUT_S
                ),
                lambda: experts_pb2_grpc.ExpertServiceStub(channel).Describe(
                    experts_pb2.DescribeRequest(), timeout=TIMEOUT_S
                ),
            ):
                with pytest.raises(grpc.RpcError):
                    call()


def test_a_server_of_another_ca_is_none_of_the_cluster(encrypted: LocalStack, tmp_path: Path) -> None:
    strangers = make_folders(tmp_path)
    with secure_channel(encrypted.router_endpoint, strangers.good) as channel, pytest.raises(grpc.RpcError):
        _call(encrypted.router_endpoint, channel, encrypted)


def test_renewal_under_load_loses_nothing(encrypted: LocalStack, folders: CertificateFolders) -> None:
    """Requests run through front, router and experts, while the certificate is renewed several times and an expert
    group is lost and comes back, so that every kind of connection is made again with another certificate."""
    with encrypted.router_channel() as channel:
        undisturbed = generate(channel, PROMPT, NUM_TOKENS)
    stop = threading.Event()
    outcomes: list[object] = []

    def load(through_front: bool) -> None:
        with encrypted.router_channel() as channel, encrypted.client(timeout_s=120.0) as client:
            while not stop.is_set():
                if through_front:
                    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
                    outcomes.append(client.post("/v1/completions", json=body).status_code)
                else:
                    outcomes.append(generate(channel, PROMPT, NUM_TOKENS))

    threads = [threading.Thread(target=load, args=(front,)) for front in (True, True, False, False)]
    for thread in threads:
        thread.start()
    try:
        serials: set[int] = set()
        for index in range(NUM_RENEWALS):
            issue_certificate(folders.ca, folders.good)
            if index == 1:
                encrypted.experts[0].kill()
                encrypted.restart_expert(0).wait_ready(time.monotonic() + START_TIMEOUT_S)
            done = len(outcomes)
            wait_until(
                lambda done=done: len(outcomes) >= done + 2 * len(threads),
                time.monotonic() + START_TIMEOUT_S,
                lambda: encrypted.describe_failure(),
            )
            serials.add(_read_serial(encrypted.expert_ports[1], folders))
            serials.add(_read_serial(int(encrypted.router_endpoint.rpartition(":")[2]), folders))
    finally:
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT_S * 4)
    assert not any(thread.is_alive() for thread in threads)
    assert len(outcomes) > 2 * NUM_RENEWALS
    assert all(outcome in (200, undisturbed) for outcome in outcomes)
    # Both servers showed every one of them without a restart.
    assert len(serials) == NUM_RENEWALS


def _read_serial(port: int, folders: CertificateFolders) -> int:
    """Of the certificate that a server shows now."""
    context = ssl.create_default_context(cafile=folders.good / "ca.crt")
    context.load_cert_chain(folders.good / "tls.crt", folders.good / "tls.key")
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((HOST, port), timeout=TIMEOUT_S) as connection:
        with context.wrap_socket(connection, server_hostname="shoal") as stream:
            shown = stream.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def _read_api_serial(url: str, context: ssl.SSLContext) -> int:
    host, port = url.removeprefix("https://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        with context.wrap_socket(connection, server_hostname=host) as stream:
            shown = stream.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def test_plain_text_for_other_machines_has_to_be_allowed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main in (experts_main, router_main):
        assert main(["--checkpoint", str(checkpoint), "--host", "0.0.0.0"]) == 1
        assert "--insecure-cluster-network" in capsys.readouterr().err


def test_the_api_speaks_tls_when_it_has_a_certificate(
    encrypted: LocalStack, folders: CertificateFolders, tmp_path: Path
) -> None:
    issue_certificate(folders.ca, tmp_path / "api", names=("localhost",))
    arguments = ["router.api", "--checkpoint", str(encrypted.checkpoint), "--router", encrypted.router_endpoint]
    arguments += ["--tls-dir", str(folders.good)]
    arguments += ["--tls-cert", str(tmp_path / "api" / "tls.crt"), "--tls-key", str(tmp_path / "api" / "tls.key")]
    process = ManagedProcess("https-api", arguments, tmp_path)
    try:
        url = process.wait_ready(time.monotonic() + START_TIMEOUT_S)["url"].replace(HOST, "localhost")
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=folders.good / "ca.crt")
        with httpx.Client(base_url=url, verify=context, timeout=TIMEOUT_S * 3, trust_env=False) as client:
            body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
            assert client.post("/v1/completions", json=body).status_code == 200
            before = _read_api_serial(url, context)
            issue_certificate(folders.ca, tmp_path / "api", names=("localhost",))
            assert _read_api_serial(url, context) != before
            # The connection that was open is still good.
            assert client.get("/health/live").status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health/live", timeout=TIMEOUT_S, trust_env=False)
    finally:
        process.stop()
