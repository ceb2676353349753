"""`shoal serve` with certificates: the API over HTTPS through Ray Serve's proxy, the admin API with the cluster's own
certificate, and both renewed while they serve."""

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509

from cluster.certificates import issue_certificate, make_ca
from tests.ray.serve_process import ServeProcess

pytestmark = pytest.mark.timeout(180)
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_ca(folder / "ca")
    issue_certificate(folder / "ca", folder / "cluster")
    issue_certificate(folder / "ca", folder / "api", names=("localhost",))
    return folder


@pytest.fixture(scope="module")
def serve(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    arguments = ["--groups", "1", "--cluster-tls-dir", str(folder / "cluster")]
    arguments += ["--tls-cert", str(folder / "api" / "tls.crt"), "--tls-key", str(folder / "api" / "tls.key")]
    process = ServeProcess(tmp_path_factory.mktemp("serve"), *arguments)
    try:
        process.wait_ready()
        yield process
    finally:
        process.close()


@pytest.fixture(scope="module")
def context(folder: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=folder / "ca" / "ca.crt")


def _read_serial(url: str, context: ssl.SSLContext, name: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
        with context.wrap_socket(connection, server_hostname=name) as stream:
            shown = stream.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def test_both_apis_are_encrypted_and_renewed_under_a_stream(serve: ServeProcess, folder: Path, context: ssl.SSLContext):
    url = f"https://localhost:{urlsplit(serve.url).port}"
    body = {"prompt": "def read", "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}
    has_begun, lines = threading.Event(), list[str]()

    def stream() -> None:
        with (
            httpx.Client(verify=context, timeout=TIMEOUT_S, trust_env=False) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            assert response.status_code == 200
            for line in response.iter_lines():
                lines.append(line)
                has_begun.set()

    reader = threading.Thread(target=stream)
    reader.start()
    assert has_begun.wait(TIMEOUT_S)
    seen = [(_read_serial(url, context, "localhost"), _read_serial(serve.admin_url, context, "shoal"))]
    for _ in range(2):
        issue_certificate(folder / "ca", folder / "cluster")
        issue_certificate(folder / "ca", folder / "api", names=("localhost",))
        seen.append((_read_serial(url, context, "localhost"), _read_serial(serve.admin_url, context, "shoal")))
    reader.join(TIMEOUT_S)
    assert "data: [DONE]" in lines
    for serials in zip(*seen, strict=True):
        assert len(set(serials)) == 3


def test_commands_find_the_certificate_by_themselves_and_plain_text_is_not_answered(serve: ServeProcess):
    result = serve.run_command("status", "--url", serve.url, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["ready"] is True
    for url in (serve.url, serve.admin_url):
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/health/live", timeout=10, trust_env=False)


def test_the_status_page_sees_the_cluster_through_the_encrypted_admin_api(serve: ServeProcess, context: ssl.SSLContext):
    url = f"https://localhost:{urlsplit(serve.url).port}"
    response = httpx.get(f"{url}/ui/events", timeout=TIMEOUT_S, trust_env=False, verify=context)
    assert response.status_code == 200
    assert response.json()["events"]
