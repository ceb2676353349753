"""A private CA for those without cert-manager, and certificates of it: what `shoal certs` writes."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.errors import ChangeRefused
from experts.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, PEER_NAME

CA_KEY_FILE = "ca.key"
CA_DAYS = 3650
# Clocks of other machines may be behind.
_BACKDATED = timedelta(minutes=5)


def make_ca(folder: Path, name: str = "shoal-ca", days: int = CA_DAYS) -> None:
    """Write ca.crt and ca.key. Raises ChangeRefused if there is a CA already: what it signed would lose its worth."""
    for file in (CA_FILE, CA_KEY_FILE):
        if (folder / file).exists():
            raise ChangeRefused(f"{folder / file} is there already: choose another folder, or remove it")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _begin(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(folder / CA_KEY_FILE, _key_pem(key), secret=True)
    _write(folder / CA_FILE, certificate.public_bytes(serialization.Encoding.PEM))


def issue_certificate(ca_folder: Path, folder: Path, names: tuple[str, ...] = (), days: int = 90) -> datetime:
    """Write tls.crt, tls.key and ca.crt of a new certificate, for PEER_NAME and further names; returns when it expires.

    A running cluster that has the folder takes it up by itself. Raises ChangeRefused if there is no CA.
    """
    try:
        ca_pem = (ca_folder / CA_FILE).read_bytes()
        ca = x509.load_pem_x509_certificate(ca_pem)
        ca_key = serialization.load_pem_private_key((ca_folder / CA_KEY_FILE).read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ChangeRefused(f"no CA in {ca_folder}: {error} (make one with `shoal certs init {ca_folder}`)") from error
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ChangeRefused(f"{ca_folder / CA_KEY_FILE} is no elliptic curve key: make a CA with `shoal certs init`")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, PEER_NAME)])
    certificate = (
        _begin(subject, ca.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name) for name in dict.fromkeys((PEER_NAME, *names))]),
            critical=False,
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A reader that comes in between finds a key that does not fit, keeps what it has and looks again.
    _write(folder / KEY_FILE, _key_pem(key), secret=True)
    _write(folder / CERTIFICATE_FILE, certificate.public_bytes(serialization.Encoding.PEM))
    _write(folder / CA_FILE, ca_pem)
    return certificate.not_valid_after_utc


def _begin(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, *, secret: bool = False) -> None:
    """The file appears whole, and a secret one is nobody else's from the first byte."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
