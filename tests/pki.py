# SPDX-License-Identifier: MIT
"""Certificates for tests: an authority, what it signs, and what it revokes. All of it in PEM files in one folder."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass
class Credentials:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path
    serial: int

    def options(self, authority: Authority | Path | None, revoked: Path | None = None) -> list[str]:
        """Return the options of criu and lazyd that name them, with the authority that is trusted."""
        words = ["--tls", "--tls-cert", str(self.certificate), "--tls-key", str(self.key)]
        if authority is not None:
            words += ["--tls-cacert", str(authority if isinstance(authority, Path) else authority.certificate)]
        if revoked is not None:
            words += ["--tls-cacrl", str(revoked)]
        return words


class Authority:
    """An authority with its files in a folder."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.certificate = folder / f"{name}.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self._public = (
            self._builder(self._name, self._key, NOW - DAY, NOW + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(*[False] * 5, True, True, False, False), critical=True)  # noqa: FBT003
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate.write_bytes(self._public.public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, start, end) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )

    def sign(
        self, name: str, alternatives: tuple[str, ...] = ("127.0.0.1",), *, days: tuple[int, int] = (-1, 30)
    ) -> Credentials:
        """Make a key and a certificate for a common name, and for addresses or host names; valid between two days."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_name(name), key, NOW + days[0] * DAY, NOW + days[1] * DAY)
        issuer_key = self._public.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False
        ).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_alternative(word) for word in alternatives]), critical=False
            )
        public = builder.sign(self._key, hashes.SHA256())
        file_name = name.replace("/", "_").replace(" ", "_")
        found = Credentials(self.folder / f"{file_name}.pem", self.folder / f"{file_name}.key", public.serial_number)
        found.certificate.write_bytes(public.public_bytes(serialization.Encoding.PEM))
        found.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return found

    def revoke(self, *revoked: Credentials, days: tuple[int, int] = (-1, 30)) -> Path:
        """Write a list of what is revoked; valid between two days."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(NOW + days[0] * DAY)
            .next_update(NOW + days[1] * DAY)
        )
        for one in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(one.serial).revocation_date(NOW - DAY / 2).build()
            builder = builder.add_revoked_certificate(entry)
        path = self.folder / f"revoked-{len(revoked)}-{days[1]}.pem"
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path


def _alternative(word: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(word))
    except ValueError:
        return x509.DNSName(word)
