# SPDX-License-Identifier: MIT
"""What a user says of TLS: the options of criu(8), by name, meaning and default."""

from __future__ import annotations

import argparse
from pathlib import Path

from lazyd.tuples import NamedTuple

DEFAULT_AUTHORITY = Path("/etc/pki/CA/cacert.pem")
DEFAULT_REVOKED = Path("/etc/pki/CA/cacrl.pem")
DEFAULT_CERTIFICATE = Path("/etc/pki/criu/cert.pem")
DEFAULT_KEY = Path("/etc/pki/criu/private/key.pem")


class Files(NamedTuple):
    """Where certificates and keys are; None: criu's default."""

    authority: Path | None = None
    """Only this one is trusted. None: what the system trusts, and the default file if it is there."""
    revoked: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    verifies_name: bool = True
    """A client only talks to a server whose certificate is for the address that it was told."""


def add_options(parser: argparse._ActionsContainer) -> None:
    """Add criu's options to a command line."""
    parser.add_argument("--tls", action="store_true", help="by TLS; both ends show certificates")
    for name, text in (
        ("--tls-cacert", f"trust this authority alone (the system's, and {DEFAULT_AUTHORITY})"),
        ("--tls-cacrl", f"what is revoked ({DEFAULT_REVOKED}, if it is there)"),
        ("--tls-cert", f"the certificate to show ({DEFAULT_CERTIFICATE})"),
        ("--tls-key", f"its key ({DEFAULT_KEY})"),
    ):
        parser.add_argument(name, metavar="FILE", type=Path, help=text)
    parser.add_argument("--tls-no-cn-verify", action="store_true", help="whatever name the server's certificate has")


def files_of(given: argparse.Namespace) -> Files | None:
    """Return what a command line says; None without --tls: files alone mean nothing, as in a configuration file."""
    if not given.tls:
        return None
    return Files(
        given.tls_cacert,
        given.tls_cacrl,
        given.tls_cert,
        given.tls_key,
        verifies_name=not given.tls_no_cn_verify,
    )
