# SPDX-License-Identifier: MIT
"""Who is there: contexts from files, the handshake, and one clear line for each way in which it can fail.

As in stock criu both ends show certificates, and each trusts an authority. A client also wants the name that it was
told to be the certificate's (an address among its alternative names, or a host name, also as its common name). Stock's
server compares a client's name with the server's own address, if it was given one; here a server takes any name that
its authority has signed.

Stock shakes hands first and looks at the certificate then: a peer that it does not trust sees it hang up, without a
word, after a handshake that went well. In TLS 1.3 a client hears of a refusal only when it reads: that is Tunnel's.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from pathlib import Path

from lazyd.enums import Enum
from lazyd.errors import TlsError
from lazyd.hints import NoReturn
from lazyd.tls.pump import Runs, Session, Tunnel, explain_alert
from lazyd.tls.revocation import Identity, certificate_identity, read_revoked
from lazyd.tls.settings import (
    DEFAULT_AUTHORITY,
    DEFAULT_CERTIFICATE,
    DEFAULT_KEY,
    DEFAULT_REVOKED,
    Files,
)

HANDSHAKE_S = 15.0
_RECEIVE_BYTES = 1 << 16

# X509_verify_cert_error_string(3): the codes that a user can do something about.
_VERIFY_REASONS = {
    9: "is not valid yet: is the clock right?",
    10: "has expired",
    18: "is signed by itself, and not one that is trusted here",
    19: "is of an authority that is not trusted here",
    20: "is of an authority that is not trusted here",
    21: "is of an authority that is not trusted here",
    26: "is not for this use (extended key usage)",
    62: "is for another name",
    64: "is for another address",
}


class Side(Enum):
    """Which end of a connection this is."""

    CLIENT = "server"
    SERVER = "client"

    @property
    def peer(self) -> str:
        """What the other end is."""
        return self.value


def _check_readable(path: Path, what: str, option: str) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TlsError(path, f"{what} cannot be read: {reason} ({option} names another)") from error


class Endpoint:
    """What this end shows and trusts. It may open any number of tunnels, from any thread."""

    def __init__(self, files: Files, side: Side) -> None:
        """Read all files; TlsError says which of them is of no use."""
        self.side = side
        self._certificate = files.certificate or DEFAULT_CERTIFICATE
        self._verifies_name = files.verifies_name and side is Side.CLIENT
        is_client = side is Side.CLIENT
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_client else ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Python before 3.11.4, as Debian 12 has it, asks OpenSSL to take a link that was cut for one that was closed.
        context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        context.check_hostname = self._verifies_name
        context.verify_mode = ssl.CERT_REQUIRED
        # As in GnuTLS, whatever certificate is named as trusted is: it need not be signed by itself.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if not is_client:
            context.num_tickets = 0  # nobody here resumes a session
        self._load_authorities(context, files)
        self._load_certificate(context, files)
        self._context = context
        self._revoked: frozenset[Identity] = frozenset()
        if files.revoked is not None or DEFAULT_REVOKED.exists():
            self._revoked = read_revoked(files.revoked or DEFAULT_REVOKED)

    @staticmethod
    def _load_authorities(context: ssl.SSLContext, files: Files) -> None:
        path = files.authority
        if path is None:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
            if not DEFAULT_AUTHORITY.exists():
                return
            path = DEFAULT_AUTHORITY
        _check_readable(path, "the authority's certificate", "--tls-cacert")
        try:
            context.load_verify_locations(path)
        except ssl.SSLError as error:
            raise TlsError(path, "the authority's certificate is no certificate in PEM form") from error

    def _load_certificate(self, context: ssl.SSLContext, files: Files) -> None:
        key = files.key or DEFAULT_KEY
        _check_readable(self._certificate, "the certificate to show", "--tls-cert")
        _check_readable(key, "the key of the certificate", "--tls-key")

        def refuse_password() -> NoReturn:
            raise TlsError(key, "the key is encrypted: there is nobody to ask for its password")

        try:
            context.load_cert_chain(self._certificate, key, refuse_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise TlsError(key, f"is not the key of the certificate {self._certificate}") from error
            is_certificate = b"-----BEGIN CERTIFICATE-----" in self._certificate.read_bytes()
            what = error.reason or str(error)
            if not is_certificate:
                raise TlsError(self._certificate, f"the certificate to show is not in PEM form ({what})") from error
            raise TlsError(key, f"is no key that TLS can use with {self._certificate} ({what})") from error

    def open(
        self,
        connection: socket.socket,
        address: str,
        *,
        peer: str = "",
        runs: Runs = Runs.IN_PROCESS,
        timeout_s: float = HANDSHAKE_S,
    ) -> Tunnel:
        """Shake hands, and have somebody move bytes from there on. The connection is the tunnel's, also if this fails.

        `address` is what the client was told, which is held against the server's certificate; `peer` names the other
        end in errors (the address if nothing is said).
        """
        where = peer or address
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            tls = self._context.wrap_bio(
                incoming,
                outgoing,
                server_side=self.side is Side.SERVER,
                server_hostname=address if self._verifies_name else None,
            )
            is_client = self.side is Side.CLIENT
            session = Session(connection, tls, incoming, outgoing, where, self._certificate, is_client)
            self._shake_hands(session, timeout_s)
            self._check_not_revoked(session)
            return Tunnel(session, runs)
        finally:
            connection.close()

    def _shake_hands(self, session: Session, timeout_s: float) -> None:
        connection = session.wire
        end = time.monotonic() + timeout_s
        has_heard = False
        while True:
            try:
                try:
                    session.tls.do_handshake()
                    is_done = True
                except ssl.SSLWantReadError:
                    is_done = False
                finally:
                    # Also an alert, which tells the other end why.
                    connection.settimeout(max(0.01, end - time.monotonic()))
                    connection.sendall(session.outgoing.read())
                if is_done:
                    return
                content = connection.recv(_RECEIVE_BYTES)
                if content:
                    has_heard = True
                    session.incoming.write(content)
                else:
                    session.incoming.write_eof()
            except TimeoutError as error:
                does = "stopped in the middle of" if has_heard else "does not answer"
                reason = f"{does} the TLS handshake for {timeout_s:g} s: does it speak TLS?"
                raise TlsError(session.peer, reason) from error
            except ssl.SSLError as error:
                raise TlsError(session.peer, self._explain(error, has_heard=has_heard)) from error
            except OSError as error:
                reason = (error.strerror or os.strerror(error.errno or 0)).lower()
                raise TlsError(session.peer, f"the TLS handshake broke off: {reason}; does it speak TLS?") from error

    def _explain(self, error: ssl.SSLError, *, has_heard: bool) -> str:
        """Return one line about a handshake that failed."""
        peer = self.side.peer
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = _VERIFY_REASONS.get(error.verify_code, f"is not trusted: {error.verify_message}")
            hint = ""
            if error.verify_code in (62, 64):
                hint = f" ({_plain(error.verify_message)}; --tls-no-cn-verify takes any)"
            return f"the {peer}'s certificate {reason}{hint}"
        if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return f"the {peer} shows no certificate (--tls-cert and --tls-key name one)"
        if isinstance(error, ssl.SSLEOFError) or error.reason == "UNEXPECTED_EOF_WHILE_READING":
            if has_heard:
                return f"the {peer} hung up in the TLS handshake; its log may say why"
            return f"the {peer} hung up instead of the TLS handshake: does it speak TLS?"
        if alert := explain_alert(error, self._certificate):
            return alert
        if error.reason in _NO_TLS:
            return f"the {peer} speaks no TLS: it is to be started with --tls too"
        return f"the TLS handshake failed: {(error.reason or str(error)).lower().replace('_', ' ')}"

    def _check_not_revoked(self, session: Session) -> None:
        if not self._revoked:
            return
        for certificate in _chain(session.tls):
            identity = certificate_identity(certificate)
            if identity in self._revoked:
                number = int.from_bytes(identity.serial, "big")
                raise TlsError(session.peer, f"the {self.side.peer}'s certificate is revoked (number {number:x})")


_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"}


def _plain(message: str) -> str:
    """Return what OpenSSL says of a name, without its full stop."""
    return message.rstrip(".").replace("Hostname mismatch, ", "").replace("IP address mismatch, ", "")


def _chain(tls: ssl.SSLObject) -> list[bytes]:
    """Return the peer's verified certificates, its own first."""
    inner = getattr(tls, "_sslobj")  # noqa: B009  get_verified_chain is public from Python 3.13 on
    return [certificate.public_bytes(ssl._ssl.ENCODING_DER) for certificate in inner.get_verified_chain()]  # type: ignore[attr-defined]
