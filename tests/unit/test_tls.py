# SPDX-License-Identifier: MIT
"""TLS tunnels: what goes in comes out, how they end, and what is said of certificates and peers that are no good.

Certificates come from the cryptography package. The other end is a tunnel too, or Python's ssl, or no TLS at all; in
tests/criu/test_tls_like_criu.py it is GnuTLS.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import random
import signal
import socket
import ssl
import threading
import time
from pathlib import Path

import pki
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from links import CuttingProxy, Plan, Way

from lazyd.errors import TlsError
from lazyd.tls.handshake import Endpoint, Side
from lazyd.tls.pump import Ending, How, Runs
from lazyd.tls.revocation import Identity, certificate_identity, read_revoked
from lazyd.tls.settings import Files
from lazyd.wire import Command, Flags, HeaderSize, Message, encode, image_id

HOST = "127.0.0.1"


class Papers:
    """An authority and what it has signed."""

    def __init__(self, folder: Path) -> None:
        self.authority = pki.Authority(folder)
        self.good = self.authority.sign("good")
        self.other = pki.Authority(folder, "other authority")
        text = self.authority.revoke(self.good, self.other.sign("one more")).read_text()
        self.revocations = base64.b64decode(text.split("-----")[2])


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    return Papers(tmp_path_factory.mktemp("pki"))


def files(papers, who=None, **changes) -> Files:
    who = who or papers.good
    made = Files(papers.authority.certificate, None, who.certificate, who.key)
    return made._replace(**changes)


def connected():
    """Return both ends of a TCP connection."""
    with socket.create_server((HOST, 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        return client, listening.accept()[0]


def shake(client_files, server_files, ends=None, runs=Runs.IN_THREAD):
    """Open both ends; return (client's tunnel or error, server's tunnel or error)."""
    ends = ends or connected()
    found = [None, None]

    def one(index, side, with_files, how):
        try:
            found[index] = Endpoint(with_files, side).open(ends[index], HOST, runs=how, timeout_s=20)
        except TlsError as error:
            found[index] = error

    # A process is forked with no other thread around.
    server = threading.Thread(target=one, args=(1, Side.SERVER, server_files, Runs.IN_THREAD))
    server.start()
    one(0, Side.CLIENT, client_files, runs)
    server.join()
    return found


@contextlib.contextmanager
def tunnels(papers, runs=Runs.IN_THREAD, ends=None):
    client, server = shake(files(papers), files(papers), ends, runs)
    try:
        yield client, server
    finally:
        closing = threading.Thread(target=client.close)
        closing.start()
        server.close()
        closing.join()


def receive(connection, length):
    """Return what comes, as much as is asked for or until it ends."""
    content = bytearray()
    while len(content) < length and (some := connection.recv(1 << 20)):
        content += some
    return bytes(content)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("runs", Runs)
def test_both_directions_at_once(papers, runs, version, monkeypatch):
    original = ssl.SSLContext.wrap_bio

    def wrap(context, *arguments, **options):
        context.maximum_version = version
        return original(context, *arguments, **options)

    monkeypatch.setattr(ssl.SSLContext, "wrap_bio", wrap)
    contents = [os.urandom(3 << 20) * 4 + b"an odd end", os.urandom(2 << 20) * 5]
    with tunnels(papers, runs) as both:
        assert {one.version for one in both} == {version.name.replace("_", ".")}
        got = [b"", b""]
        threads = [threading.Thread(target=one.plain.sendall, args=(contents[i],)) for i, one in enumerate(both)]

        def take(index):
            got[index] = receive(both[index].plain, len(contents[1 - index]))

        threads += [threading.Thread(target=take, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index in range(2):
            assert hashlib.sha256(got[index]).digest() == hashlib.sha256(contents[1 - index]).digest()
        assert [one.ending() for one in both] == [None, None]


@pytest.mark.parametrize("runs", Runs)
def test_one_end_ends_and_still_hears(papers, runs):
    """Half of a connection can be closed, as of a plain one."""
    with tunnels(papers, runs) as (client, server):
        client.plain.sendall(b"last")
        client.plain.shutdown(socket.SHUT_WR)
        assert receive(server.plain, 100) == b"last"
        assert server.ending() == Ending(How.CLOSED, "")
        content = os.urandom(5 << 20)
        sender = threading.Thread(target=server.plain.sendall, args=(content,))
        sender.start()
        assert receive(client.plain, len(content)) == content
        sender.join()
        assert client.ending() is None
        server.plain.close()
        assert client.plain.recv(1) == b""
        assert client.ending() == Ending(How.CLOSED, "")


def test_what_was_sent_before_closing_arrives(papers):
    for _ in range(5):
        with tunnels(papers) as (client, server):
            content = os.urandom(1 << 20)
            server.plain.sendall(b"what the client never reads")
            client.plain.sendall(content)
            client.plain.close()
            assert receive(server.plain, len(content) + 1) == content
            assert server.ending() == Ending(How.CLOSED, "")


@pytest.mark.parametrize("way", [Way.END, Way.RESET])
def test_a_broken_link_is_not_taken_for_an_end(papers, way):
    """Cut at any byte after the handshake: what has come is a beginning of what was sent, and that it broke is said."""
    chance = random.Random(7)
    content = os.urandom(200_000)
    with socket.create_server((HOST, 0)) as listening:
        target = listening.getsockname()
        with (
            CuttingProxy(target) as whole,
            socket.create_connection((HOST, whole.port)) as client,
            tunnels(papers, ends=(client, listening.accept()[0])),
        ):
            pass
        handshake = whole.connections[0].down  # and the few bytes that close TLS
        assert handshake > 1000
        for after in [handshake, handshake + 1, *(handshake + chance.randrange(200_000) for _ in range(10))]:
            with CuttingProxy(target, [Plan(after_down=after, way=way)]) as proxy:
                ends = socket.create_connection((HOST, proxy.port)), listening.accept()[0]
                with tunnels(papers, ends=ends) as (client, server):
                    with contextlib.suppress(OSError):
                        server.plain.sendall(content)
                    got = receive(client.plain, len(content))
                    assert got == content[: len(got)]
                    assert len(got) < len(content)
                    assert client.ending().how is How.BROKEN
                    assert client.ending().reason


@pytest.mark.parametrize("header", HeaderSize)
@pytest.mark.parametrize("sender", ["client", "server"])
def test_messages_are_cut_into_records_as_stock_cuts_them(papers, header, sender):
    """A header by itself, pages in records of 16 KiB but for the last: whatever pieces they are written in."""
    chance = random.Random(header)
    sizes, sent = [], b""
    for number in range(60):
        pages = chance.choice((1, 2, 3, 4, 5, 8, 100, 300))
        if sender == "client" and number % 7 == 0:
            message = Message(Command.OPEN2, destination=image_id(1, 100 + number))
        else:
            message = Message(Command.ADD_F, 0x7000_0000 + number * 0x1000, pages, image_id(1, 100), Flags.PRESENT)
        sizes.append(header)
        sent += encode(message, header) + os.urandom(message.data_bytes)
        whole, rest = divmod(message.data_bytes, 1 << 14)
        sizes += [1 << 14] * whole + [rest] * bool(rest)
    asked = encode(Message(Command.GET, 0x7000_0000, 1, 100), header)
    with socket.create_server((HOST, 0)) as listening, Sniffer(listening.getsockname(), sender) as sniffer:
        ends = socket.create_connection((HOST, sniffer.port)), listening.accept()[0]
        with tunnels(papers, ends=ends) as (client, server):
            if sender == "server":  # which learns from what it is asked
                client.plain.sendall(asked)
                assert receive(server.plain, header) == asked
            one, other = (client, server) if sender == "client" else (server, client)

            def send():
                at = 0
                while at < len(sent):
                    piece = chance.choice((32, 4096, 65536, 1 << 20))
                    one.plain.sendall(sent[at : at + piece])
                    at += piece

            thread = threading.Thread(target=send)
            thread.start()
            assert receive(other.plain, len(sent)) == sent
            thread.join()
            if sender == "server":  # an answer without a header
                server.plain.sendall(b"\0\0\0\0")
                assert receive(client.plain, 4) == b"\0\0\0\0"
                sizes.append(4)
    assert [size - 17 for size in sniffer.records][
        -len(sizes) - 1 : -1
    ] == sizes  # TLS 1.3 adds 17; the last one closes


class Sniffer:
    """Passes one connection on and notes the lengths of the TLS records that one side sends."""

    def __init__(self, target, side):
        self.records = []
        self._listening = socket.create_server((HOST, 0))
        self.port = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._serve, args=(target, side))]
        self._threads[0].start()

    def _serve(self, target, side):
        client, _ = self._listening.accept()
        with client, socket.create_connection(target) as server:
            back = threading.Thread(target=self._pass_on, args=(server, client, side == "server"))
            back.start()
            self._pass_on(client, server, side == "client")
            back.join()

    def _pass_on(self, one, other, notes):
        held = bytearray()
        with contextlib.suppress(OSError):
            while content := one.recv(1 << 18):
                held += content if notes else b""
                while len(held) >= 5 and len(held) >= 5 + (length := int.from_bytes(held[3:5], "big")):
                    self.records.append(length)
                    del held[: 5 + length]
                other.sendall(content)
            other.shutdown(socket.SHUT_WR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._threads[0].join()
        self._listening.close()


def test_a_pump_that_is_killed_is_a_broken_link(papers):
    with tunnels(papers, Runs.IN_PROCESS) as (client, server):
        os.kill(client.pid, signal.SIGTERM)  # what ends a group does not end it
        client.plain.sendall(b"still there")
        assert receive(server.plain, 11) == b"still there"
        kept = [str(entry.readlink()) for entry in Path(f"/proc/{client.pid}/fd").iterdir()]
        assert len([name for name in kept if name.startswith("socket:")]) == 2
        assert len(kept) <= 4
        os.kill(client.pid, signal.SIGKILL)
        assert client.plain.recv(1) == b""
        assert client.ending(10).how is How.BROKEN
        assert server.plain.recv(1) == b""
        assert server.ending().how is How.BROKEN


def test_an_end_that_is_not_read_holds_up_its_sender_and_no_more(papers):
    with tunnels(papers) as (client, server):
        server.plain.setblocking(False)  # noqa: FBT003
        sent, until = 0, time.monotonic() + 10
        quiet = time.monotonic()
        while time.monotonic() - quiet < 0.3:
            assert time.monotonic() < until, "it takes and takes"
            with contextlib.suppress(BlockingIOError):
                sent += server.plain.send(bytes(1 << 16))
                quiet = time.monotonic()
        assert sent < 48 << 20
        client.plain.sendall(b"the other way")  # is free
        server.plain.settimeout(10)
        assert receive(server.plain, 13) == b"the other way"


@pytest.fixture(scope="module")
def bad(papers):
    """What is wrong with a certificate: (it, what the end that sees it says of it, what its owner hears by alert)."""
    authority = papers.authority
    return {
        "expired": (authority.sign("expired", days=(-5, -2)), "has expired", "it has expired"),
        "early": (authority.sign("early", days=(2, 5)), "is not valid yet", "not trusted there"),
        "foreign": (
            papers.other.sign("foreign"),
            "is of an authority that is not trusted here",
            "authority that is not trusted there",
        ),
    }


@pytest.mark.parametrize("what", ["expired", "early", "foreign"])
def test_a_server_that_is_not_trusted(papers, bad, what):
    credentials, said, heard = bad[what]
    client, server = shake(files(papers), files(papers, credentials))
    assert str(client).startswith(f"{HOST}: the server's certificate {said}")
    assert heard in str(server)
    assert str(credentials.certificate) in str(server)
    assert "\n" not in f"{client}{server}"


@pytest.mark.parametrize("what", ["expired", "early", "foreign"])
def test_a_client_that_is_not_trusted(papers, bad, what):
    credentials, said, heard = bad[what]
    client, server = shake(files(papers, credentials), files(papers))
    assert str(server).startswith(f"{HOST}: the client's certificate {said}")
    # By TLS 1.3 the client's handshake is over before it is refused.
    with client:
        assert client.plain.recv(1) == b""
        ending = client.ending()
        assert ending.how is How.REFUSED
        assert heard in ending.reason
        assert str(credentials.certificate) in ending.reason


@pytest.mark.parametrize("names", [("elsewhere.example",), ("10.1.2.3",), ()])
def test_a_server_of_another_name(papers, names):
    elsewhere = papers.authority.sign("elsewhere.example", names)
    client, server = shake(files(papers), files(papers, elsewhere))
    assert str(client).startswith(f"{HOST}: the server's certificate is for another address (certificate is not valid")
    assert "--tls-no-cn-verify" in str(client)
    assert isinstance(server, TlsError)
    client, server = shake(files(papers, verifies_name=False), files(papers, elsewhere))
    with server, client:
        assert client.version
    client, server = shake(files(papers), files(papers))  # a server takes any name
    with server, client:
        assert server.version


def test_revoked_certificates(papers):
    victim = papers.authority.sign("revoked")
    for revoked in (papers.authority.revoke(victim), papers.authority.revoke(victim, days=(-9, -2))):
        client, server = shake(files(papers, revoked=revoked), files(papers, victim))
        assert str(client) == f"{HOST}: the server's certificate is revoked (number {victim.serial:x})"
        with server:
            assert server.plain.recv(1) == b""
        client, server = shake(files(papers, victim), files(papers, revoked=revoked))
        assert str(server) == f"{HOST}: the client's certificate is revoked (number {victim.serial:x})"
        with client:
            assert client.plain.recv(1) == b""
            assert client.ending().how is How.BROKEN
        # As in stock, a list that has expired revokes what it revokes and nothing else.
        client, server = shake(files(papers, revoked=revoked), files(papers, revoked=revoked))
        with server, client:
            assert client.version


def test_lists_of_another_authority_say_nothing(papers):
    foreign = papers.other.sign("foreign too")
    client, server = shake(files(papers, revoked=papers.other.revoke(foreign)), files(papers))
    with server, client:
        assert client.version


def test_revocation_lists_are_read_as_cryptography_reads_them(papers):
    from cryptography import x509  # noqa: PLC0415

    some = [papers.authority.sign(f"number {n}") for n in range(3)]
    path = papers.authority.revoke(*some)
    (loaded,) = [x509.load_pem_x509_crl(path.read_bytes())]
    found = read_revoked(path)
    assert {int.from_bytes(one.serial, "big", signed=True) for one in found} == {e.serial_number for e in loaded}
    assert {one.issuer for one in found} == {loaded.issuer.public_bytes()}
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    public = x509.load_pem_x509_certificate(some[0].certificate.read_bytes())
    assert certificate_identity(public.public_bytes(Encoding.DER)) in found
    good = x509.load_pem_x509_certificate(papers.good.certificate.read_bytes())
    identity = certificate_identity(good.public_bytes(Encoding.DER))
    assert identity not in found
    assert identity.issuer == good.issuer.public_bytes()
    both = papers.authority.folder / "both.pem"
    both.write_bytes(path.read_bytes() + papers.other.revoke(papers.other.sign("x")).read_bytes())
    assert len(read_revoked(both)) == 4
    assert read_revoked(papers.authority.revoke()) == frozenset()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_list_that_is_damaged_is_refused_or_read(papers, data, tmp_path_factory):
    content = bytearray(papers.revocations)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path_factory.getbasetemp() / "damaged.pem"
    wrapped = base64.encodebytes(content).decode()
    path.write_text(f"-----BEGIN X509 CRL-----\n{wrapped}-----END X509 CRL-----\n")
    with contextlib.suppress(TlsError):
        assert all(isinstance(one, Identity) for one in read_revoked(path))


def test_a_client_without_a_certificate(papers):
    client, served = connected()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(papers.authority.certificate)

    def go():
        with contextlib.suppress(OSError), context.wrap_socket(client, server_hostname=HOST) as wrapped:
            wrapped.recv(1)

    thread = threading.Thread(target=go)
    thread.start()
    with pytest.raises(TlsError, match=rf"^{HOST}: the client shows no certificate"):
        Endpoint(files(papers), Side.SERVER).open(served, HOST)
    thread.join()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"\x07\0\0\0" * 6, "speaks no TLS: it is to be started with --tls too"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "speaks no TLS: it is to be started with --tls too"),
        (b"", "hung up instead of the TLS handshake: does it speak TLS?"),
        (None, "does not answer the TLS handshake for 0.2 s: does it speak TLS?"),
    ],
)
@pytest.mark.parametrize("side", Side)
def test_a_peer_that_speaks_no_tls(papers, side, answer, said):
    ours, peer = connected()
    with peer:
        if answer:
            peer.sendall(answer)
        elif answer is not None:
            peer.shutdown(socket.SHUT_WR)
        with pytest.raises(TlsError) as caught:
            Endpoint(files(papers), side).open(ours, HOST, timeout_s=0.2)
    assert str(caught.value).endswith(said)
    assert str(caught.value).startswith(f"{HOST}: ")
    assert ours.fileno() == -1


def test_files_that_are_of_no_use(papers, tmp_path):
    missing = tmp_path / "missing.pem"
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("not a certificate\n")
    locked = tmp_path / "locked.key"
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    key = serialization.load_pem_private_key(papers.good.key.read_bytes(), None)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"secret")))
    stranger = papers.authority.sign("stranger")
    for changes, path, said in (
        ({"authority": missing}, missing, "the authority's certificate cannot be read: no such file.*--tls-cacert"),
        ({"authority": nonsense}, nonsense, "the authority's certificate is no certificate in PEM form"),
        ({"certificate": missing}, missing, "the certificate to show cannot be read: no such file.*--tls-cert"),
        ({"certificate": nonsense}, nonsense, "the certificate to show is not in PEM form"),
        ({"key": missing}, missing, "the key of the certificate cannot be read: no such file.*--tls-key"),
        ({"key": nonsense}, nonsense, "is no key that TLS can use with"),
        ({"key": locked}, locked, "the key is encrypted"),
        ({"key": stranger.key}, stranger.key, f"is not the key of the certificate {papers.good.certificate}"),
        ({"revoked": missing}, missing, "the revocation list cannot be read: no such file"),
        ({"revoked": nonsense}, nonsense, "no revocation list in PEM form"),
    ):
        with pytest.raises(TlsError, match=said) as caught:
            Endpoint(files(papers, **changes), Side.CLIENT)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
