"""Certificates for benches and tests: an authority, and what it signs."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True, slots=True)
class Pair:
    """Files in PEM."""

    certificate: Path
    key: Path


class Authority:
    """Writes `<name>.pem` and `<name>.key` to a directory; `path` is its own certificate."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory, self.name = directory, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._sign(name, self._key, is_authority=True, days=1)
        self.path = directory / f"{name}.pem"
        self.path.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, days: int = 1, for_signing: bool = False) -> Pair:
        """A certificate for 127.0.0.1 and localhost; with negative `days` it has expired. `for_signing`: it may sign code."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, key, is_authority=False, days=days, for_signing=for_signing)
        pair = Pair(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        pair.key.write_bytes(key.private_bytes(*pem))
        return pair

    def _sign(
        self, name: str, key: ec.EllipticCurvePrivateKey, *, is_authority: bool, days: int, for_signing: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        start = now - datetime.timedelta(days=10)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        if for_signing:
            builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        return builder.sign(self._key, hashes.SHA256())
