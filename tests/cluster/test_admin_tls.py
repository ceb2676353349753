"""The admin API where the cluster has certificates: real servers and clients on real sockets."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from cluster.admin_app import create_admin_app, hash_token
from cluster.admin_client import AdminClient
from cluster.admin_source import AdminSource
from cluster.admin_tls import list_client_options, list_server_options
from cluster.certificates import issue_certificate
from cluster.controller_app import ControllerApp
from cluster.errors import RequestFailed
from cluster.records import CONTROLLER_KEY, ControllerRecord
from experts.errors import ConfigError
from tests.certificate_folders import CertificateFolders, make_folders
from tests.cluster.fakes import MemoryStore
from tests.cluster.test_admin_app import TOKEN, FakeController
from tests.free_ports import find_free_ports
from tests.ray.serve_process import wait_for


@pytest.fixture
def folders(tmp_path: Path) -> CertificateFolders:
    return make_folders(tmp_path)


@contextmanager
def serving(app: ASGIApp, tls_dir: Path) -> Iterator[str]:
    """host:port."""
    port = find_free_ports(1)[0]
    options = list_server_options(str(tls_dir))
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started, 20)
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def make_admin() -> ASGIApp:
    return create_admin_app(FakeController(), hash_token(TOKEN))


def test_clients_with_the_clusters_ca_and_the_token_are_answered_and_a_renewal_is_not_noticed(
    folders: CertificateFolders,
):
    with serving(make_admin(), folders.good) as address:
        for _ in range(2):
            client = AdminClient(f"https://{address}", TOKEN, str(folders.good))
            assert client.fetch_status() == {"ready": True}
            client.close()
            issue_certificate(folders.ca, folders.good)
        client = AdminClient(f"https://{address}", "another token", str(folders.good))
        with pytest.raises(RequestFailed, match="401"):
            client.fetch_status()
        client.close()


def test_a_server_of_another_ca_gets_no_token(folders: CertificateFolders):
    with serving(make_admin(), folders.other) as address:
        client = AdminClient(f"https://{address}", TOKEN, str(folders.good))
        with pytest.raises(RequestFailed, match="CERTIFICATE_VERIFY_FAILED"):
            client.fetch_status()
        client.close()


def test_plain_text_gets_no_answer(folders: CertificateFolders):
    with serving(make_admin(), folders.good) as address, pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{address}/status", timeout=10, trust_env=False)


def test_a_standby_forwards_to_the_leader_by_tls(folders: CertificateFolders):
    leader = ControllerApp(lambda: True, lambda: True, lambda: None, str(folders.good))
    leader.admin = make_admin()
    with serving(leader, folders.good) as leader_address:
        standby = ControllerApp(lambda: True, lambda: True, lambda: leader_address, str(folders.good))
        with serving(standby, folders.good) as address:
            client = AdminClient(f"https://{address}", TOKEN, str(folders.good))
            assert client.fetch_status() == {"ready": True}
            client.close()


async def test_the_http_front_reads_it_and_follows_another_ca(folders: CertificateFolders):
    store = MemoryStore()
    with serving(make_admin(), folders.good) as address:
        record = ControllerRecord(pid=1, node="here", admin_url=f"https://{address}")
        store.put(CONTROLLER_KEY, record.to_json())
        wrong_ca = folders.good.parent / "other-ca" / "ca.crt"
        right_ca = (folders.good / "ca.crt").read_bytes()
        source = AdminSource(store, TOKEN, str(folders.good))
        try:
            assert await source.fetch_status() is not None
            (folders.good / "ca.crt").write_bytes(wrong_ca.read_bytes())
            assert await source.fetch_status() is None
            (folders.good / "ca.crt").write_bytes(right_ca)
            assert await source.fetch_status() is not None
        finally:
            await source.close()


def test_a_folder_without_a_ca_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"ca\.crt"):
        list_client_options(str(tmp_path))
