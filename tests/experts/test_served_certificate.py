"""A certificate that is renewed under a server that keeps its context."""

import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from cluster.certificates import issue_certificate, make_ca
from experts.errors import ConfigError
from experts.served_certificate import ServedCertificate

TIMEOUT_S = 10.0


class EchoServer:
    """Answers every connection in a thread of its own, until the client closes."""

    def __init__(self, folder: Path) -> None:
        self._context = ServedCertificate(folder / "tls.crt", folder / "tls.key").make_context()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, self._context.wrap_socket(connection, server_side=True) as stream:
            while data := stream.recv(100):
                stream.sendall(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_ca(tmp_path / "ca")
    issue_certificate(tmp_path / "ca", tmp_path / "tls")
    return tmp_path / "tls"


@pytest.fixture
def server(folder: Path) -> Iterator[EchoServer]:
    server = EchoServer(folder)
    yield server
    server.close()


def connect(server: EchoServer, folder: Path, name: str | None = "shoal") -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    context.check_hostname = name is not None
    return context.wrap_socket(socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S), server_hostname=name)


def read_serial(stream: ssl.SSLSocket) -> int:
    shown = stream.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


@pytest.mark.parametrize("name", ["shoal", None], ids=["named", "unnamed"])
def test_new_connections_see_a_renewed_certificate_and_open_ones_stay(
    server: EchoServer, folder: Path, name: str | None
):
    serials: set[int] = set()
    with connect(server, folder, name) as first:
        serials.add(read_serial(first))
        for _ in range(2):
            issue_certificate(folder.parent / "ca", folder)
            with connect(server, folder, name) as later:
                serials.add(read_serial(later))
        first.sendall(b"still here")
        assert first.recv(100) == b"still here"
    assert len(serials) == 3


def test_half_of_a_renewal_keeps_the_certificate_before(server: EchoServer, folder: Path):
    with connect(server, folder) as before:
        serial = read_serial(before)
    issue_certificate(folder.parent / "ca", folder.parent / "next")
    shutil.copy(folder.parent / "next" / "tls.crt", folder / "tls.crt")
    with connect(server, folder) as between:
        assert read_serial(between) == serial


def test_files_that_do_not_belong_together_are_named(folder: Path):
    issue_certificate(folder.parent / "ca", folder.parent / "next")
    with pytest.raises(ConfigError, match=r"tls\.crt.*cannot be used together"):
        ServedCertificate(folder / "tls.crt", folder.parent / "next" / "tls.key")
    with pytest.raises(ConfigError, match="No such file"):
        ServedCertificate(folder / "absent.crt", folder / "tls.key")
