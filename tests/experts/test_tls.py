"""The cluster's certificates: what is refused at start, and renewal while running."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from cluster.certificates import issue_certificate
from experts.errors import ConfigError
from experts.tls import ClusterTls, check_listen_address, is_loopback, load_cluster_tls
from tests.certificate_folders import CertificateFolders, make_folders


@pytest.fixture
def folders(tmp_path: Path) -> CertificateFolders:
    return make_folders(tmp_path)


def serial_of(tls: ClusterTls) -> int:
    return x509.load_pem_x509_certificate(tls.files.certificate).serial_number


def test_a_renewed_certificate_is_used_without_a_restart(folders: CertificateFolders) -> None:
    tls = ClusterTls(folders.good)
    before, context = serial_of(tls), tls.server_context
    assert tls.version == 1
    issue_certificate(folders.ca, folders.good)
    assert tls.version == 2
    assert serial_of(tls) != before
    assert tls.server_context is not context
    assert tls.server_context is tls.server_context


def test_the_swapped_link_of_a_mounted_secret_is_a_renewal(folders: CertificateFolders, tmp_path: Path) -> None:
    """The kubelet writes a new folder and swaps the link `..data` to it."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    (mounted / "..data").symlink_to(folders.good)
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (mounted / name).symlink_to(f"..data/{name}")
    tls = ClusterTls(mounted)
    before = serial_of(tls)
    issue_certificate(folders.ca, tmp_path / "next")
    (mounted / "..data_tmp").symlink_to(tmp_path / "next")
    (mounted / "..data_tmp").rename(mounted / "..data")
    assert serial_of(tls) != before


@pytest.mark.parametrize("file", ["tls.crt", "tls.key", "ca.crt"])
@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nMII"])
def test_half_a_renewal_changes_nothing(folders: CertificateFolders, file: str, content: bytes | None) -> None:
    tls = ClusterTls(folders.good)
    before = serial_of(tls)
    if content is None:
        (folders.good / file).unlink()
    else:
        (folders.good / file).write_bytes(content)
    assert serial_of(tls) == before
    assert tls.version == 1


def test_the_key_of_another_renewal_is_noticed(folders: CertificateFolders, tmp_path: Path) -> None:
    issue_certificate(folders.ca, tmp_path / "next")
    (tmp_path / "next" / "tls.key").replace(folders.good / "tls.key")
    with pytest.raises(ConfigError, match="not the key of"):
        ClusterTls(folders.good)


def test_an_expired_certificate_is_refused_at_start(folders: CertificateFolders) -> None:
    with pytest.raises(ConfigError, match=r"expired at .*: renew it"):
        ClusterTls(folders.expired)


def test_a_folder_without_certificates_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls\.crt: No such file.*tls\.crt, tls\.key, ca\.crt"):
        ClusterTls(tmp_path)


def test_a_certificate_without_the_clusters_name_is_refused(folders: CertificateFolders) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shoal")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("database.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folders.good / "tls.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folders.good / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ConfigError, match="not for the name 'shoal'"):
        ClusterTls(folders.good)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.7", "::", "node-7.example"])
def test_plain_text_is_refused_where_others_can_read_it(host: str, folders: CertificateFolders) -> None:
    with pytest.raises(ConfigError, match="--insecure-cluster-network"):
        check_listen_address(host, None, allow_insecure=False)
    check_listen_address(host, None, allow_insecure=True)
    check_listen_address(host, ClusterTls(folders.good), allow_insecure=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_certificate(host: str) -> None:
    assert is_loopback(host)
    check_listen_address(host, load_cluster_tls(None), allow_insecure=False)
