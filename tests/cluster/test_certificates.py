"""`shoal certs`: a private CA and certificates of it, as openssl and the cluster's own check see them."""

from __future__ import annotations

import shutil
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cluster.certificates import issue_certificate, make_ca
from cluster.cli import main
from cluster.errors import ChangeRefused
from experts.tls import ClusterTls


def test_the_cluster_takes_what_certs_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ca, folder = tmp_path / "ca", tmp_path / "tls"
    assert main(["certs", "init", str(ca)]) == 0
    assert main(["certs", "issue", str(ca), str(folder), "--days", "30"]) == 0
    assert str(folder) in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"tls.crt", "tls.key", "ca.crt"}
    assert ClusterTls(folder).version == 1


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    make_ca(tmp_path / "ca")
    issue_certificate(tmp_path / "ca", tmp_path / "tls")
    for key in (tmp_path / "ca" / "ca.key", tmp_path / "tls" / "tls.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to judge")
def test_openssl_finds_the_chain_sound(tmp_path: Path) -> None:
    make_ca(tmp_path / "ca")
    issue_certificate(tmp_path / "ca", tmp_path / "tls", names=("shoal.example",))
    for purpose in ("sslserver", "sslclient"):
        checks = ["-x509_strict", "-purpose", purpose, "-verify_hostname", "shoal.example"]
        files = ["-CAfile", str(tmp_path / "ca" / "ca.crt"), str(tmp_path / "tls" / "tls.crt")]
        done = subprocess.run(
            ["openssl", "verify", *checks, *files], capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_certificate_lasts_as_long_as_was_said(tmp_path: Path) -> None:
    make_ca(tmp_path / "ca")
    expires_at = issue_certificate(tmp_path / "ca", tmp_path / "tls", days=30)
    assert abs(expires_at - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=1)


def test_a_ca_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_ca(tmp_path / "ca")
    before = (tmp_path / "ca" / "ca.key").read_bytes()
    assert main(["certs", "init", str(tmp_path / "ca")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "ca" / "ca.key").read_bytes() == before


def test_without_a_ca_nothing_is_issued(tmp_path: Path) -> None:
    with pytest.raises(ChangeRefused, match="shoal certs init"):
        issue_certificate(tmp_path, tmp_path / "tls")
    assert not (tmp_path / "tls").exists()
    assert main(["certs", "issue", str(tmp_path), str(tmp_path / "tls"), "--days", "0"]) == 2
