# SPDX-License-Identifier: MIT
"""What the two ends of a migration tell each other: a length, a word with values as JSON, and perhaps a file."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import time
from pathlib import Path

from lazyd.errors import LazydError, ProtocolError, SystemCallError
from lazyd.hints import Any, BinaryIO
from lazyd.report import Log
from lazyd.tuples import NamedTuple

VERSION = 1
_LENGTH = struct.Struct("<I")
_MOST_BYTES = 1 << 20
_PIECE_BYTES = 1 << 18
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


class GivenUpError(LazydError):
    """A signal has come while nothing was lost by giving up."""


def give_up_at_signals() -> None:
    """From now on have the first signal that ends processes raise GivenUpError here, and ignore those after it."""

    def give_up(number: int, _: object) -> None:
        for one in _ENDING:
            signal.signal(one, signal.SIG_IGN)
        raise GivenUpError(f"given up because of {signal.Signals(number).name}; the task goes on at the source")

    for one in _ENDING:
        signal.signal(one, give_up)


def refuse_signals(log: Log, why: str) -> None:
    """From now on have no signal end this process: it is said that this is not the time, and why."""

    def say(number: int, _: object) -> None:
        log.warning(f"{signal.Signals(number).name}: not now, {why}")

    for one in _ENDING:
        signal.signal(one, say)


class Said(NamedTuple):
    """One message."""

    word: str
    values: dict[str, Any]


class Conversation:
    """A connected stream socket, whose owner is somebody else. `peer` names the other end in errors."""

    def __init__(self, stream: socket.socket, peer: str) -> None:
        self.stream = stream
        self.peer = peer
        self._patience_s: float | None = None

    def say(self, word: str, **values: object) -> None:
        """Send a message; ProtocolError if the connection is gone."""
        content = json.dumps({"word": word, **values}).encode()
        self._send(_LENGTH.pack(len(content)) + content)

    def say_file(self, path: Path) -> int:
        """Send a file of images; return its length."""
        with path.open("rb") as file:
            left = length = os.fstat(file.fileno()).st_size
            self.say("file", name=path.name, bytes=length)
            while left:
                content = file.read(min(left, _PIECE_BYTES))
                if not content:
                    raise ProtocolError(str(path), "became shorter while it was sent")
                self._send(content)
                left -= len(content)
        return length

    def hear(self, *words: str, timeout_s: float | None = None) -> Said:
        """Return the next message, which must be one of these; ProtocolError if it is not, or does not come."""
        self._patience_s = timeout_s
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        (length,) = _LENGTH.unpack(self._receive(_LENGTH.size, deadline))
        if length > _MOST_BYTES:
            raise ProtocolError(self.peer, "says what is no message of lazyd migrate")
        try:
            values = json.loads(self._receive(length, deadline))
        except (ValueError, RecursionError) as error:
            raise ProtocolError(self.peer, "says what is no message of lazyd migrate") from error
        if not isinstance(values, dict) or not isinstance(word := values.pop("word", None), str):
            raise ProtocolError(self.peer, "says what is no message of lazyd migrate")
        if word == "failed" and word not in words:
            raise ProtocolError(self.peer, str(values.get("reason", "failed")))
        if word not in words:
            raise ProtocolError(self.peer, f"says {word!r} where {' or '.join(words)} was to come")
        return Said(word, values)

    def hear_file(self, said: Said, folder: Path) -> int:
        """Receive what a "file" announces into a folder; return its length. Plain names, whole and new files only."""
        name, length = said.values.get("name"), said.values.get("bytes")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(length, int) or length < 0:
            raise ProtocolError(self.peer, f"sends a file {name!r}, which is no image")
        try:
            with (folder / name).open("xb") as file:
                try:
                    self._receive_into(file, length)
                except BaseException:
                    (folder / name).unlink()
                    raise
        except FileExistsError:
            raise ProtocolError(self.peer, f"sends {name} twice") from None
        except OSError as error:
            raise SystemCallError("writing", error.errno or 0, path=folder / name) from error
        return length

    def _receive_into(self, file: BinaryIO, left: int) -> None:
        while left:
            content = self._receive_some(min(left, _PIECE_BYTES))
            file.write(content)
            left -= len(content)
        file.flush()  # a full disk is told here

    def _send(self, content: bytes) -> None:
        try:
            self.stream.sendall(content)
        except OSError as error:
            raise ProtocolError(self.peer, f"the connection is gone: {_reason(error)}") from error

    def _receive(self, length: int, deadline: float | None) -> bytes:
        content = bytearray()
        while len(content) < length:
            content += self._receive_some(length - len(content), deadline)
        return bytes(content)

    def _receive_some(self, length: int, deadline: float | None = None) -> bytes:
        """Receive what there is. A deadline is for more than one call: who says one byte at a time says nothing."""
        patience = self._patience_s if deadline is None else max(1e-3, deadline - time.monotonic())
        try:
            self.stream.settimeout(patience)
            content = self.stream.recv(length)
        except TimeoutError as error:
            raise ProtocolError(self.peer, f"says nothing for {self._patience_s:g} s") from error
        except OSError as error:
            raise ProtocolError(self.peer, f"the connection is gone: {_reason(error)}") from error
        if not content:
            raise ProtocolError(self.peer, "hung up")
        return content


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
