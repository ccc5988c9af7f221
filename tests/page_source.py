# SPDX-License-Identifier: MIT
"""A source of pages as a test wants it: right or wrong, slow or short, byte by byte. Nothing of lazyd is in it.

It runs in a process of its own, one connection after the other, and writes what happens to a log, a line each:
connect, get PID ADDRESS PAGES FLAGS, close COMMAND, garbage, eof, and broken.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PAGE = 4096
ADD_F, GET, IDENTIFY = 6, 7, 0x4C5A
CLOSES = (0x1023, 0x1024)
PRESENT, LAZY, LAZYD = 4 << 16, 2 << 16, 0x8000 << 16


class Get(NamedTuple):
    """A request: its number on its connection, and whose pages it wants."""

    number: int
    pid: int
    address: int
    pages: int
    flags: int


class Pages:
    """What a source has: runs of bytes by pid and address."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[int, int], bytes] = {}

    def add(self, pid: int, start: int, content: bytes) -> None:
        """Have these pages, too."""
        for at in range(0, len(content), PAGE):
            self._bytes[pid, start + at] = content[at : at + PAGE]

    def read(self, get: Get) -> bytes:
        """As many pages from the one asked for on as there are together."""
        found = []
        while len(found) < get.pages and (get.pid, get.address + len(found) * PAGE) in self._bytes:
            found.append(self._bytes[get.pid, get.address + len(found) * PAGE])
        return b"".join(found)


def header(size: int, word: int, pages: int, address: int, pid: int) -> bytes:
    """A message's header in either size."""
    if size == 24:
        return struct.pack("<IIQQ", word & 0xFFFFFFFF, pages & 0xFFFFFFFF, address, pid)
    return struct.pack("<I4xQQQ", word & 0xFFFFFFFF, pages, address, pid)


class Answers:
    """How GETs are answered; tests override what they want to be otherwise."""

    def __init__(self, pages: Pages, size: int = 24) -> None:
        self.pages = pages
        self.size = size
        self.status = 0

    def accept(self, connection: socket.socket, number: int) -> None:
        """Called with each new connection; it may be closed."""

    def get(self, get: Get) -> bytes:
        """The answer's bytes; OSError breaks the connection."""
        content = self.pages.read(get)
        return header(self.size, ADD_F | PRESENT, len(content) // PAGE, get.address, get.pid) + content

    def identify(self, pid: int) -> bytes | None:
        """The answer to who it is; None: nobody who knows that question."""
        del pid
        return None

    def send(self, connection: socket.socket, content: bytes) -> None:
        """Send an answer."""
        connection.sendall(content)


class PageSource:
    """A running source."""

    def __init__(self, answers: Answers, log: Path) -> None:
        self.log = log
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        log.touch()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout's
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                _Server(answers, listener, log).run()
            finally:
                os._exit(1)
        listener.close()

    @property
    def words(self) -> list[str]:
        """The options that name it."""
        return ["--page-server", "--address", "127.0.0.1", "--port", str(self.port)]

    def lines(self) -> list[str]:
        """What happened so far."""
        return self.log.read_text().splitlines()

    def gets(self) -> list[Get]:
        """What was asked for so far."""
        found = [line.split()[1:] for line in self.lines() if line.startswith("get ")]
        return [Get(number, *map(int, words)) for number, words in enumerate(found)]

    def wait_for(self, line: str, seconds: float = 30.0) -> None:
        """Wait until something has happened."""
        end = time.monotonic() + seconds
        while line not in self.lines():
            assert time.monotonic() < end, f"waited for {line!r}; the source has seen {self.lines()[-5:]}"
            time.sleep(0.002)

    def wait_for_end(self, seconds: float = 30.0) -> None:
        """Wait until the last connection has ended."""
        end = time.monotonic() + seconds
        while self.lines()[-1] not in ("eof", "broken", "garbage"):
            assert time.monotonic() < end, f"waited for an end; the source has seen {self.lines()[-5:]}"
            time.sleep(0.002)

    def close(self) -> None:
        """End it."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


class _Server:
    def __init__(self, answers: Answers, listener: socket.socket, log: Path) -> None:
        self._answers = answers
        self._listener = listener
        self._log = log.open("a", buffering=1)

    def run(self) -> None:
        number = 0
        while True:
            connection, (address, _) = self._listener.accept()
            # As a stock source, which has one connection for its life, and lets nobody else in.
            port = self._listener.getsockname()[1]
            self._listener.close()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._log.write("connect\n")
            with connection:
                self._answers.accept(connection, number)
                number += 1
                try:
                    self._log.write(self._serve(connection) + "\n")
                except OSError:
                    self._log.write("broken\n")
            self._listener = socket.create_server((address, port))

    def _serve(self, connection: socket.socket) -> str:
        buffer = b""
        number = 0
        while True:
            while len(buffer) < self._answers.size:
                content = connection.recv(1 << 16)
                if not content:
                    return "eof"
                buffer += content
            message, buffer = buffer[: self._answers.size], buffer[self._answers.size :]
            (word,) = struct.unpack_from("<I", message)
            layout = "<4xIQQ" if self._answers.size == 24 else "<8xQQQ"
            pages, address, pid = struct.unpack(layout, message)
            if word & 0xFFFF == GET:
                self._log.write(f"get {pid} {address} {pages} {word >> 16}\n")
                answer = self._answers.get(Get(number, pid, address, pages, word >> 16))
                number += 1
                self._answers.send(connection, answer)
            elif word == IDENTIFY and (answer := self._answers.identify(pid)) is not None:
                connection.sendall(answer)
            elif word in CLOSES:
                self._log.write(f"close {word:#x}\n")
                connection.sendall(struct.pack("<i", self._answers.status))
            else:
                return "garbage"


Make = Callable[[Pages], Answers]
