# SPDX-License-Identifier: MIT
"""A client of a page server that shares no code with lazyd, and made up memory whose every page is known."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from images_builder import PAGE, Entry, Task, build_chain, page_pattern

from lazyd.report import Log
from lazyd.serve.connection import Desk, serve_connection

BASE = 0x7F00_0000_0000
ADD_F, GET, CLOSE, FORCE_CLOSE, IDENTIFY = 6, 7, 0x1023, 0x1024, 0x4C5A
OPEN2, PARENT_QUERY = 4, 5
PARENT, LAZY, PRESENT, LAZYD = 1, 2, 4, 0x8000
LAZYD_COMMAND = str(Path(sys.executable).parent / "lazyd")


class Answer(NamedTuple):
    """An answer to a GET."""

    flags: int
    pages: int
    address: int
    destination: int
    data: bytes


class Client:
    """The other end of a connection to a page server."""

    def __init__(self, connection: socket.socket, header: int) -> None:
        self.socket = connection
        self.header = header
        self.socket.settimeout(20)

    def encode(self, word: int, address: int = 0, pages: int = 0, destination: int = 0) -> bytes:
        """A header; `word` is the command and its flags."""
        if self.header == 24:
            return struct.pack("<IIQQ", word, pages, address, destination)
        return struct.pack("<IIQQQ", word, 0xDEADBEEF, pages, address, destination)

    def send(self, word: int, address: int = 0, pages: int = 0, destination: int = 0, data: bytes = b"") -> None:
        """Send a message."""
        self.socket.sendall(self.encode(word, address, pages, destination) + data)

    def ask(self, address: int, pages: int, pid: int, flags: int = 0) -> None:
        """Send a GET."""
        self.send(GET | flags << 16, address, pages, pid)

    def receive(self, length: int) -> bytes:
        """Receive exactly so many bytes; EOFError if they do not come."""
        pieces = bytearray()
        while len(pieces) < length:
            piece = self.socket.recv(min(length - len(pieces), 1 << 20))
            if not piece:
                raise EOFError(f"{len(pieces)} of {length} bytes")
            pieces += piece
        return bytes(pieces)

    def answer(self) -> Answer:
        """Receive the answer to a GET."""
        head = self.receive(self.header)
        if self.header == 24:
            word, pages, address, destination = struct.unpack("<IIQQ", head)
        else:
            word, pages, address, destination = struct.unpack("<I4xQQQ", head)
        assert word & 0xFFFF == ADD_F
        flags = word >> 16
        return Answer(flags, pages, address, destination, self.receive(pages * PAGE if flags & PRESENT else 0))

    def number(self, layout: str = "<i") -> int:
        """Receive an answer that is a number."""
        return struct.unpack(layout, self.receive(struct.calcsize(layout)))[0]

    def is_hung_up_on(self) -> bool:
        """Wait for the end of the stream, whatever comes before it."""
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(1 << 20):
                pass
        return True


class Lines(Log):
    """A log that is kept."""

    def __init__(self) -> None:
        super().__init__(stderr=None)
        self.lines: list[str] = []

    def say(self, level, text: str) -> None:
        self.lines.append(text)


@contextlib.contextmanager
def connected(desk: Desk, header: int, *, over_tcp: bool = False, **options):
    """Yield a client of serve_connection(), which has ended when this is left."""
    if over_tcp:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
    else:
        ours, theirs = socket.socketpair()
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            serve_connection(theirs, "client", desk, **options)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ours:
            yield Client(ours, header)
    finally:
        thread.join(20)
        theirs.close()
    assert not thread.is_alive()
    assert not failures


class Running(NamedTuple):
    """A page server in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    def connect(self, header: int = 32) -> Client:
        """Connect a client."""
        return Client(socket.create_connection(("127.0.0.1", self.port)), header)


def start_server(images: Path, log: Path, *options: str, port: int = 0) -> Running:
    """Start `lazyd page-server`; return it once it listens."""
    reading, writing = os.pipe()
    words = [LAZYD_COMMAND, "page-server", "-D", str(images), "--address", "127.0.0.1", "--port", str(port), "-v4"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*words, "--status-fd", str(writing), *options], stdin=subprocess.DEVNULL, stderr=out, pass_fds=[writing]
        )
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"\0", log.read_text()
        found = re.search(r"listening on 127\.0\.0\.1:(\d+)", log.read_text())
        assert found, log.read_text()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        os.close(reading)
    return Running(process, int(found[1]), log)


@contextlib.contextmanager
def running_server(images: Path, log: Path, *options: str, port: int = 0):
    """Run `lazyd page-server`; yield it once it listens. It is ended by SIGTERM, and ends well."""
    server = start_server(images, log, *options, port=port)
    try:
        yield server
        server.process.terminate()
        assert server.process.wait(20) == 0, log.read_text()
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def random_chain(folder: Path, levels: int, pages: int, seed: int):
    """Write a chain of images; return its youngest directory and what each page is: bytes, zeros, or None."""
    chance = random.Random(seed)
    truth: list[bytes | None] = [None] * pages
    written: list[list[Entry]] = []
    for level in range(levels - 1, -1, -1):
        below, truth, entries = truth, [None] * pages, []
        at = 0
        while at < pages:
            run = min(chance.choice((1, 1, 2, 5, 17)), pages - at)
            kind = chance.choice(("dumped", "dumped", "zero", "parent", "nothing"))
            if kind == "parent":
                while run and below[at + run - 1] is None:
                    run -= 1
                run = next((i for i in range(run) if below[at + i] is None), run)
            if kind == "nothing" or run == 0:
                at += max(run, 1)
                continue
            entries.append(Entry(BASE + at * PAGE, run, kind))
            for page in range(at, at + run):
                address = BASE + page * PAGE
                truth[page] = {"dumped": page_pattern(address, level), "zero": bytes(PAGE), "parent": below[page]}[kind]
            at += run
        written.append(entries)
    return build_chain(folder, [[Task(77, entries)] for entries in reversed(written)], dialect="booleans"), truth
