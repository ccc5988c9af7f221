# SPDX-License-Identifier: MIT
"""TLS with the real CRIU at the other end, which has it from GnuTLS: dumps, and pages for a lazy restore."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from pathlib import Path

import harness
import migration
import pki
import pytest
from test_dump_like_criu import HEADERS, page_server

from lazyd.tcp import Peer, connect
from lazyd.tls.handshake import Endpoint, Side
from lazyd.tls.pump import Runs
from lazyd.tls.settings import Files

HOST = "127.0.0.1"
LAZYD = str(Path(sys.executable).parent / "lazyd")


class Papers:
    """An authority, and certificates good and bad; options() are criu's and lazyd's alike."""

    def __init__(self, folder: Path) -> None:
        self.authority = pki.Authority(folder)
        self.here, self.there = self.authority.sign("here"), self.authority.sign("there")
        self.foreign = pki.Authority(folder, "other authority").sign("foreign")

    def options(self, who: pki.Credentials) -> list[str]:
        return who.options(self.authority)

    def files(self, who: pki.Credentials) -> Files:
        return Files(self.authority.certificate, None, who.certificate, who.key)


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    return Papers(tmp_path_factory.mktemp("pki"))


def lazyd_dump(pid, suite, port, images, *extra):
    words = [LAZYD, "dump", "--pid", str(pid), "-D", str(images), "--page-server", "--address", HOST]
    words += ["--port", str(port), "--page-server-header", str(HEADERS[suite].value), *extra]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


def start(victim, scenario, tmp_path):
    """Start a program that waits to be dumped; return (pid, the folder it talks through)."""
    state = tmp_path / "state"
    return harness.start_program([str(victim), scenario, str(state)], state), state


def test_a_dump_to_the_stock_page_server(suite, papers, victim, tmp_path):
    images, remote = tmp_path / "images", tmp_path / "remote"
    pid, state = start(victim, "plain", tmp_path)
    try:
        with page_server(suite, remote, extra=papers.options(papers.there)) as port:
            run = lazyd_dump(pid, suite, port, images, *papers.options(papers.here))
            assert run.returncode == 0, run.stderr
    finally:
        harness.reap_group(pid)
    for path in [*remote.glob("pagemap-*.img"), *remote.glob("pages-*.img")]:
        path.rename(images / path.name)
    assert harness.eager_restore(harness.Checkpoint(suite, pid, images, state), tmp_path / "work") == "ok\n"


REFUSED = [
    ("here", "foreign", "the server's certificate is of an authority that is not trusted here"),
    # Stock shakes hands first, looks at the certificate, and hangs up without a word.
    ("foreign", "there", "it has said nothing: it may not trust our certificate"),
    ("here", None, "does it speak TLS?"),
    (None, "there", "it wants TLS"),
]


def test_what_is_refused_leaves_the_process_as_it_was(suite, papers, victim, tmp_path):
    """One line each, and no image."""
    pid, state = start(victim, "plain", tmp_path)
    try:
        for number, (ours, theirs, said) in enumerate(REFUSED):
            extra = papers.options(getattr(papers, theirs)) if theirs else []
            options = papers.options(getattr(papers, ours)) if ours else []
            with page_server(suite, tmp_path / f"remote{number}", extra=extra, exit_code=1) as port:
                run = lazyd_dump(pid, suite, port, tmp_path / "images", *options)
            assert run.returncode == 1
            assert run.stderr.startswith(f"{HOST}:{port}: ")
            assert run.stderr.count("\n") == 1
            assert said in run.stderr
            assert not (tmp_path / "images").exists()
        (state / "go").touch()
        harness.wait_until(lambda: (state / "result").exists() and (state / "result").read_text(), "the verdict")
        assert (state / "result").read_text() == "ok\n"
    finally:
        harness.reap_group(pid)


def pump(one, other):
    """Pass on all that comes, and its end."""
    with contextlib.suppress(OSError):
        while content := one.recv(1 << 20):
            other.sendall(content)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def bridge(target, at_client, at_server):
    """Take one connection with our server's end of TLS, and pass it on with our client's; yield a port."""
    with socket.create_server((HOST, 0)) as listening:

        def serve():
            taken, _ = listening.accept()
            server = at_server.open(taken, HOST, runs=Runs.IN_THREAD)
            client = at_client.open(connect(*target, Peer.MAY_PAUSE), HOST, runs=Runs.IN_THREAD)
            back = threading.Thread(target=pump, args=(client.plain, server.plain))
            back.start()
            pump(server.plain, client.plain)
            back.join()
            server.close()
            client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            thread.join(30)
            assert not thread.is_alive()


def test_pages_from_the_stock_source_by_our_tunnels_to_the_stock_daemon(suite, papers, victim, tmp_path):
    """Both speak TLS, each with an end of ours: what was asked and what was sent goes through plain in between."""
    command = [str(victim), "plain", str(tmp_path / "state")]
    options = tuple(papers.options(papers.there))
    at_client = Endpoint(papers.files(papers.here), Side.CLIENT)
    at_server = Endpoint(papers.files(papers.here), Side.SERVER)
    with migration.source(suite, command, tmp_path, extra=options) as source:
        images = source.copy_images(tmp_path / "there")
        with bridge((HOST, source.port), at_client, at_server) as port:
            source.port = port
            outcome = migration.restore(source, images, tmp_path / "work", who="stock", extra=options)
        migration.assert_good(outcome)
