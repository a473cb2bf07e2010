"""Certificates for tests: an authority, a server on this machine, clients, and an impostor.

Made anew each time, valid for a day, always in a temporary folder.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files in PEM."""

    cert: Path
    key: Path


class Certificates:
    """An authority and its certificates.

    Attributes:
        ca: the authority's certificate.
        server: for localhost and the loopback addresses.
        elsewhere: signed by it, but for another host.
        stranger: for localhost, but signed by an unknown authority.
        alice: the client certificate of alice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        key, certificate = _make("Test CA", None)
        self.ca = self._write("ca", key, certificate).cert
        issuer = certificate.subject, key
        self.server = self._write("server", *_make("localhost", issuer, local=True))
        self.elsewhere = self._write("elsewhere", *_make("db.invalid", issuer))
        self.alice = self._write("alice", *_make("alice", issuer))
        self.stranger = self._write("stranger", *_make("localhost", None, local=True))

    def _write(
        self, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
    ) -> Pair:
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        pair.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.key.touch(mode=0o600)
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return pair


def _make(
    name: str, issuer: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None, *, local: bool = False
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer_name, issuer_key = issuer or (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    addresses = [ipaddress.ip_address(text) for text in ("127.0.0.1", "::1")] if local else []
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name), *map(x509.IPAddress, addresses)]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    return key, builder.sign(issuer_key, hashes.SHA256())
